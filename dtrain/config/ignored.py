"""Compares which label the data mark as one that does not count with the one that losses and metrics leave out."""

from collections.abc import Iterator, Mapping

from dtrain.config.errors import ConfigError, dotted
from dtrain.config.schema import Call
from dtrain.config.signatures import Callee

KEY = "ignore_index"


def ignored_differently(calls: Mapping[str, Call]) -> Iterator[str]:
    """A line for each loss and metric that could leave out the label that the data mark, and does not."""
    marked = [call.arguments.get(KEY) for key, call in calls.items() if key.startswith("loaders.")]
    of_data = sorted({value for value in marked if type(value) is int})
    if not of_data:
        return
    for key, call in calls.items():
        if key == "loss" or key.startswith("metrics."):
            yield from _lines(call, of_data)


def _lines(call: Call, of_data: list[int]) -> Iterator[str]:
    """Of a call that leaves the label out, nothing: what is inside, it passes only what is left."""
    default = _default(call)
    own = call.arguments.get(KEY, default)
    if str(own) in map(str, of_data):
        return
    inside = [item for item in call.components.values() if _default(item) is not None]
    for item in inside:
        yield from _lines(item, of_data)
    if default is None or inside:
        return
    labels, where = " and ".join(map(str, of_data)), "as given" if KEY in call.arguments else "its default"
    cure = f"{KEY}: {of_data[0]} belongs there, unless the transforms change these labels"
    yield (
        f"{dotted(call.path)}: {call.name} has the {KEY} {own} ({where}), the data {labels} (loaders.{KEY}): "
        f"it does not leave these voxels out; {cure}"
    )


def _default(call: Call) -> str | None:
    """The source text of the default of `ignore_index`; None where there is no such argument."""
    try:
        target = call.target
    except ConfigError:
        return None  # reported by itself
    parameters = target.parameters if isinstance(target, Callee) else ()
    return next((item.default or "missing" for item in parameters if item.name == KEY), None)
