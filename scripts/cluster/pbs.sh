#!/bin/bash
# Train on one node of a PBS cluster (OpenPBS, PBS Pro): one rank for each of its GPUs.
#
#   qsub -v CONFIG=a.yaml,RUN_FOLDER=runs/a,RANKS=4 scripts/cluster/pbs.sh
#
# PBS gives no warning before the limit, so the training keeps its own time: `limit` is walltime less what the start
# and a save take. A job cannot requeue itself, so the same script is submitted again, to begin where this one ends.
#PBS -N dtrain
#PBS -l select=1:ncpus=32:ngpus=4
#PBS -l walltime=12:00:00
#PBS -r y
#PBS -j oe
set -euo pipefail
limit=11:45:00

cd -- "$PBS_O_WORKDIR"
config=${CONFIG:?a config file} run_folder=${RUN_FOLDER:?a run folder} ranks=${RANKS:-4}
python=$(command -v python || command -v python3)
# The first of the jobs that continue one another gives them their name.
export CONFIG RUN_FOLDER RANKS=$ranks DTRAIN_JOB_ID=${DTRAIN_JOB_ID:-$PBS_JOBID}
export MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
if [[ -n ${NCPUS-} ]]; then
    export OMP_NUM_THREADS=$((NCPUS > ranks ? NCPUS / ranks : 1))
fi

# PBS runs a copy of this script, which is kept: by the time it is needed, the original may be another one.
(umask 077 && mkdir -p -- "$run_folder.jobs")
script=$run_folder.jobs/pbs-$DTRAIN_JOB_ID.sh
[[ -e $script ]] || cp -- "$0" "$script"
quoted=${script//\'/\'\\\'\'} # for `dtrain job`: what printf %q writes, bash alone can read

exec "$python" -m dtrain job --run-folder "$run_folder" \
    --requeue "qsub -W depend=afterany:$PBS_JOBID -v CONFIG,RUN_FOLDER,RANKS,DTRAIN_JOB_ID '$quoted'" -- \
    "$python" -m dtrain launch "$config" --nproc-per-node "$ranks" \
    "trainer.checkpoint_dir=$run_folder" "trainer.time_limit=$limit"
