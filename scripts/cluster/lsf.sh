#!/bin/bash
# Train on one host of an LSF cluster: one rank for each of its GPUs.
#
#   bsub -env "all, CONFIG=a.yaml, RUN_FOLDER=runs/a" < scripts/cluster/lsf.sh
#
# LSF requeues a job by itself: -Q names the exit status of a training that was stopped early and has saved, -r covers
# a host that fails. -wa and -wt warn it 5 minutes before the limit (-W, hours:minutes).
#BSUB -J dtrain
#BSUB -n 32 -R "span[hosts=1]"
#BSUB -gpu "num=4"
#BSUB -W 12:00
#BSUB -wa USR1 -wt 5
#BSUB -r
#BSUB -Q "75"
#BSUB -o dtrain-%J.log
set -euo pipefail

config=${CONFIG:?a config file} run_folder=${RUN_FOLDER:?a run folder} ranks=${RANKS:-4}
python=$(command -v python || command -v python3)
export MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
if [[ -n ${LSB_DJOB_NUMPROC-} ]]; then
    export OMP_NUM_THREADS=$((LSB_DJOB_NUMPROC > ranks ? LSB_DJOB_NUMPROC / ranks : 1))
fi

# `dtrain job` passes the warning on, and ends with 75 only where another start gets further.
exec "$python" -m dtrain job --run-folder "$run_folder" -- \
    "$python" -m dtrain launch "$config" --nproc-per-node "$ranks" "trainer.checkpoint_dir=$run_folder"
