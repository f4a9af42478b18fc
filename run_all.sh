#!/usr/bin/env bash
# Sets up on first use, then runs every notebook of a profile; ./run_all.sh --help says more.
set -eu

for argument in "$@"; do
  case $argument in
    -h | --help)
      cat <<'HELP'
Usage: ./run_all.sh [--profile NAME|PATH.yaml] [--data-dir DIR] [--only 03,05] [--seeds N] [--fresh]

Makes Figures 1-7 and Tables 1-4: sets itself up on first use, computes every run that is missing, executes the
notebooks and writes the report. What is there already is not computed again; a run that was stopped goes on where it stood.

  --profile   what to run: a profile's name, or the path of your own YAML (default: tiny, all of it embedded)
  --data-dir  folder with the benchmarks' original files, in place of the profile's data
  --only      these notebooks only, by number
  --seeds     this many seeds, in place of the profile's
  --fresh     compute anew: forget all results and figures of the profile first; with --only, the results alone that
              those notebooks show

Results go to results/<profile>, the report to results/<profile>/report, logs to results/<profile>/logs, figures to
figures/<profile>. While it runs, "python -m qtale_lib status --profile NAME" tells how far it is, from another terminal.
From outside: PYTHON, QTALE_TORCH_INDEX (set-up), QTALE_DATA_DIR, QTALE_MODELS_DIR.
HELP
      exit 0
      ;;
  esac
done

. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
exec python -m qtale_lib run "$@"
