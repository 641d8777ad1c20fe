"""What the config says of metrics beyond their signatures: the one monitored, which way is better, task, classes."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, Mistake, first_few, is_mapping, shown
from dtrain.config.schema import Call, mistake, own_loop, set_names
from dtrain.config.signatures import SOURCE, Callee
from dtrain.config.task import COUNTS, count_argument, takes_task

VOLUMES = "volume/"  # in the names of what a validation of whole volumes gives


class Monitored(NamedTuple):
    """The figure that 'best' means: `<kind>/<label>`, or with a part `<label>_<part>`; see `kinds_of_validation`."""

    figure: str
    label: str  # of a metric, or 'loss'
    part: str  # of a vector, a dict or a loss's terms


CONFUSION = "confusionmatrix"  # in a metric's label or class, in small letters: its matrix is a table, not figures


def monitored(
    wish: str | None, labels: list[str], kinds: Sequence[str] = ("val",), has_own_figures: bool = False
) -> Monitored | None:
    """What a `trainer.monitor` means where the metrics have these labels; None where no metric's name begins it.

    Default: the first metric that gives figures, else the loss, of the first of the validation's kinds. With figures of
    its own an evaluation may give any.
    """
    if wish is None:
        wish = f"{kinds[0]}/{next(label for label in (*labels, 'loss') if CONFUSION not in label.lower())}"
    wish = f"val/{wish.removeprefix('val/')}"
    kind = next((kind for kind in kinds if wish.startswith(f"{kind}/")), None)
    if kind is None:
        return None
    name = wish.removeprefix(f"{kind}/")
    fitting = [label for label in (*labels, "loss") if name == label or name.startswith(f"{label}_")]
    label = max(fitting, key=len, default=None)
    if label is None and has_own_figures:
        return Monitored(wish, name, "")
    return None if label is None else Monitored(wish, label, name[len(label) + 1 :])


def can_be_monitored(labels: Iterable[str], kinds: Iterable[str]) -> list[str]:
    """The figures that there surely are."""
    return [f"{kind}/{label}" for kind in kinds for label in (*labels, "loss")]


def measures_itself(config: ConfigDict) -> bool:
    """Whether the trainer's class may give figures of its own in a validation."""
    return bool(own_loop(config) & {"evaluation_step", "evaluate", "validate"})


def labels_of(calls: Mapping[str, Call]) -> list[str]:
    """The names under which the metrics are logged."""
    return [key.removeprefix("metrics.") for key in calls if key.startswith("metrics.")]


def kinds_of_validation(calls: Mapping[str, Call]) -> list[str]:
    """What stands before a figure's name: each of the validation's sets, of whole volumes with VOLUMES behind it.

    Of a set, volumes come first; the first of all is what 'best' is judged by, unless `monitor` names another.
    """
    return [kind for name in set_names(calls, "val") or ["val"] for kind in _kinds_of_set(calls, name)]


def _kinds_of_set(calls: Mapping[str, Call], name: str) -> list[str]:
    loader = calls.get(f"loaders.{name}.loader")
    wishes = loader.arguments if loader else {}
    if not wishes.get("whole_volumes"):
        return [name]
    every, of_volumes = wishes.get("every_epochs"), f"{name}/{VOLUMES}".rstrip("/")
    return [of_volumes, name] if isinstance(every, int) and every > 1 else [of_volumes]


def monitor_mistakes(config: ConfigDict, calls: Mapping[str, Call], trains: bool) -> Iterator[Mistake]:
    """A `trainer.monitor` that no validation gives, or no `trainer.mode` where the metric does not say what is better.

    As far as it can be known without building a metric.
    """
    wish, mode = (_of_trainer(calls, key) for key in ("monitor", "mode"))
    if wish is not None and not isinstance(wish, str):
        return  # a wrong type, which is reported, or a subclass's own affair
    kinds = kinds_of_validation(calls)
    figure = monitored(wish, labels_of(calls), kinds, measures_itself(config))
    if figure is None:
        known = can_be_monitored(labels_of(calls), kinds)
        hint = did_you_mean(f"val/{str(wish).removeprefix('val/')}", known)
        text = f"{shown(wish)} is not a metric of the validation{hint}; possible: {', '.join(known)}"
        yield mistake(config, ("trainer", "monitor"), text)
    elif mode is None and trains and higher_is_better(calls, figure) is None:
        yield mistake(config, ("trainer", "mode"), mode_text(calls, figure))


def best_rule(config: ConfigDict, calls: Mapping[str, Call]) -> tuple[str, str | None]:
    """The figure by which a training's best is chosen, and whether 'max' or 'min' of it; None: only the metric can say.

    Of a config that has been checked, without building anything.
    """
    wish, mode = (_of_trainer(calls, key) for key in ("monitor", "mode"))
    wish = wish if isinstance(wish, str) else None
    figure = monitored(wish, labels_of(calls), kinds_of_validation(calls), measures_itself(config))
    if figure is None:
        return str(wish), None
    said = {True: "max", False: "min"}.get(higher_is_better(calls, figure))
    return figure.figure, mode if mode in ("min", "max") else said


def task_mistakes(config: ConfigDict, calls: Mapping[str, Call]) -> Iterator[Mistake]:
    """Metrics by task that lack their number of classes, which is not certain either."""
    for key in (f"metrics.{label}" for label in labels_of(calls)):
        with suppress(ConfigError):  # reported elsewhere
            call = calls[key]
            if isinstance(call.target, Callee) and takes_task(call.target):
                count = count_argument(call.target, call.arguments)
                if count and call.arguments.get(count) is None:
                    text = f"{call.target.name} needs {count} for task: {call.arguments['task']}"
                    yield mistake(config, call.path, f"{text}; neither model nor loss says it for certain, so add it")


def task_notes(calls: Mapping[str, Call]) -> Iterator[str]:
    """What metrics were given that the config does not say of them."""
    for key in (f"metrics.{label}" for label in labels_of(calls)):
        if calls[key].filled:
            given = ", ".join(f"{name}: {calls[key].arguments[name]}" for name in ("task", *COUNTS.values())
                              if name in calls[key].filled)  # fmt: skip
            yield f"{key}: {given}, as the loss and the model have it"


def mode_notes(config: ConfigDict, calls: Mapping[str, Call]) -> Iterator[str]:
    """Where a `mode` of the config contradicts what the monitored metric says of itself; the config's holds."""
    wish, mode = (_of_trainer(calls, key) for key in ("monitor", "mode"))
    is_known = wish is None or isinstance(wish, str)
    figure = monitored(wish, labels_of(calls), kinds_of_validation(calls)) if is_known else None
    said = {True: "max", False: "min"}.get(higher_is_better(calls, figure)) if figure else None
    if figure and said and mode in ("min", "max") and mode != said:
        yield f"trainer.mode: {mode}, though by what the metric itself says it is {said} for {figure.figure}"
    scheduler = config.get("lr_scheduler")
    own = scheduler.get("mode") if is_mapping(scheduler) and scheduler.get("name") == "ReduceLROnPlateau" else None
    best = mode if mode in ("min", "max") else said
    if figure and own and best and own != best:
        yield f"lr_scheduler.mode: {own}, though the best {figure.figure} is its {best}imum"


def not_given(monitor: str, given: Iterable[str]) -> str:
    """That a validation, which was made, does not give the figure that is monitored."""
    names = list(given)
    if monitor.endswith("/loss") and not any(name.endswith("/loss") for name in names):
        text = f"trainer.monitor: the model computes no loss in eval mode, so {monitor!r} cannot say which is best"
        return f"{text}; " + (f"possible: {first_few(names, 30)}" if names else "add metrics and monitor one")
    hint = did_you_mean(monitor, names)
    return f"trainer.monitor: the validation gives no {monitor!r}{hint}; possible: {first_few(names, 30)}"


def mode_text(calls: Mapping[str, Call], figure: Monitored) -> str:
    """What is asked of the user where nothing says whether more of a figure is better."""
    if f"metrics.{figure.label}" not in calls:
        return (
            f"missing: nothing says whether a higher or a lower {figure.figure} is better; add mode: max or mode: min"
        )
    text = f"missing: {calls[f'metrics.{figure.label}'].name} does not say whether a higher or a lower {figure.figure}"
    cure = "add mode: max or mode: min, give the metric higher_is_better = True or False"
    return f"{text} is better; {cure}, or monitor another figure, such as monitor: val/loss"


def higher_is_better(calls: Mapping[str, Call], figure: Monitored) -> Any:
    """Whether more of a figure is better, from its metric's source; None: nothing says so.

    `...` where only the metric itself can tell, once it is built.
    """
    if figure.label == "loss":
        return False
    if f"metrics.{figure.label}" not in calls:  # a figure of an evaluation_step
        return False if figure.label.lower().endswith("loss") else None
    call = calls[f"metrics.{figure.label}"]
    try:
        target = call.target
    except ConfigError:
        return ...  # reported elsewhere
    said = SOURCE.attribute(target.module, target.name, "higher_is_better")
    if isinstance(said, dict):  # of a metric that returns one
        said = said.get(figure.part)
    if said is None and (call.components or not isinstance(target, Callee) or _is_factory(call, target)):
        return ...
    if said is None and any(name.lower().endswith("loss") for name in (target.name, figure.label)):
        return False
    return said


def _is_factory(call: Call, callee: Callee) -> bool:
    """Whether a function makes a metric, rather than being one: a function of output and target has both left open."""
    left_open = [item for item in callee.positional[:2] if item.default is None and item.name not in call.arguments]
    return not callee.is_class and len(left_open) < 2


def _of_trainer(calls: Mapping[str, Call], key: str) -> Any:
    """A setting of the trainer, else its default, which a subclass may have changed; `...` where it cannot be read."""
    call = calls.get("trainer")
    if call is None or key in call.arguments:
        return call.arguments[key] if call else None
    with suppress(ConfigError, ValueError, SyntaxError):
        found = (item for item in getattr(call.target, "parameters", ()) if item.name == key and item.default)
        return next((ast.literal_eval(str(item.default)) for item in found), ...)
    return ...
