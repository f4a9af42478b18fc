#!/usr/bin/env bash
# Sets up on first use, then lints and tests: ./run_tests.sh [--all] [arguments for pytest]
# --all adds the tests marked slow, and to .venv what some of them need, Ray and Playwright. One end-to-end run of every
# notebook is among the tests.
set -eu

marked=(-m "not slow")
WITH_EXTRAS=
if [ "${1:-}" = --all ]; then
  shift
  # shellcheck disable=SC2034 # read by what is sourced
  WITH_EXTRAS="cluster browser"
  marked=(-m "slow or not slow")
fi

. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start processes of their own, one thread each
python -m ruff check --quiet .
python -m ruff format --quiet --check .
# the tests of a file stay in one process: they share what they set up
exec python -m pytest -n auto --maxprocesses 4 --dist loadfile "${marked[@]}" "$@"
