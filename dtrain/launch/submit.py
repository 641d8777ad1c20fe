"""`dtrain submit`: a SLURM job of a config, which has a copy of config and code of its own; trains nothing itself."""

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.check import check
from dtrain.config.errors import ConfigError, Mistake, found, to_plain
from dtrain.config.load import load_config, merged, run_folder
from dtrain.config.schema import mistake
from dtrain.config.yaml12 import dump
from dtrain.distributed.stop import seconds_of
from dtrain.launch.code_copy import copy_code, named_modules
from dtrain.launch.sbatch import Job, is_word, sbatch_pattern, script
from dtrain.tracking.git_state import capture_code_for_later
from dtrain.tracking.secrets import keep_secret

# Settings of the queue that are plain words, with sbatch's names for them.
WORDS = ("partition", "account", "qos", "constraint")


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
    """What a job asks the batch system for.

    Args:
        nodes: How many, or a range '1-2'.
        gpus_per_node: GPUs of each.
        nproc_per_node: Ranks on each; default: one per GPU, else one.
        cpus_per_node: Processors of each.
        mem_per_node: Memory of each: '64G'.
        time: The job's limit: '12:00:00', '90m', '1.5h', '2d', '1-12:00:00'.
        partition: As the cluster calls it.
        account: As the cluster calls it.
        qos: As the cluster calls it.
        constraint: As the cluster calls it.
        signal_seconds: So long before the limit the job is told to save; SLURM may tell it a minute earlier.
        array: A job for each text, which holds KEY=VALUE words.
    """
    return dict(locals())


class Plan(NamedTuple):
    """A job before anything is written."""

    job: Job
    texts: Sequence[str]  # the configs
    modules: frozenset[str]
    shape: str  # for the eye: '2 nodes x 4 ranks'


def submit(path: str, overrides: Sequence[str], options: Mapping[str, Any], dry_run: bool = False) -> int:
    """Check the config, copy it and the code, write the batch script, submit it; prints how to follow the job.

    Args:
        path: The config file.
        overrides: `KEY=VALUE` texts.
        options: Keys of `cluster` and their values, which win over the config's.
        dry_run: Print the script; write and submit nothing.

    Raises:
        ConfigError: With every mistake that can be found without a GPU.
    """
    asked = [f"cluster.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    plan = _plan(path, [*overrides, *asked])
    text = script(plan.job)
    if dry_run:
        print(text, end="")
        return 0
    folder = plan.job.folder
    try:
        number = _submitted(plan, text)
    except (OSError, _RefusedError) as error:
        print(f"dtrain submit: {error}", file=sys.stderr)
        return 1
    log = folder / (f"{number}_*.log" if len(plan.texts) > 1 else f"{number}.log")
    print(f"job {number}: {plan.job.name}, {plan.shape}")
    print(f"  code and config  {folder}")
    print(f"  follow it        tail -F {shlex.quote(str(folder))}/{log.name}")
    print(f"  its state        squeue -j {number}")
    print(f"  stop it          scancel {number}    (it saves; submit again to go on)")
    return 0


def _plan(path: str, overrides: Sequence[str]) -> Plan:
    first = load_config(path, overrides)
    keep_secret(to_plain(first))
    check(first, "train")
    settings = cluster_settings(**to_plain(first.get("cluster") or {}))
    directives = _directives(first, settings)
    variants = _variants(first, settings)
    base = Path.cwd() / run_folder(first)
    folder = base.with_name(f"{base.name}.jobs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    texts, run_folders, modules = [], [], set[str]()
    for index, words in enumerate(variants):
        config = first
        if words:
            config = load_config(path, [*overrides, *words])
            check(config, "train")
        place = Path.cwd() / run_folder(config)
        if len(variants) > 1 and place == base:
            place = place.with_name(f"{place.name}-{index}")
        values = merged(path, [*overrides, *words])
        values.pop("cluster", None)  # says where, not what: the training is the same wherever it runs
        values.setdefault("trainer", {})["checkpoint_dir"] = str(place).replace("${", "$${")
        texts.append(dump(values))
        run_folders.append(place)
        modules |= named_modules(to_plain(config))
    _no_two_alike(first, run_folders)
    ranks = settings["nproc_per_node"] or settings["gpus_per_node"] or 1
    single = len(variants) == 1
    configs = [folder / ("config.yaml" if single else f"config-{index}.yaml") for index in range(len(variants))]
    name = first.get("run_name") or first.get("experiment") or "dtrain"
    job = Job(name, directives, ranks, sys.executable, folder, configs, run_folders)
    try:
        script(job)
    except ValueError as error:
        raise ConfigError(mistake(first, ("trainer", "checkpoint_dir"), str(error))) from None
    shape = f"{settings['nodes']} node(s) x {ranks} rank(s)" + ("" if single else f", {len(variants)} jobs")
    return Plan(job, texts, frozenset(modules), shape)


def _variants(config: ConfigDict, settings: Mapping[str, Any]) -> list[list[str]]:
    """The overrides of each job; one job without any where there is no array."""
    try:
        return [shlex.split(text) for text in settings["array"] or [""]]
    except ValueError as error:
        raise ConfigError(mistake(config, ("cluster", "array"), f"{error}; expected KEY=VALUE words")) from None


def _no_two_alike(config: ConfigDict, run_folders: Sequence[Path]) -> None:
    twice = [place for place in run_folders if run_folders.count(place) > 1]
    if twice:
        text = f"several jobs would write {twice[0]}; leave trainer.checkpoint_dir to dtrain, or give each its own"
        raise ConfigError(mistake(config, ("cluster", "array"), text))


def _directives(config: ConfigDict, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The options of sbatch.

    Raises:
        ConfigError: Those that no batch script could hold, or SLURM would read otherwise.
    """
    wrong: list[Mistake] = []

    def refuse(key: str, text: str) -> None:
        wrong.append(mistake(config, ("cluster", key), f"{text}, {found(settings[key])}"))

    if not _is_range(settings["nodes"]):
        refuse("nodes", "expected a number of nodes, or a range such as 1-2")
    for key in (*WORDS, "mem_per_node"):
        if settings[key] is not None and not is_word(settings[key]):
            refuse(key, "expected a plain word, as the cluster's administrators use them")
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
    # Of a short job only a part, or it would be told to stop when it starts.
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


def _submitted(plan: Plan, text: str) -> str:
    """The job's number; its folder is for its owner alone: what is copied may hold what others are not to see."""
    folder = plan.job.folder
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        for path, config in zip(plan.job.configs, plan.texts, strict=True):
            path.write_text(config, encoding="utf-8")
        copy_code({"dtrain", *plan.modules}, folder / "code")
        capture_code_for_later(folder / "code-state")
        (folder / "job.sbatch").write_text(text, encoding="utf-8")
        return _sbatch(folder)
    except _UnknownError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # what was never submitted needs nothing
        raise


class _RefusedError(Exception):
    """The job was not taken."""


class _UnknownError(_RefusedError):
    """Whether it was taken is not known."""


def _sbatch(folder: Path) -> str:
    """The job's number."""
    array = any(line.startswith("#SBATCH --array=") for line in (folder / "job.sbatch").read_text().splitlines())
    output = sbatch_pattern(folder) + ("/%A_%a.log" if array else "/%j.log")
    command = ["sbatch", "--parsable", f"--chdir={Path.cwd()}", f"--output={output}", str(folder / "job.sbatch")]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise _RefusedError("there is no sbatch here; --dry-run prints the script for a machine that has one") from None
    if done.returncode and "timed out" in done.stderr:
        where = f"it may be queued all the same: look with squeue --me, and remove {folder} if it is not"
        raise _UnknownError(f"{done.stderr.strip()}; {where}")
    if done.returncode:
        raise _RefusedError(done.stderr.strip() or f"sbatch ended with {done.returncode}")
    return done.stdout.strip().partition(";")[0]
