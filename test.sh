#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, in two processes. Arguments go to pytest, which then
# runs in one: ./test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
setup requirements.txt requirements-dev.txt
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
exec .venv/bin/python -m pytest "$@"
