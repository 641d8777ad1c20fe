"""The name of a run that the config does not name: the experiment, what was overridden, and the date."""

import re
import time
from collections.abc import Sequence

from dtrain.tracking.secrets import is_secret, redact

_LONGEST = 100  # characters; MLflow takes 250, a screen shows fewer
# Keys that say where, how long or how fast, which the run's other columns show better.
_SAYS_LITTLE = re.compile(
    r"(mlflow|trackers|cluster|device|experiment|run_name|modules|predictor)(\..*)?"
    r"|trainer\.(checkpoint_dir|resume|pictures|profile|hang_timeout_seconds|.*_every_.*|keep_.*)"
    r"|loaders\.(.*\.)?(num_workers|prefetch_factor|pin_memory|persistent_workers|timeout)"
)


def made_run_name(experiment: str, overrides: Sequence[str]) -> str:
    """`resnet-lr0.001-depth4-0728`: the experiment, the overrides of the command line in short, month and day."""
    told: dict[str, str] = {}  # of a key that is given twice, the last value counts
    for override in overrides:
        key, _, value = override.partition("=")
        if not _SAYS_LITTLE.fullmatch(key) and not is_secret(key, value):
            told.pop(key, None)
            told[key] = _short(key, redact(value))
    parts = [*filter(None, told.values())]
    date = time.strftime("%m%d")
    while len(name := "-".join([experiment, *parts, date])) > _LONGEST and parts:
        parts = [*parts[:-2], "and-more"] if len(parts) > 1 else []
    return name


def _short(key: str, value: str) -> str:
    """`lr0.001` of a number, `dropout-off` of a word; of a name the name alone."""
    last = key.rpartition(".")[2]
    text = re.sub(r"[^\w.+-]+", "-", value.strip().strip("'\"")).strip("-")
    if last == "name":
        return re.split(r"[.:-]", text)[-1]
    return f"{last}{text}" if re.match(r"\d|\.\d", text) else f"{last}-{text}".rstrip("-")
