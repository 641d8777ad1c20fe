"""What no signature can say of a config: the sections that a purpose needs, ranges of numbers, exclusive settings."""

import ast
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import correction, expectation
from dtrain.config.errors import KeyPath, Mistake, did_you_mean, found, is_mapping, shown
from dtrain.config.schema import PHASES, SLOTS, Call, mistake

MAX_NAME_BYTES = 200  # a moved-aside run folder has a time stamp, too, and file systems take 255; MLflow 250
TOP_LEVEL = {  # the keys of a config with their types; those without one are checked elsewhere
    "experiment": "str | None",
    "run_name": "str | None",
    "seed": "int | None",
    "device": "str",
    "modules": "",
    **dict.fromkeys((*SLOTS, "trainer", "mlflow", "predictor", "cluster"), ""),
}
REQUIRED = {  # what training needs, and an example of each
    "model": "{name: ViT, ...}",
    "loaders": "{name: Digits, batch_size: 64, train: {split: train}}",
    "loss": "{name: CrossEntropyLoss}",
    "optimizer": "{name: AdamW, lr: 1e-3}",
}
PURPOSES = {  # what a config is used for: the sections that it needs, and one of the phases
    "train": (("model", "loaders", "loss", "optimizer"), ("train",)),
    "test": (("model", "loaders"), ("test",)),
    "predict": (("model", "loaders"), ("predict", "test")),
}
_ANY, _SOME, _PART = (0, math.inf), (1, math.inf), (0, 1)
RANGES: dict[str, dict[str, tuple[float, float]]] = {  # where the type alone admits more
    "": {"seed": _ANY},
    "trainer": {
        "max_epochs": _ANY, "max_steps": _ANY, "accumulate": _SOME, "log_every_steps": _SOME,
        "validate_every_steps": _SOME, "checkpoint_every_steps": _SOME, "keep_last": _SOME, "keep_best": _ANY,
        "checkpoint_every_minutes": _ANY, "hang_timeout_seconds": _ANY,
        "early_stop_patience": _SOME, "clip_grad_norm": _ANY, "ema_decay": _PART,
    },
    "loaders": {
        "batch_size": _SOME, "global_batch_size": _SOME, "num_workers": _ANY, "prefetch_factor": _SOME, "timeout": _ANY,
    },
    "lr_scheduler": {"warmup_steps": _ANY, "warmup_start": _ANY},
    "mlflow": {"exit_timeout_seconds": _ANY},
    "cluster": {
        "gpus_per_node": _ANY, "nproc_per_node": _SOME, "cpus_per_node": _SOME, "signal_seconds": _SOME,
    },
    "predictor": {
        "batch_size": _SOME, "prediction_channel": _ANY, "connectivity": (1, 3), "min_size": _ANY, "slab_planes": _SOME,
    },
}  # fmt: skip


def top_level_mistakes(config: ConfigDict) -> list[Mistake]:
    """Unknown sections, and wrong values of the keys that are no sections."""
    mistakes = []
    for key in config:
        if key not in TOP_LEVEL:
            text = f"unknown section{did_you_mean(key, TOP_LEVEL)}; possible: {', '.join(TOP_LEVEL)}"
            mistakes.append(mistake(config, (key,), text))
        elif TOP_LEVEL[key]:
            annotation = ast.parse(TOP_LEVEL[key], mode="eval").body
            if expected := expectation(config[key], annotation):
                text = f"expected {expected}, {found(config[key])}{correction(config[key], annotation)}"
                mistakes.append(mistake(config, (key,), text))
    device = config.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        text = f"{shown(device)} is not a device; possible: auto, cpu, cuda, cuda:N, mps"
        mistakes.append(mistake(config, ("device",), text))
    return mistakes


def monitor_mistakes(config: ConfigDict, calls: Mapping[str, Call]) -> list[Mistake]:
    """A `trainer.monitor` that no validation gives, where that can be known without building a metric."""
    monitor = _at(config.get("trainer"), "monitor")
    if not isinstance(monitor, str):
        return []
    labels = [key.removeprefix("metrics.") for key in calls if key.startswith("metrics.")]
    known = [f"val/{label}" for label in (*labels, "loss")]
    wanted = monitor if monitor.startswith("val/") else f"val/{monitor}"
    if any(wanted == name or wanted.startswith(f"{name}_") for name in known):  # an element of a vector, a loss's term
        return []
    hint = did_you_mean(wanted, known)
    text = f"{shown(monitor)} is not a metric of the validation{hint}; possible: {', '.join(known)}"
    return [mistake(config, ("trainer", "monitor"), text)]


def value_mistakes(config: ConfigDict) -> list[Mistake]:
    """Values of the right type that cannot be: numbers out of range, two batch sizes, MLflow's old `file:` stores."""
    mistakes = []
    for section, ranges in RANGES.items():
        values = config.get(section) if section else config
        path: KeyPath = (section,) if section else ()
        for where, mapping in [(path, values), *(((*path, phase), _at(values, phase)) for phase in PHASES)]:
            for key, (least, most) in ranges.items():
                value = _at(mapping, key)
                if type(value) in (int, float) and not least <= value <= most:
                    possible = f"from {least} to {most}" if most < math.inf else f"at least {least}"
                    mistakes.append(mistake(config, (*where, key), f"must be {possible}, found {value}"))
            if _at(mapping, "batch_size") is not None and _at(mapping, "global_batch_size") is not None:
                text = "cannot be combined with 'batch_size'; keep one of them, or set the other to null"
                mistakes.append(mistake(config, (*where, "global_batch_size"), text))
    uri = _at(config.get("mlflow"), "tracking_uri")
    if isinstance(uri, str) and uri.lower().startswith("file:"):
        text = f"MLflow 3 no longer writes to {shown(uri)}; name the folder alone (sqlite is put in it), or a server"
        mistakes.append(mistake(config, ("mlflow", "tracking_uri"), text))
    return mistakes


def strategy_mistakes(config: ConfigDict, options: Any) -> list[Mistake]:
    """What cannot be combined with `trainer.strategy`.

    Args:
        config: The whole config.
        options: What it has under `trainer`, and what came from elsewhere.
    """
    strategy = _at(options, "strategy")
    if strategy != "fsdp":
        is_set = strategy == "ddp" and any(value is not None for value in _mapping_at(options, "fsdp").values())
        text = "applies only with `trainer.strategy: fsdp`"
        return [mistake(config, ("trainer", "fsdp"), text)] if is_set else []
    unfit = {
        "compile": "is not possible with a sharded model (strategy: fsdp)",
        "sync_batchnorm": "has not been tried with a sharded model (strategy: fsdp)",
    }
    mistakes = [mistake(config, ("trainer", key), text) for key, text in unfit.items() if _at(options, key)]
    if _at(options, "precision") == "fp16":
        text = "fp16 needs its gradients scaled, which is not possible with strategy: fsdp; possible: bf16, fp32"
        mistakes.append(mistake(config, ("trainer", "precision"), text))
    possible = ("backend", "timeout_seconds", "broadcast_buffers")
    text = f"is an option of DistributedDataParallel; possible with strategy: fsdp: {', '.join(possible)}"
    for key, value in _mapping_at(options, "ddp").items():
        if value is not None and key not in possible:
            mistakes.append(mistake(config, ("trainer", "ddp", key), text))
    return mistakes


def name_mistakes(config: ConfigDict) -> list[Mistake]:
    """Names that MLflow, a log line or a file system could not hold, and an experiment whose folder would leave runs/.

    With a `checkpoint_dir` of its own an experiment is no folder, but the next config of the same name may lack it.
    """
    names: dict[KeyPath, Any] = {("experiment",): config.get("experiment"), ("run_name",): config.get("run_name")}
    names["trainer", "checkpoint_dir"] = _at(config.get("trainer"), "checkpoint_dir")
    mistakes = []
    for path, name in names.items():
        if isinstance(name, str) and (text := _name_mistake(path, name)):
            mistakes.append(mistake(config, path, text))
    return mistakes


def _name_mistake(path: KeyPath, name: str) -> str:
    size = len(name.encode("utf-8", "replace"))
    if not name.isprintable():
        return f"must be one line of printable characters, found {shown(name)}"
    if path[-1] == "checkpoint_dir":
        too_long = any(len(part.encode()) > MAX_NAME_BYTES for part in Path(name).parts)
        return (
            f"must have at most {MAX_NAME_BYTES} bytes in each folder's name, found {shown(name)}" if too_long else ""
        )
    if size > MAX_NAME_BYTES:
        return f"must have at most {MAX_NAME_BYTES} bytes, found {size}: {shown(name)}"
    if path[-1] == "experiment" and ".." in Path(name).parts:
        return f"must not contain '..': it names the run folder where there is no trainer.checkpoint_dir; {found(name)}"
    return ""


def missing_mistakes(config: ConfigDict, purpose: str | None) -> list[Mistake]:
    """What a training, a test or a prediction cannot do without; of no purpose, what the data are for."""
    loaders, trainer = config.get("loaders"), config.get("trainer")
    purpose = purpose or next((phase for phase in ("train", "predict", "test") if _at(loaders, phase)), "train")
    sections, phases = PURPOSES[purpose]
    missing = [name for name in sections if config.get(name) is None]
    if purpose == "test" and config.get("loss") is None and config.get("metrics") is None:
        missing.append("loss")
    mistakes = [mistake(config, (name,), f"missing, such as {name}: {REQUIRED[name]}") for name in missing]
    if is_mapping(loaders) and all(loaders.get(phase) is None for phase in phases):
        text = f"has no {' and no '.join(map(repr, phases))}, so there is nothing to {purpose}"
        mistakes.append(mistake(config, ("loaders",), text + ("" if purpose == "predict" else " on")))
    no_limit = _at(trainer, "max_epochs") is None and _at(trainer, "max_steps") is None
    if purpose == "train" and no_limit and (trainer is None or is_mapping(trainer)):
        mistakes.append(mistake(config, ("trainer",), "needs max_epochs or max_steps, such as max_epochs: 10"))
    return mistakes


def _at(values: Any, key: str) -> Any:
    return values.get(key) if is_mapping(values) else None


def _mapping_at(values: Any, key: str) -> Mapping[str, Any]:
    value = _at(values, key)
    return value if is_mapping(value) else {}
