"""dtrain reproduce: a run once more, with its own code and config, and whether its figures come again.

The code is cloned into a folder of its own at the commit that ran, with the stored diff applied; the checkout from
which somebody works is only read.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config.errors import ConfigError, Mistake, first_few, to_plain
from dtrain.config.load import load_config
from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.distributed.process import end_with
from dtrain.distributed.stop_request import stop_signals
from dtrain.launch.compare_figures import Comparison, compare_figures
from dtrain.launch.diff import differing, files_of_patch, flat_environment, untracked
from dtrain.launch.runs import records_of
from dtrain.tracking.environment import capture_environment
from dtrain.tracking.run_folder import ranks_known
from dtrain.tracking.run_record import Figures, RunRecord
from dtrain.tracking.secrets import leaves
from dtrain.tracking.whole_file import read_json, write_json, write_text

_IS_LINKED_NOT = re.compile(r"(trainer\.checkpoint_dir|mlflow\.|run_name|experiment)")  # what names no data
_PATCH = "diff.patch"
_MOST_SHOWN = 10  # differences of environments


@dataclass
class Plan:
    """How a run is repeated.

    Attributes:
        record: The run.
        folder: Where everything about its repetition goes.
        repository: From which its commit is cloned; '' where it recorded none, and the code here runs.
        directory: Where the run was started, as far as that is here: relative paths of data are found against it.
        overrides: KEY=VALUE that the user gave.
    """

    record: RunRecord
    folder: Path
    repository: str = ""
    directory: Path = field(default_factory=Path.cwd)
    overrides: Sequence[str] = ()

    @property
    def run_folder(self) -> Path:
        """Of the repetition."""
        return self.folder / "run"

    @property
    def checkout(self) -> Path:
        """The clone."""
        return self.folder / "checkout"

    @property
    def place(self) -> Path:
        """Where the repetition is started: in the clone, where the run was started in its repository."""
        return self.checkout / self.record.code_text("folder.txt").strip() if self.repository else self.directory

    def command(self) -> list[str]:
        """The command that trains."""
        facts, config = self.record.facts, str(self.folder.resolve() / "config.yaml")
        ranks = ranks_known(facts) or 1
        values: dict[str, Any] = {"trainer.checkpoint_dir": str(self.run_folder.resolve())}
        values["run_name"] = f"{facts.get('run_name') or self.record.name}-reproduced"
        if facts.get("mirror_to"):  # it is the run's own
            values["trainer.mirror_to"] = None
        if "***" not in (uri := str(facts.get("tracking_uri") or "***")):
            values["mlflow.tracking_uri"] = uri
        own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        start = ["launch", config, "--nproc-per-node", str(ranks)] if ranks > 1 else ["train", config]
        return [sys.executable, "-m", "dtrain", *start, *own, *self.overrides]


def reproduce(
    run: str,
    overrides: Sequence[str] = (),
    *,
    uri: str | None = None,
    output: str | None = None,
    repository: str | None = None,
    tolerance: float = 1e-5,
    dry_run: bool = False,
) -> int:
    """Train a run again and compare the figures.

    Returns:
        0 they are equal, or differ relatively by no more than `tolerance`; 1 they do not, or some are missing; what the
        training returned where it did not end well: 75 stopped early, the same command continues it.

    Raises:
        ConfigError: It cannot be repeated from here; nothing was trained.
    """
    plan = _plan(run, overrides, uri, Path(output) if output else None, repository)
    print("\n".join(_described(plan)), flush=True)
    if dry_run:
        print(shlex.join(plan.command()))
        return DONE
    _prepare(plan)
    status = _train(plan)
    if status != DONE:
        print(f"reproduce: the training ended with exit status {status}; {plan.run_folder} has its log", flush=True)
        return status
    return judge(plan, tolerance)


def _plan(run: str, overrides: Sequence[str], uri: str | None, output: Path | None, repository: str | None) -> Plan:
    is_folder = Path(run).is_dir()
    folder = output or (Path(f"{run.rstrip('/')}-reproduced") if is_folder else Path(f"runs/reproduced-{run[:8]}"))
    record = records_of([run], uri, "reproduce", folder / ".original", images=False)[0]
    if not record.config_file.is_file():
        raise ConfigError(f"dtrain reproduce: {run} has no resolved config (config.yaml)")
    directory = Path(str(record.facts.get("directory") or "."))
    plan = Plan(record, folder, directory=directory if directory.is_dir() else Path.cwd(), overrides=overrides)
    if record.commit:
        plan.repository = _repository_with(record.commit, repository, [Path.cwd(), directory])
    masked = [key for key, value in leaves(_config_of(plan)) if isinstance(value, str) and "***" in value]
    if masked := [key for key in masked if not key.startswith("mlflow.")]:
        text = "secrets are stored nowhere; give them as KEY=VALUE"
        raise ConfigError([Mistake(f"dtrain reproduce: {key} was masked: {text}") for key in masked])
    return plan


def _config_of(plan: Plan) -> Any:
    return to_plain(load_config(plan.record.config_file, plan.overrides))


def _repository_with(commit: str, named: str | None, places: Sequence[Path]) -> str:
    """The repository that has a commit; ConfigError where none has it."""
    if named is not None and not Path(named).is_dir():
        return named  # a URL; cloning it will tell
    for place in [Path(named)] if named else places:
        top = _git(place, "rev-parse", "--show-toplevel") if place.is_dir() else ""
        if top and _git(place, "cat-file", "-e", f"{commit}^{{commit}}", is_asked=True):
            return top
    where = named or " or ".join(dict.fromkeys(map(str, places)))
    raise ConfigError(f"dtrain reproduce: commit {commit[:10]} is not in {where}; --repository PATH|URL names another")


def _git(place: Path, *arguments: str, is_asked: bool = False) -> str:
    """What git prints, with `is_asked` whether it says yes; '' where it fails."""
    done = subprocess.run(["git", "-C", str(place), *arguments], capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip() or ("yes" if is_asked else "")


def _described(plan: Plan) -> Iterator[str]:
    """What is about to be done, and what is known to be different."""
    record, facts = plan.record, plan.record.facts
    yield f"reproduce: {record.name} in {plan.folder}"
    if plan.repository:
        files = files_of_patch(record.code_text(_PATCH))
        diff = f"with the stored diff of {len(files)} file(s)" if files else "without changes"
        yield f"code: commit {record.commit[:10]} of {plan.repository}, {diff}, cloned into {plan.checkout}"
        if missing := sorted(untracked(record) - files.keys()):
            yield f"code: not stored, since git did not know them: {first_few(missing, 5)}"
    else:
        yield f"code: the run recorded no commit; the code of {plan.place} runs"
    yield from _environment_lines(record)
    seed = _config_of(plan).get("seed") or 0
    yield f"seed: {seed}, {facts.get('world_size') or 1} rank(s)"
    if facts.get("state") != "FINISHED":
        yield f"the run is {facts.get('state')}: compared is how far it came"
    if branches := [each for each in record.journal.starts if each.get("from_step") is not None]:
        yield f"warning: {len(branches)} of its starts continued with other settings, which one start cannot repeat"
    if plan.overrides:
        yield f"given: {' '.join(plan.overrides)}"


def _environment_lines(record: RunRecord) -> Iterator[str]:
    """What ran, beside what is here."""
    if not record.environment:
        yield "environment: the run recorded none"
        return
    with tempfile.TemporaryDirectory(prefix="dtrain-") as here:
        capture_environment(Path(here))
        now = read_json(Path(here) / "environment.json")
    found = list(differing(flat_environment(record.environment), flat_environment(now)))
    if not found:
        yield "environment: the same"
        return
    yield f"environment: {len(found)} difference(s), which may change figures"
    width = max(len(each.key) for each in found[:_MOST_SHOWN])
    for each in found[:_MOST_SHOWN]:
        yield f"  {each.key:<{width}}  {each.one or '-'} then, {each.other or '-'} here"
    if len(found) > _MOST_SHOWN:
        yield f"  and {len(found) - _MOST_SHOWN} more"


def _prepare(plan: Plan) -> None:
    """Lay out clone and config; what an earlier start of the same has made is kept."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    if plan.repository:
        _clone(plan)
        if linked := _link_data(plan):
            print(f"data: linked from {plan.directory}: {first_few(linked, 5)}", flush=True)
    write_text(plan.folder / "config.yaml", plan.record.config_file.read_text())


def _clone(plan: Plan) -> None:
    commit, checkout = plan.record.commit, plan.checkout
    if checkout.is_dir():
        if _git(checkout, "rev-parse", "HEAD") != commit:
            raise ConfigError(f"dtrain reproduce: {checkout} holds another commit; --output DIR names another folder")
        return
    unfinished = checkout.with_name(f".{checkout.name}-{os.getpid()}")
    try:
        shared = ["--shared"] if Path(plan.repository).is_dir() else []
        _do_git(["clone", "--quiet", "--no-checkout", *shared, plan.repository, str(unfinished)])
        _do_git(["-C", str(unfinished), "checkout", "--quiet", "--detach", commit])
        if plan.record.code_text(_PATCH).strip():
            patch = str((plan.record.code_folder / _PATCH).resolve())
            _do_git(["-C", str(unfinished), "apply", "--whitespace=nowarn", patch])
        unfinished.rename(checkout)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _do_git(arguments: list[str]) -> None:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        hint = "; a stored diff is masked where it had secrets, and cut at 5 MiB" if "apply" in arguments else ""
        words = [word for word in arguments if word in ("clone", "checkout", "apply")]
        raise ConfigError(f"dtrain reproduce: git {words[0]} failed: {said}{hint}")


def _link_data(plan: Plan) -> list[str]:
    """Link what the config names by a relative path, and git does not have, from where the run was started."""
    linked: list[str] = []
    for key, value in leaves(_config_of(plan)):
        if not isinstance(value, str) or not value or _IS_LINKED_NOT.match(key) or Path(value).is_absolute():
            continue
        try:
            found = sorted(plan.directory.glob(value)) if re.search(r"[*?\[]", value) else [plan.directory / value]
        except (ValueError, NotImplementedError):
            continue
        for source in found:
            _link(source, plan.place / os.path.relpath(source, plan.directory), plan, linked)
    return linked


def _link(source: Path, target: Path, plan: Plan, linked: list[str]) -> None:
    inside = os.path.normpath(target.absolute()).startswith(os.path.normpath(plan.checkout.absolute()) + os.sep)
    if not source.exists() or not inside or plan.folder.resolve().is_relative_to(source.resolve()):
        return
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
        linked.append(os.path.relpath(target, plan.place))
    elif source.is_dir() and target.is_dir() and not target.is_symlink():
        for each in sorted(source.iterdir()):
            _link(each, target / each.name, plan, linked)


def _train(plan: Plan) -> int:
    """The exit status of the training; a request to stop is passed on to it."""
    command = plan.command()
    print(f"$ {shlex.join(command)}", flush=True)
    parent = os.getpid()
    # In a group of its own, so that a Ctrl-C reaches it once, from here.
    child = subprocess.Popen(
        command, cwd=plan.place, env=_environment(plan), process_group=0, preexec_fn=lambda: end_with(parent)
    )
    before = {number: signal.signal(number, lambda got, _: child.send_signal(got)) for number in stop_signals()}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _environment(plan: Plan) -> dict[str, str]:
    """Python finds the clone's modules, not those of the checkout that it was cloned from."""
    given = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    home = Path(__file__).resolve().parents[2]
    given += [] if home.name in ("site-packages", "dist-packages") else [home]  # run from a checkout
    places = [plan.place.resolve()]
    if plan.repository:
        top, own = Path(plan.repository).resolve(), plan.checkout.resolve()
        places += [own, own / "src"]
        given = [own / each.relative_to(top) if each.is_relative_to(top) else each for each in given]
    path = dict.fromkeys(str(each) for each in (*places, *given))
    own_settings = ("MLFLOW_HTTP_REQUEST_", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")  # of reading from MLflow, not its
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own_settings)}
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


def judge(plan: Plan, tolerance: float) -> int:
    """Compare, say it, and keep it."""
    original = plan.record.journal.figures
    repeated = RunRecord(str(plan.run_folder), plan.run_folder).journal.figures
    if plan.record.facts.get("state") != "FINISHED":
        repeated = _as_far_as(original, repeated)
    compared = compare_figures(original, repeated)
    is_close = compared.points > 0 and not compared.missing and compared.largest <= tolerance
    verdict = "equal" if compared.is_equal else "close" if is_close else "apart"
    words = {"equal": "reproduced", "close": f"reproduced to {tolerance:g}", "apart": "not reproduced"}
    print(f"\n{words[verdict]}: " + "\n  ".join(compared.lines()))
    print(f"A: {plan.record.name}\nB: {plan.run_folder}")
    write_json(plan.folder / "reproduction.json", {"of": plan.record.name, "verdict": verdict, **_as_object(compared)})
    return DONE if verdict != "apart" else FAILED


def _as_far_as(original: Figures, repeated: Figures) -> Figures:
    """Of a repetition, what the run could have had that ended before its end."""
    last = max((step for series in original.values() for step in series), default=0)
    return {
        key: {step: value for step, value in values.items() if step < last or step in original[key]}
        for key, values in repeated.items()
        if key in original
    }


def _as_object(compared: Comparison) -> Mapping[str, Any]:
    apart = {
        key: {"relative": relative, "step": step, "a": one, "b": other}
        for key, (relative, step, one, other) in compared.apart.items()
    }
    return {"points": compared.points, "equal": compared.equal, "apart": apart, "missing": compared.missing}
