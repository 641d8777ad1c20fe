"""`dtrain submit`: makes a SLURM job of a config, with a copy of config and code of its own."""

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.check import check
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import load_config, merged, run_folder
from dtrain.config.schema import mistake
from dtrain.config.yaml12 import dump
from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.launch.batch_script import Job, cluster_settings, directives, script
from dtrain.launch.code_copy import copy_code, named_modules
from dtrain.tracking.bad_nodes import bad_nodes
from dtrain.tracking.git_state import capture_code_for_later
from dtrain.tracking.secrets import keep_secret


def submit(path: str, overrides: Sequence[str], options: Mapping[str, Any], dry_run: bool = False) -> int:
    """Check the config, copy it and the code, write the batch script, submit it; prints how to follow the job.

    `options` are keys of the config's `cluster` with values that win over its own. `dry_run` prints the script instead.

    Raises:
        ConfigError: With every mistake that can be found without a GPU.
    """
    given = [f"cluster.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    job, modules = _plan(path, [*overrides, *given])
    if dry_run:
        print(script(job), end="")
        return DONE
    try:
        number = _submitted(job, modules)
    except OSError as error:
        print(f"dtrain submit: {error}", file=sys.stderr)
        return FAILED
    jobs, logs = (f", {len(job.configs)} jobs", f"{number}_*.log") if len(job.configs) > 1 else ("", f"{number}.log")
    spares = f", {job.spares} node(s) spare" if job.spares else ""
    print(f"job {number}: {job.name}, {dict(job.directives)['nodes']} node(s) x {job.ranks} rank(s){spares}{jobs}")
    if left_out := dict(job.directives).get("exclude"):
        print(f"  without          {left_out}    (see bad-nodes in {job.run_folders[0]}, and clear it)")
    print(f"  code and config  {job.folder}")
    print(f"  follow it        tail -F {shlex.quote(str(job.folder))}/{logs}")
    print(f"  its state        squeue -j {number}")
    print(f"  stop it          scancel {number}    (it saves; submit again to resume)")
    return DONE


def _plan(path: str, overrides: Sequence[str]) -> tuple[Job, set[str]]:
    """The job, of which nothing is written yet, and the top-level modules that its configs name."""
    config = _checked(path, overrides)
    settings = cluster_settings(**to_plain(config.get("cluster") or {}))
    asked_for = directives(config, settings)
    try:  # the overrides of each job; one job without any where there is no array
        array = [shlex.split(text) for text in settings["array"] or [""]]
    except ValueError as error:
        raise ConfigError(mistake(config, ("cluster", "array"), f"{error}; expected KEY=VALUE words")) from None
    base = Path.cwd() / run_folder(config)
    folder = base.with_name(f"{base.name}.jobs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    configs, run_folders, modules = {}, [], set[str]()
    for index, words in enumerate(array):
        number = f"-{index}" if len(array) > 1 else ""
        own = _checked(path, [*overrides, *words]) if words else config
        folder_of_run = Path.cwd() / run_folder(own)
        if folder_of_run == base:
            folder_of_run = base.with_name(f"{base.name}{number}")
        text = _config_text(path, [*overrides, *words], folder_of_run, number)
        configs[folder / f"config{number}.yaml"] = text
        run_folders.append(folder_of_run)
        modules |= named_modules(to_plain(own))
    if shared := [folder for folder in run_folders if run_folders.count(folder) > 1]:
        text = f"several jobs would write {shared[0]}; leave trainer.checkpoint_dir to dtrain, or give each its own"
        raise ConfigError(mistake(config, ("cluster", "array"), text))
    bad = {node: text for folder_of_run in run_folders for node, text in bad_nodes(folder_of_run).items()}
    asked_for += [("exclude", ",".join(bad))] if bad else []
    name = config.get("run_name") or config.get("experiment") or "dtrain"
    ranks = settings["nproc_per_node"] or settings["gpus_per_node"] or 1
    job = Job(name, asked_for, ranks, sys.executable, folder, configs, run_folders,
              settings["preflight"], settings["spares"])  # fmt: skip
    try:
        script(job)
    except ValueError as error:
        raise ConfigError(mistake(config, ("trainer", "checkpoint_dir"), str(error))) from None
    return job, modules


def _checked(path: str, overrides: Sequence[str]) -> ConfigDict:
    config = load_config(path, overrides)
    keep_secret(to_plain(config))
    check(config, "train")
    return config


def _config_text(path: str, overrides: Sequence[str], folder_of_run: Path, number: str) -> str:
    """The config of one job, its run folder written out; one of several has a mirror of its own."""
    values = merged(path, overrides)
    values.pop("cluster", None)  # says where, not what: the training is the same wherever it runs
    values.setdefault("trainer", {})["checkpoint_dir"] = str(folder_of_run).replace("${", "$${")
    if values["trainer"].get("mirror_to"):
        values["trainer"]["mirror_to"] += number
    return dump(values)


def _submitted(job: Job, modules: set[str]) -> str:
    """The job's number; its folder is for its owner alone: what is copied may hold what others are not to see."""
    folder = job.folder
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        for path, text in job.configs.items():
            path.write_text(text, encoding="utf-8")
        copy_code({"dtrain", *modules}, folder / "code")
        capture_code_for_later(folder / "code-state")
        (folder / "job.sbatch").write_text(script(job), encoding="utf-8")
        done = _sbatch(folder, "%A_%a.log" if len(job.configs) > 1 else "%j.log")
        error = done.stderr.strip() or f"sbatch ended with exit status {done.returncode}"
        if done.returncode and "timed out" not in error:
            raise ChildProcessError(error)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # what was never submitted needs nothing
        raise
    if done.returncode:
        check_queue = f"it may be queued all the same: look with squeue --me, and remove {folder} if it is not"
        raise ChildProcessError(f"{error}; {check_queue}")
    return done.stdout.strip().partition(";")[0]


def _sbatch(folder: Path, log: str) -> subprocess.CompletedProcess[str]:
    output = f"{folder}/".replace("%", "%%") + log  # where a % begins a pattern
    command = ["sbatch", "--parsable", f"--chdir={Path.cwd()}", f"--output={output}", str(folder / "job.sbatch")]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError("no sbatch on this machine; --dry-run prints the script for one that has it") from None
