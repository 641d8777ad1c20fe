"""A sweep by Optuna: its sampler chooses the values, its pruner ends trials, its storage outlives a kill."""

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from dtrain.config.build import build
from dtrain.config.errors import ConfigError, shown
from dtrain.config.schema import calls, refused
from dtrain.launch.sweep_values import Draw
from dtrain.launch.trial import Figures, Plan, Trial
from dtrain.tracking.secrets import redact

PATIENCE_SECONDS, PAUSE_SECONDS = 600.0, 5.0  # with a storage that does not answer, while trials are at work
Method = TypeVar("Method", bound=Callable[..., Any])
FOLDER = "dtrain.folder"  # the attribute of Optuna's trials that says where each lies


def _patient(method: Method) -> Method:
    """Tries again where the storage fails for a while: an error would end the trials that are at work."""

    @functools.wraps(method)
    def tried(*arguments: Any) -> Any:
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        end, is_told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                return method(*arguments)
            except (StorageInternalError, SQLAlchemyError) as error:
                if time.monotonic() > end:
                    raise
                if not is_told:
                    text = redact(str(error.__cause__ or error).splitlines()[0])
                    print(f"sweep: the study's storage fails, it is tried again: {text}", file=sys.stderr, flush=True)
                is_told = True
                time.sleep(PAUSE_SECONDS)

    return cast(Method, tried)


class Study:
    """The trials of one study. What it was told survives in its storage, so that a start after a kill continues.

    Args:
        plan: What is swept.
        rule: The figure that is monitored, and 'max' or 'min'.
        combinations: The values of each trial of a grid; without them `sampler` chooses.
        count: Of trials in all.
        storage: URL of a database. Default: sqlite in the sweep's folder.

    Raises:
        ConfigError: Nothing says what is best, the storage cannot be used, or it holds a study of something else.
    """

    def __init__(
        self,
        plan: Plan,
        rule: tuple[str, str | None],
        combinations: Sequence[Mapping[str, str]],
        count: int,
        storage: str | None,
    ) -> None:
        self.figure, self.mode = rule[0], known_mode(plan, rule[1])
        self._plan, self._combinations = plan, combinations
        self._is_shared = storage is not None
        self._count = len(combinations) or count
        self._figures: dict[str, Figures] = {}
        self._trials: dict[str, Any] = {}  # Optuna's, of those that were begun here, by name
        self._study = self._opened(storage or f"sqlite:///{plan.own_folder.absolute() / 'study.db'}")
        for values in combinations:
            self._study.enqueue_trial(dict(values), skip_if_exists=True)
        self._left = [each for each in self._found("RUNNING") if self._is_ours(each)]

    def _opened(self, storage: str) -> Any:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        described = calls(self._plan.base)
        sampler = build(self._plan.base, "sweep.sampler") if "sweep.sampler" in described else None
        pruner = build(self._plan.base, "sweep.pruner") if "sweep.pruner" in described else optuna.pruners.NopPruner()
        self._pruner = type(pruner).__name__
        name = str(self._plan.base.get("experiment"))
        directions = optuna.study.StudyDirection
        wanted = directions.MAXIMIZE if self.mode == "max" else directions.MINIMIZE
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, sampler=sampler, pruner=pruner,
                direction=wanted, load_if_exists=True,
            )  # fmt: skip
            known = study.get_trials(deepcopy=False)
        except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
            text = redact(f"{storage}: {str(error).splitlines()[0]}")
            raise refused(self._plan.base, ("sweep", "storage"), text) from None
        if wrong := self._difference(study.direction.name, wanted.name, known):
            text = f"{redact(storage)} has a study {shown(name)} of something else: {wrong}"
            cure = "another experiment or trainer.checkpoint_dir gives this one a study of its own"
            raise ConfigError(f"dtrain sweep: {text}; {cure}")
        if known:
            study.sampler.reseed_rng()  # else one with a seed would draw its first numbers again
        return study

    def _difference(self, direction: str, wanted: str, known: Sequence[Any]) -> str:
        """In what a study that is there differs; ranges may."""
        if direction != wanted:
            return f"it looks for the {direction[:3].lower()}imum"
        for each in known:
            for key, values in each.distributions.items():
                mine = self._plan.swept.get(key)
                choices = getattr(values, "choices", None)
                if mine is None or (choices is None) != isinstance(mine, Draw) or choices not in (None, _choices(mine)):
                    return f"{key} was {choices or f'from {values.low} to {values.high}'}"
        return ""

    @_patient
    def next(self) -> Trial | None:
        """One that an earlier start left, else a new one; one with a mistake in its config has failed at once."""
        import optuna

        while True:
            if self._left:
                # What `ask` returns, for a trial that was asked for before.
                own = optuna.trial.Trial(self._study, self._left.pop(0)._trial_id)
            elif self._asked() < self._count:
                own = self._study.ask()
            else:
                return None
            try:
                values = {key: _suggested(own, key, wanted) for key, wanted in self._plan.swept.items()}
            except ImportError as error:  # of a package that one sampler needs, such as cmaes
                self._study.tell(own, state=optuna.trial.TrialState.FAIL)
                raise refused(self._plan.base, ("sweep", "sampler"), f"{error}; install it") from None
            try:
                trial = self._plan.trial(values, self._number(own.number))
            except ConfigError as error:
                for item in error.mistakes:
                    print(f"sweep: trial {own.number} cannot be: {item}", file=sys.stderr, flush=True)
                self._study.tell(own, state=optuna.trial.TrialState.FAIL)
                continue
            own.set_user_attr(FOLDER, str(trial.folder.absolute()))
            self._trials[trial.name] = own
            self._figures[trial.name] = Figures(trial.folder, self.figure)
            return trial

    @_patient
    def is_behind(self, trial: Trial) -> str:
        """Reports new validations to Optuna, numbered from 1; why the pruner wants the trial to end, else ''."""
        figures, own = self._figures[trial.name], self._trials[trial.name]
        if not self._report(figures, own):
            return ""
        return f"pruned by {self._pruner} after validation {len(figures.values)}" if own.should_prune() else ""

    def _report(self, figures: Figures, own: Any) -> bool:
        """Whether there was anything new to report."""
        figures.read()
        if figures.reported == len(figures.values):
            return False
        known = self._study.get_trials(deepcopy=False)[own.number].intermediate_values
        for step, value in enumerate(figures.values, 1):
            if step not in known:
                own.report(value, step)
        figures.reported = len(figures.values)
        return True

    @_patient
    def ended(self, trial: Trial) -> None:
        """Tells Optuna; of one that was stopped early nothing, since it will be continued."""
        from optuna.trial import TrialState

        own = self._trials[trial.name]
        self._report(self._figures[trial.name], own)  # what it has still logged
        if trial.status == "finished" and trial.score is not None:
            self._study.tell(own, trial.score)
        elif trial.status == "pruned":
            self._study.tell(own, state=TrialState.PRUNED)
        elif trial.status != "stopped early":
            self._study.tell(own, state=TrialState.FAIL)
            trial.status = "failed (no finite score)" if trial.status == "finished" else trial.status

    @_patient
    def trials(self) -> list[Trial]:
        """All of them, as the storage has them; those of other machines, too."""
        return [*self._read()]

    @property
    def total(self) -> int:
        """How many trials there are to be."""
        return self._count

    @property
    @_patient
    def done(self) -> int:
        """How many have ended, other than stopped early; on all machines."""
        return len(self._found("COMPLETE", "PRUNED", "FAIL"))

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to be trained."""
        return not self._left and self._asked() >= self._count

    def _read(self) -> Iterator[Trial]:
        words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "stopped early"}
        for each in self._found(*words):
            values = {key: _as_text(value, self._plan.swept[key]) for key, value in each.params.items()}
            trial = self._plan.trial(values, self._number(each.number), has_run=True)
            trial.status = words[each.state.name]
            if each.state.name == "RUNNING" and not self._is_ours(each):
                trial.status = "elsewhere"
            scores = [*each.intermediate_values.values()]
            best = (max if self.mode == "max" else min)(scores, default=None)
            trial.score = each.value if each.state.name == "COMPLETE" else best
            yield trial

    def _found(self, *states: str) -> list[Any]:
        return [each for each in self._study.get_trials(deepcopy=False) if each.state.name in states]

    def _asked(self) -> int:
        return len(self._found("COMPLETE", "PRUNED", "FAIL", "RUNNING"))

    def _is_ours(self, each: Any) -> bool:
        """Whether a trial that is running was begun in this folder; without one, by whom, if nobody else could."""
        folder = each.user_attrs.get(FOLDER)
        if folder is None:
            return not self._is_shared
        return Path(folder).parent == self._plan.folder.absolute()

    def _number(self, number: int) -> int | None:
        return None if self._combinations else number


def known_mode(plan: Plan, mode: str | None) -> str:
    """The direction, which must be known before the first trial; there must be a validation, too."""
    if not (plan.base.get("loaders") or {}).get("val"):
        raise refused(plan.base, ("loaders",), "no 'val': a sweep that samples or prunes compares validations")
    if mode is None:
        text = "missing: only the metric, once it is built, says whether more is better; add mode: max or mode: min"
        raise refused(plan.base, ("trainer", "mode"), text)
    return mode


def _choices(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _suggested(own: Any, key: str, wanted: list[str] | Draw) -> str:
    """The value that a trial is to have, as it is written in YAML."""
    if not isinstance(wanted, Draw):
        return str(own.suggest_categorical(key, _choices(wanted)))
    if wanted.is_integer:
        step = int(wanted.step or 1)
        return str(own.suggest_int(key, int(wanted.low), int(wanted.high), step=step, log=wanted.is_log))
    return repr(own.suggest_float(key, wanted.low, wanted.high, step=wanted.step, log=wanted.is_log))


def _as_text(value: Any, wanted: list[str] | Draw) -> str:
    return value if isinstance(value, str) else str(int(value)) if _is_integer(wanted) else repr(float(value))


def _is_integer(wanted: list[str] | Draw) -> bool:
    return isinstance(wanted, Draw) and wanted.is_integer
