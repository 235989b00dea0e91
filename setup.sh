# Sourced by run.sh and test.sh: makes .venv and installs into it, once for each set of files.

find_python() {
  local python
  for python in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python3.14; do
    if command -v "$python" >/dev/null &&
      "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (4,))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "Python 3.11 or newer is needed: https://www.python.org/downloads/" >&2
  return 1
}

# setup REQUIREMENTS ...
setup() {
  local python stamp files=("$@" pyproject.toml)
  # The folder counts as well: what is installed points to it.
  stamp=".venv/installed-$( (cat "${files[@]}" && pwd) | cksum | tr ' ' '-')"
  [ -e "$stamp" ] && [ -x .venv/bin/python ] && return
  # uv leaves pip out, and so does a set-up that was interrupted; both can be mended.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    ! .venv/bin/python -m ensurepip >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  echo "Installing from $* (once; a minute or two)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    $(printf -- '-r %s ' "$@")
  touch "$stamp"
}
