#!/usr/bin/env bash
# Trains the handwritten digits: on every GPU of this machine, or in two processes on its CPU.
#
#   bash scripts/quickstart.sh [KEY=VALUE ...]        KEY=VALUE as on dtrain's command line: trainer.max_epochs=3
#
# The first start makes .venv (see venv.sh). The run lies in runs/digits, MLflow's store in mlflow.db.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

make_venv
cd -- "$root"

ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())')
place="$ranks GPU(s), one process on each"
if ((ranks == 0)); then
    ranks=2
    place="the CPU, no GPU being found, in 2 processes (gloo)"
fi
say "training configfiles/digits.yaml on $place"

# Said here, since torchrun warns when it has to choose: the machine's cores, divided among the processes.
threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
"$python" -m torch.distributed.run --nproc_per_node="$ranks" -m dtrain configfiles/digits.yaml "$@"

say "to use dtrain and mlflow by name: source $(printf %q "$venv/bin/activate")"
