#!/usr/bin/env bash
# Sets up what is missing, then trains MNIST on this machine: a server and two clients.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
setup requirements.txt
exec .venv/bin/python run.py "$@"
