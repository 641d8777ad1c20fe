"""The config's `cluster`: what a job asks the batch system for, as directives of its script."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, Mistake, found
from dtrain.config.schema import mistake
from dtrain.distributed.stop_request import seconds_of
from dtrain.launch.batch_script import is_word

WORDS = ("partition", "account", "qos", "constraint")  # settings of the queue, named as sbatch has them


def cluster_settings(  # noqa: PLR0913
    nodes: int | str = 1,
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
    array: list[str] | None = None,
) -> dict[str, Any]:
    """What a job asks the batch system for: configfiles/reference.yaml says what each key means."""
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
    values = {
        "nodes": settings["nodes"],  # without a number of tasks, which srun has: of a range SLURM would give the least
        "gpus-per-node": settings["gpus_per_node"],
        "cpus-per-task": settings["cpus_per_node"],
        "mem": settings["mem_per_node"],
        "time": minutes and f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        **{key: settings[key] for key in WORDS},
        "signal": f"B:USR1@{warning}",
    }
    return [(key, value) for key, value in values.items() if value]


def _is_range(nodes: int | str) -> bool:
    least, dash, most = str(nodes).partition("-")
    return least.isdecimal() and int(least) > 0 and (not dash or (most.isdecimal() and int(most) >= int(least)))
