#!/usr/bin/env bash
# Sets up what is missing, then trains MNIST on this machine: a server and two clients.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup.sh"
(cd "$here" && setup requirements.txt)
exec "$here/.venv/bin/python" "$here/run.py" "$@"
