# shellcheck shell=bash
# Sourced by run_all.sh and run_tests.sh: puts a Python that holds the pinned packages first on PATH.
#
# An active environment (venv or conda) that holds the pins is used as it is. Otherwise .venv is made on first use:
# torch first, in whichever build pip finds, then the rest from requirements.lock, whose hashes are checked. A stamp
# written at the very end lets the next call start at once; without it, the set-up goes on where it was left.
# Written for bash 3.2, which macOS ships.
#
#   PYTHON=python3.12          the interpreter that .venv is made with (3.11 to 3.13)
#   QTALE_TORCH_INDEX=URL      the package index that torch's CPU, CUDA or ROCm build is taken from
#
# The script that sources it names in WITH_EXTRAS the extras that it needs, which .venv then gets from lock files of their
# own: cluster (Ray), browser (Playwright).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/qtale-stamp
TORCH=$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' "$ROOT/pyproject.toml")
TRITON=triton==3.9.0 # autoawq asks for it but runs without; a CUDA torch brings its own

say() { echo "[set-up] $*" >&2; }

fail() {
  say "$*"
  exit 1
}

in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  set -- python3 python3.13 python3.12 python3.11
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; fi
  for candidate in "$@"; do
    if in_range "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11, 3.12 or 3.13 is needed, but ${PYTHON:-python3} is" \
    "$("${PYTHON:-python3}" -V 2>/dev/null || echo not there); install one, or name it: PYTHON=python3.12 $0"
}

# shellcheck disable=SC2086 # nothing, or words
holds_pins() { "$1" "$ROOT/scripts/environment.py" check ${WITH_EXTRAS:-} 2>/dev/null; }

# What .venv has to be, in words: its Python, the pins, and where it lies.
wanted_stamp() {
  "$VENV/bin/python" -V 2>/dev/null && echo "$TORCH $ROOT" && cksum <"$ROOT/requirements.lock"
}

is_ready() { [ -f "$STAMP" ] && [ "$(wanted_stamp)" = "$(cat "$STAMP")" ]; }

pip_install() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input install -qq "$@"; }

make_venv() {
  if in_range "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "Completing the .venv that is there."
    "$VENV/bin/python" "$ROOT/scripts/environment.py" forget-halves
    return
  fi
  local python
  python=$(find_python) || exit 1
  say "Making .venv with $("$python" -V); this happens once and takes some minutes."
  "$python" -m venv --clear "$VENV" ||
    fail "The venv module of $python does not work; on Debian and Ubuntu, install python3-venv."
}

install_packages() {
  say "1/3 Installing $TORCH${QTALE_TORCH_INDEX:+ from QTALE_TORCH_INDEX} (0.2 to 3 GB, by build)."
  # shellcheck disable=SC2086 # no index, no words
  pip_install "$TORCH" ${QTALE_TORCH_INDEX:+--index-url "$QTALE_TORCH_INDEX"} ||
    fail "torch could not be installed; check the network and QTALE_TORCH_INDEX, then call this again."
  say "2/3 Installing the other packages from requirements.lock."
  # Some come as source; they are built with the setuptools that torch has brought, not one fetched unchecked.
  pip_install --require-hashes --no-deps --no-build-isolation -r "$ROOT/requirements.lock" ||
    fail "requirements.lock could not be installed; read pip's message above, then call this again."
  say "3/3 Installing what this system adds, and this package."
  if [ "$(uname -s)" = Linux ] && ! "$VENV/bin/python" -m pip show --quiet triton 2>/dev/null; then
    pip_install --no-deps "$TRITON" || fail "$TRITON could not be installed; check the network, then call this again."
  fi
  pip_install --no-deps --no-build-isolation --editable "$ROOT" ||
    fail "This package could not be installed into .venv; delete .venv, then call this again."
}

set_up() {
  local started=$SECONDS
  make_venv
  rm -f "$STAMP"
  install_packages
  "$VENV/bin/python" "$ROOT/scripts/environment.py" check ||
    fail "The .venv still differs from the pins as said above; delete it, then call this again."
  wanted_stamp >"$STAMP"
  say "Ready after $((SECONDS - started)) s."
}

add_extras() {
  local extra
  "$VENV/bin/python" "$ROOT/scripts/environment.py" forget-halves
  if holds_pins "$VENV/bin/python"; then return; fi
  for extra in $WITH_EXTRAS; do
    say "Adding requirements-$extra.lock (0.1 GB)."
    pip_install --require-hashes --no-deps -r "$ROOT/requirements-$extra.lock" ||
      fail "requirements-$extra.lock could not be installed; read pip's message above, then call this again."
  done
}

activate() {
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -z "$active" ] || ! holds_pins "$active/bin/python"; then
    is_ready || set_up
    if [ -n "${WITH_EXTRAS:-}" ]; then add_extras; fi
    active=$VENV
    export VIRTUAL_ENV=$VENV
  fi
  export PATH=$active/bin:$PATH PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  unset PYTHONHOME
}

activate
