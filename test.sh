#!/usr/bin/env bash
# Sets up what is missing, then runs the tests. Arguments go to pytest: ./test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
setup requirements.txt requirements-dev.txt
exec .venv/bin/python -m pytest "$@"
