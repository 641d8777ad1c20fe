"""A SLURM batch script: the config's `cluster` as its directives, and its text.

No value can become a command: directives hold plain words, all else is quoted.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.durations import seconds_of
from dtrain.config.errors import ConfigError, Mistake, found
from dtrain.config.schema import mistake

WORDS = ("partition", "account", "qos", "constraint")  # settings of the queue, named as sbatch has them

# The same lines stand in scripts/cluster/slurm-nodes.sbatch.
BODY = """\
export MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > ranks ? SLURM_CPUS_PER_TASK / ranks : 1))}
fi
# The first node is where the ranks meet, on a port of this job and start: others may run on the same node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))

# As scontrol takes it: the number of one task of an array stands for all of them.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
# With spares a node may be lost, or give its place up, and neither the job nor the others end for it.
spares=${spares:-0}
patience=(--wait=600)
if ((spares)); then patience=(--wait=0 --no-kill); fi
# With --preflight a task for each rank looks at its node first; the next start leaves a bad node out.
before=()
if [[ -n ${preflight-} ]]; then
    for word in srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) \\
        --ntasks-per-node="$ranks" --cpus-per-task=1 --overcommit --kill-on-bad-exit=0 --wait=30 \\
        "$python" -m dtrain doctor "$config" --preflight --note-bad-nodes; do before+=("--preflight=$word"); done
fi
# `dtrain job` passes the warning on to srun, and requeues a job that was stopped early and has saved.
# srun waits for the other nodes when one has ended: one of them may be saving. Not forever: another may hang.
exec "$python" -m dtrain job --run-folder "$run_folder" --requeue "scontrol requeue $job" \\
    --spares "$spares" ${before[@]+"${before[@]}"} -- \\
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \\
    --kill-on-bad-exit=0 "${patience[@]}" \\
    "$python" -m dtrain launch "$config" --nnodes $((SLURM_JOB_NUM_NODES - spares)) --spares "$spares" \\
    --nproc-per-node "$ranks" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \\
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
"""


def cluster_settings(  # noqa: PLR0913
    nodes: int | str = 1,
    spares: int = 0,
    gpus_per_node: int | None = None,
    nproc_per_node: int | None = None,
    cpus_per_node: int | None = None,
    mem_per_node: str | None = None,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    signal_seconds: int = 180,
    preflight: bool = False,
    array: list[str] | None = None,
) -> dict[str, Any]:
    """What `dtrain submit` asks the batch system for; its options win. Nothing else reads it.

    Args:
        nodes: How many, or a range such as 1-2.
        spares: So many nodes more, which wait ready and take the place of lost ones.
        gpus_per_node: GPUs of each, and as many ranks. Default: none.
        nproc_per_node: Ranks on each. Default: one per GPU, else one.
        cpus_per_node: Processors of each. Default: as SLURM is set up.
        mem_per_node: Memory of each, such as 64G. Default: as SLURM is set up.
        time: The job's limit: 12:00:00, 90m, 1.5h, 2d, 1-12:00:00. Default: the partition's.
        partition: As the cluster calls it. Default: the cluster's own.
        account: As the cluster calls it. Default: your own.
        qos: As the cluster calls it. Default: the cluster's own.
        constraint: As the cluster calls it. Default: none.
        signal_seconds: So long before the limit the training is asked to save.
        preflight: Look at the nodes before each start (`dtrain doctor --preflight`); a bad one is left out.
        array: A job for each text of KEY=VALUE words in a list. Default: one job.
    """
    return dict(locals())


def directives(config: ConfigDict, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The options of sbatch; what no batch script could hold, or SLURM would read otherwise, is a mistake."""
    wrong: list[Mistake] = []

    def refuse(key: str, text: str) -> None:
        wrong.append(mistake(config, ("cluster", key), f"{text}, {found(settings[key])}"))

    if not _is_range(settings["nodes"]):
        refuse("nodes", "expected a number of nodes, or a range such as 1-2")
    for key in (*WORDS, "mem_per_node"):
        if settings[key] is not None and not is_word(settings[key]):
            refuse(key, "expected a plain word, as the cluster's administrators use it")
    limit, minutes = settings["time"], 0
    if limit is not None:
        try:
            minutes = -(-int(seconds_of(limit)) // 60)
        except ValueError:
            refuse("time", "expected 12:00:00, 90m, 1.5h, 2d or 1-12:00:00")
        if limit.isdigit():  # seconds to trainer.time_limit, minutes to SLURM
            refuse("time", "expected a unit, such as 90m or 01:30:00")
    if wrong:
        raise ConfigError(wrong)
    # Of a short job only a part, or it would be warned when it starts.
    warning = min(settings["signal_seconds"], minutes * 60 // 3) if minutes else settings["signal_seconds"]
    least, dash, most = str(settings["nodes"]).partition("-")
    numbers = [str(int(number) + settings["spares"]) for number in (least, most) if number]
    values = {
        "nodes": dash.join(numbers),  # without a number of tasks, which srun has: of a range SLURM would give the least
        "gpus-per-node": settings["gpus_per_node"],
        "cpus-per-task": settings["cpus_per_node"],
        "mem": settings["mem_per_node"],
        "time": minutes and f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        **{key: settings[key] for key in WORDS},
        "signal": f"B:USR1@{warning}",
    }
    return [(key, value) for key, value in values.items() if value]


class Job(NamedTuple):
    """What a script is made of."""

    name: str  # for the queue; any text
    directives: Sequence[tuple[str, Any]]  # sbatch's options and their values, such as ("nodes", 2)
    ranks: int  # per node
    python: str  # the interpreter
    folder: Path  # the job's own, with the copy of the code
    configs: Mapping[Path, str]  # file and text of one, or of one for each job of an array
    run_folders: Sequence[Path]  # theirs
    preflight: bool = False  # whether nodes are looked at before the training
    spares: int = 0  # of the nodes


def script(job: Job) -> str:
    """The script; a ValueError names a value or path that no script could hold."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", job.name).lstrip("-_.")[:60] or "dtrain"
    directives = [("job-name", name), *job.directives]
    if len(job.configs) > 1:
        directives.append(("array", f"0-{len(job.configs) - 1}"))
    if wrong := [value for _, value in directives if not is_word(value)]:
        raise ValueError(f"{wrong[0]!r} cannot stand in a batch script")
    lines = [
        "#!/bin/bash",
        "# Written by `dtrain submit`, for the code and the config beside it.",
        *(f"#SBATCH --{key}={value}" for key, value in directives),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *(["#SBATCH --no-kill"] if job.spares else []),
        "set -euo pipefail",
        "",
        f"python={_quoted(job.python)}",
        f"configs=({' '.join(map(_quoted, job.configs))})",
        f"run_folders=({' '.join(map(_quoted, job.run_folders))})",
        "config=${configs[${SLURM_ARRAY_TASK_ID:-0}]} run_folder=${run_folders[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"ranks={int(job.ranks)} # per node",
        f"spares={int(job.spares)} preflight={'yes' if job.preflight else ''}",
        f"code={_quoted(job.folder / 'code')}",
        "# The copy of the code comes first, and the current folder is not looked at.",
        "export PYTHONSAFEPATH=1 PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} DTRAIN_CODE_STATE=$code-state",
        BODY,
    ]
    return "\n".join(lines)


def is_word(value: Any) -> bool:
    """Whether a value can stand in a directive."""
    return re.fullmatch(r"[A-Za-z0-9][\w.,:@+*/()\[\]&|=-]{0,199}", str(value), re.ASCII) is not None


def _quoted(path: str | Path) -> str:
    """A path for bash. Python's search path is divided by colons, and a backslash means something to sbatch."""
    text = str(path)
    if not text.isprintable() or set(text) & {":", "\\"}:
        raise ValueError(f"{text!r} cannot be used in a batch script: no control characters, colons, backslashes")
    return "'" + text.replace("'", "'\\''") + "'"


def _is_range(nodes: int | str) -> bool:
    least, dash, most = str(nodes).partition("-")
    return least.isdecimal() and int(least) > 0 and (not dash or (most.isdecimal() and int(most) >= int(least)))
