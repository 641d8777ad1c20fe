#!/usr/bin/env bash
# Checks dtrain on a machine with a CUDA GPU; one line per check: ok, FAIL or skip. Exit status 1 if one failed.
#
#   bash scripts/gpu_check.sh [--keep FOLDER] [CHECK ...]     CHECK: see scripts/gpu_check.py --help
#
# PYTHON=... is the interpreter, whose torch (2.10 or newer) sees the GPU; default: .venv's, else python3. What else is
# missing there goes into a temporary environment on top of it: from WHEELS=<folder of wheels>, else from the package
# index. Where mlflow is missing it is not installed: the journal alone is checked then.
# `--device cpu` rehearses the checks without a GPU.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/gpu_environment.sh"
"$python" "$root/scripts/gpu_check.py" "$@"
