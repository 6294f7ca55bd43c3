# Sourced from the project's folder by every script that starts Python in an environment that is there already.
# Leaves the interpreter in $PYTHON: the caller's, else that of the .venv which quickstart.sh made, else python.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=${VENV:-.venv}/bin/python
  [[ -x $PYTHON ]] || PYTHON=python
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' >/dev/null 2>&1; then
  echo "error: $PYTHON has no torch: run bash quickstart.sh (makes .venv), or pip install -r requirements.txt, or set" \
    "PYTHON=/path/to/python" >&2
  exit 1
fi

# How long torchrun lets workers finish their step and write its checkpoint after Ctrl-C or SIGTERM, in seconds, before
# it kills them. Read by torch 2.12 and later; earlier ones kill after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
