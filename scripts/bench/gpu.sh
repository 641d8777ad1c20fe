#!/usr/bin/env bash
# Training on a GPU beside a hand-written loop, unattended: what scripts/bench/gpu.py measures, in less than 5 minutes.
#
#   bash scripts/bench/gpu.sh [--json FILE] [...]     what else it takes: python scripts/bench/gpu.py --help
#
# PYTHON=... and WHEELS=... are those of scripts/gpu_check.sh: what is missing is added to a temporary environment, from
# a folder of wheels where there is no network. `--device cpu --scale small` rehearses it without a GPU.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/gpu_environment.sh"
"$python" "$root/scripts/bench/gpu.py" "$@"
