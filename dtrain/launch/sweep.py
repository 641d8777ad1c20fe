"""dtrain sweep: trainings that differ in some keys, all combinations or what Optuna chooses, each in its own folder."""

import contextlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from dtrain.config.build import version_of
from dtrain.config.check import call_mistakes
from dtrain.config.errors import ConfigError, Mistake, shown, to_plain
from dtrain.config.load import load_config, run_folder, to_yaml
from dtrain.config.metric_rules import best_rule
from dtrain.config.rules import value_mistakes
from dtrain.config.schema import calls, mistake, refused
from dtrain.distributed.exit_status import DONE, FAILED, STOPPED_EARLY
from dtrain.launch.gpu_locks import GpuLocks, visible_gpus
from dtrain.launch.grid import Grid
from dtrain.launch.study import Study
from dtrain.launch.sweep_parent import parent_override, parent_run
from dtrain.launch.sweep_result import best_of, conclude
from dtrain.launch.sweep_values import MOST, Draw, values_of
from dtrain.launch.trial import Plan, Trial, differs
from dtrain.launch.trials_at_work import Settings, TrialsAtWork, command_of
from dtrain.tracking.run_folder import RunFolder, locked_file
from dtrain.tracking.secrets import keep_secret, redacted_tree
from dtrain.tracking.whole_file import write_text


def sweep_settings(
    parameters: list[str] | None = None,
    trials: int = 20,
    sampler: str | dict[str, Any] | None = None,
    pruner: str | dict[str, Any] | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """What a sweep trains, and how it chooses: configfiles/reference.yaml says what each key means."""
    return dict(locals())


def sweep(
    path: str,
    overrides: Sequence[str],
    ranks: str | None = None,
    dry_run: bool = False,
    jobs: int | None = None,
    to_slurm: bool = False,
) -> int:
    """Train every trial that is not finished yet.

    Args:
        path: A YAML file.
        overrides: `KEY=VALUES` words.
        ranks: Of each trial, as --nproc-per-node of `dtrain launch`. Default: one process without a launcher.
        dry_run: Say what would be trained, and nothing else.
        jobs: How many trials at once. Default: as many as there are GPUs for, else one.
        to_slurm: Submit them as an array of jobs instead.

    Returns:
        0 all are finished or pruned; 1 one has failed, which ends no other; 75 stopped early: start it again.

    Raises:
        ConfigError: Nothing is swept, a trial's config is wrong, or the machine has too few GPUs: then none is started.
    """
    plan = plan_of(path, overrides)
    keep_secret(to_plain(plan.base))
    settings = _settings(plan)
    uses_optuna = _uses_optuna(plan, settings)
    own = [_first(plan)] if plan.draws else trials_of(plan)
    rule = best_rule(own[0].config, calls(own[0].config))
    combinations = [] if plan.draws or settings["sampler"] else [trial.values for trial in own]
    if to_slurm:
        return _submit(plan, own, uses_optuna, dry_run)
    how = _how(plan, ranks, jobs)
    if dry_run:
        if not combinations:
            print(
                f"# {settings['trials']} trials by {_name_of(settings['sampler'])}, the {rule[1]} of {rule[0]}; first:"
            )
        for trial in own if combinations else own[:1]:
            print(shlex.join(["dtrain", *command_of(path, trial, ranks)]))
        return DONE
    with _alone(plan, uses_optuna):
        if not uses_optuna:
            return _run(plan, Grid(own, *rule), how)
        return _run(plan, Study(plan, rule, combinations, settings["trials"], settings["storage"]), how)


def plan_of(path: str, overrides: Sequence[str]) -> Plan:
    """What is swept, by the command line and by the config's sweep.parameters, over which the command line wins.

    Raises:
        ConfigError: No key has several values.
    """
    meant = {text: values_of(text) for text in overrides}
    fixed = [text for text, values in meant.items() if isinstance(values, list) and len(values) == 1]
    base = load_config(path, fixed)
    swept = {}
    for index, text in enumerate(_parameters(base)):
        try:
            key, values = text.partition("=")[0], values_of(text)
        except ConfigError as error:
            raise refused(
                base, ("sweep", "parameters", index), error.mistakes[0].text.removeprefix("dtrain sweep: ")
            ) from None
        if key not in {word.partition("=")[0] for word in fixed}:
            swept[key] = values
    swept |= {text.partition("=")[0]: values for text, values in meant.items() if text not in fixed}
    if not swept:
        example = "optimizer.lr=1e-3,1e-2 or loaders.folds.fold=0..4 or optimizer.lr=loguniform(1e-5,1e-2)"
        raise ConfigError(f"dtrain sweep: no key has several values; give one some, such as {example}")
    if own := {"run_name", "trainer.checkpoint_dir"} & swept.keys():
        raise ConfigError(
            f"dtrain sweep: {own.pop()} cannot be swept: each trial has a name and a run folder of its own"
        )
    return Plan(path, fixed, swept, base, run_folder(base))


def _parameters(base: Any) -> list[str]:
    section = base.get("sweep")
    listed = section.get("parameters") if hasattr(section, "get") else None
    wrong = [item for item in listed or [] if not isinstance(item, str) or "=" not in item]
    if wrong:
        text = f"expected KEY=VALUES words such as optimizer.lr=loguniform(1e-5,1e-2), found {shown(wrong[0])}"
        raise refused(base, ("sweep", "parameters"), f"{text}; in [ ] a word with commas is written in quotes")
    return list(listed or [])


def _settings(plan: Plan) -> dict[str, Any]:
    """The config's `sweep`, checked: that of each trial is taken out."""
    described = calls(plan.base)
    wrong = [item for key in described if re.match(r"sweep(\.|$)", key) for item in call_mistakes(described[key])]
    wrong += [item for item in value_mistakes(plan.base) if item.text.startswith("sweep")]
    if wrong:
        raise ConfigError(wrong)
    return sweep_settings(**to_plain(plan.base.get("sweep") or {}))


def _uses_optuna(plan: Plan, settings: Mapping[str, Any]) -> bool:
    needs = [key for key in ("sampler", "pruner", "storage") if settings[key]]
    if not needs and not plan.draws:
        return False
    if not version_of("optuna"):
        what = f"sweep.{needs[0]}" if needs else "a range to draw from"
        raise ConfigError(f"dtrain sweep: {what} needs Optuna: pip install 'dtrain[optuna]'")
    return True


def trials(path: str, overrides: Sequence[str]) -> list[Trial]:
    """The trials of a grid; see `trials_of`."""
    return trials_of(plan_of(path, overrides))


def trials_of(plan: Plan) -> list[Trial]:
    """The trials of a grid, each with its config checked: all combinations of the values that keys have.

    Raises:
        ConfigError: With the mistakes of all trials.
    """
    lists = [values for values in plan.swept.values() if isinstance(values, list)]
    if (count := math.prod(map(len, lists))) > MOST:
        raise ConfigError(f"dtrain sweep: {count} trials are more than {MOST}")
    result = _checked(plan, [dict(zip(plan.swept, values, strict=True)) for values in product(*lists)])
    names = [trial.name for trial in result]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"dtrain sweep: two trials would be called {sorted(twice)[0]}")
    return result


def _first(plan: Plan) -> Trial:
    """The trial with the first value of each key, after each value of a list and both ends of ranges were checked."""
    ends = {key: _ends(values) for key, values in plan.swept.items()}
    first = {key: values[0] for key, values in ends.items()}
    return _checked(plan, [first | {key: value} for key, values in ends.items() for value in values])[0]


def _ends(values: list[str] | Draw) -> list[str]:
    if isinstance(values, list):
        return values
    return [str(int(end)) if values.is_integer else repr(end) for end in (values.low, values.high)]


def _checked(plan: Plan, combinations: Sequence[Mapping[str, str]]) -> list[Trial]:
    result: list[Trial] = []
    mistakes: dict[str, Mistake] = {}
    for values in combinations:
        try:
            result.append(plan.trial(values))
        except ConfigError as error:
            mistakes |= {str(item): item for item in error.mistakes}
    if mistakes:
        raise ConfigError(list(mistakes.values()))
    return result


def _how(plan: Plan, ranks: str | None, jobs: int | None) -> Settings:
    """How many trials at once, and on which GPUs."""
    if ranks is not None and ranks != "auto" and not (ranks.isdigit() and int(ranks)):
        raise ConfigError(f"--nproc-per-node {ranks}: expected a number from 1 on, or auto")
    device = plan.base.get("device") or "auto"
    gpus = visible_gpus() if device not in ("cpu", "mps") else []
    if not gpus:
        return Settings(ranks, jobs or 1, logs=plan.own_folder / "logs" if (jobs or 1) > 1 else None)
    if device not in ("auto", "cuda"):
        text = f"{shown(to_plain(device))} names GPUs, and a sweep gives each trial its own; leave it to auto"
        raise ConfigError(mistake(plan.base, ("device",), text))
    each = len(gpus) if ranks == "auto" else int(ranks or 1)
    if each > len(gpus):
        raise ConfigError(f"--nproc-per-node {ranks}: this machine shows {len(gpus)} GPU(s)")
    at_once = jobs or len(gpus) // each
    return Settings(ranks, at_once, each, GpuLocks(gpus), plan.own_folder / "logs" if at_once > 1 else None)


def _name_of(sampler: str | Mapping[str, Any] | None) -> str:
    return str(sampler["name"] if isinstance(sampler, dict) else sampler or "TPESampler")


@contextlib.contextmanager
def _alone(plan: Plan, uses_optuna: bool) -> Iterator[None]:
    """Holds the sweep's folder, which has the config that all trials share."""
    from filelock import Timeout

    plan.own_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_file(plan.own_folder / ".lock", 0.0))
        except Timeout:
            raise ConfigError(f"dtrain sweep: another one is at work in {plan.folder}") from None
        saved = RunFolder(plan.own_folder).config
        if saved.is_file() and uses_optuna and (found := differs(saved, plan.base)):
            cure = "another trainer.checkpoint_dir gives this sweep a folder of its own"
            raise ConfigError(f"dtrain sweep: {plan.folder} has trials of another training: {'; '.join(found)}; {cure}")
        write_text(saved, to_yaml(redacted_tree(to_plain(plan.base))))
        yield


def _run(plan: Plan, source: Grid | Study, how: Settings) -> int:
    """Trains what is left, and says what has become of all."""
    if source.is_done:
        return conclude(plan, source, False)
    at_work = TrialsAtWork(plan.path, how)
    journal = parent_run(plan)
    how.overrides = parent_override(plan, lambda: at_work.is_stopped)
    best = best_of(source.trials(), source.mode)
    for trial in at_work.run(source):
        best = best_of([best, trial] if best else [trial], source.mode) or best
        values = {source.figure: trial.score, f"best/{source.figure}": best.score if best else None}
        journal.log(source.done, {key: value for key, value in values.items() if value is not None})
    status = conclude(plan, source, at_work.is_stopped)
    for file in ("trials.csv", *(["best.yaml"] if best else [])):
        journal.artifact(file)
    endings = {DONE: ("FINISHED", ""), FAILED: ("FAILED", "trials have failed"), STOPPED_EARLY: ("KILLED", "stopped")}
    _finish(journal, *endings[status], status)
    return status


def _finish(journal: Any, *ending: Any) -> None:
    if hint := journal.finish(*ending):
        print(hint, flush=True)


def _submit(plan: Plan, own: Sequence[Trial], uses_optuna: bool, dry_run: bool) -> int:
    """As an array of jobs: those trials of a grid that are not finished."""
    from dtrain.launch.submit import submit

    if uses_optuna:
        text = "--submit is for a grid: what a sampler or a pruner decides, no batch system can know beforehand"
        raise ConfigError(f"{text}; submit several jobs of dtrain sweep with one sweep.storage, see docs/sweeps.md")
    left = [trial for trial in own if not trial.is_finished]
    if not left:
        print(f"all {len(own)} trials are finished; dtrain sweep without --submit shows them")
        return DONE
    array = {"array": [shlex.join(trial.overrides) for trial in left]}
    if dry_run:
        return submit(plan.path, plan.fixed, array, dry_run=True)
    with _alone(plan, uses_optuna):
        journal = parent_run(plan)
        status = submit(plan.path, [*plan.fixed, *parent_override(plan)], array)
        _finish(journal, "FINISHED" if status == DONE else "FAILED", "", status)
    return status
