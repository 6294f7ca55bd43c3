# Sourced by quickstart.sh and run_tests.sh from the project's folder: makes .venv once and keeps it in step with
# requirements.txt. Leaves the interpreter in $PYTHON and what the installation took in $SECONDS_INSTALL.
# BASE_PYTHON chooses the interpreter that .venv is made from; VENV its folder.
VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
# Bytecode is kept: where an image sets this to 1, every start would compile torch and transformers anew (20 s).
export PYTHONDONTWRITEBYTECODE=
_started=$SECONDS

_find_python() {
  for candidate in "${BASE_PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [[ -n $candidate ]] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11, 3.12 or 3.13 not found; install one or set BASE_PYTHON=/path/to/python3.11" >&2
  return 1
}

_sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; } # macOS has shasum

_wanted=$(_sha256 requirements.txt | cut -d' ' -f1)
if [[ "$(cat "$VENV/.requirements.sha256" 2>/dev/null)" != "$_wanted" ]]; then
  echo "Installing into $VENV (once; a few minutes)"
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then # also what a venv is that broke off, for want of ensurepip
    _base=$(_find_python)
    if ! "$_base" -m venv "$VENV"; then
      rm -f "$VENV"/bin/python* # so that the next try begins with the Python it is given
      echo "error: $_base cannot make $VENV: install its venv module (Debian: apt install python3-venv), or set" \
        "BASE_PYTHON to another Python" >&2
      exit 1
    fi
  fi
  # bytecode is compiled for what is imported, not for everything that is installed
  "$PYTHON" -m pip install --quiet --no-compile --requirement requirements.txt
  "$PYTHON" -m pip check
  echo "$_wanted" >"$VENV/.requirements.sha256"
fi
SECONDS_INSTALL=$((SECONDS - _started))
