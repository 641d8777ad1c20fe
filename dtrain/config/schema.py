"""The shape of each section: which calls (a name and arguments) it describes. Knows no object."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, KeyPath, Mistake, dotted, found, is_mapping, nearest
from dtrain.config.load import place_of
from dtrain.config.signatures import SOURCE, Callee

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Slot:
    """What a section of one kind may name: where bare names are looked up, and what dtrain itself supplies."""

    libraries: tuple[str, ...] = ()
    given: str = ""  # the argument that dtrain supplies: of this name, else the first one
    given_names: frozenset[str] = NONE  # keyword arguments that dtrain supplies
    pairs: bool = False  # a function of (output, target) is itself what is wanted
    nested: bool = False  # inside another call: any section's library will do, and a function that lacks arguments is
    # itself what is wanted


SLOTS = {
    "model": Slot(
        (
            "dtrain.components.models", "torch.nn",
            "monai.networks.nets", "vit_pytorch.vit", "pytorch3dunet.unet3d.model", "torchvision.models",
        )
    ),
    "loaders": Slot(
        (
            "dtrain.components.datasets", "dtrain.components.transforms", "torch.utils.data",
            "monai.transforms", "monai.data", "torchvision.transforms", "torchvision.datasets",
        )
    ),
    "loss": Slot(
        ("dtrain.components.losses", "torch.nn", "torch.nn.functional", "monai.losses"), pairs=True
    ),
    "metrics": Slot(
        (
            "dtrain.components.metrics", "torchmetrics", "torchmetrics.classification", "torchmetrics.segmentation",
            "torchmetrics.functional", "monai.metrics",
        ),
        pairs=True,
    ),
    "optimizer": Slot(("torch.optim",), given="params"),
    "lr_scheduler": Slot(("torch.optim.lr_scheduler",), given="optimizer"),
}  # fmt: skip
EVERYWHERE = tuple(dict.fromkeys(library for slot in SLOTS.values() for library in slot.libraries))

# The settings of dtrain's own rooms are arguments of these functions, so they are checked like everything else.
HOUSE = {
    "trainer": ("Trainer", Slot(("dtrain.trainer",), given="parts")),
    "mlflow": (
        "Journal",
        Slot(("dtrain.tracking.journal",), given_names=frozenset({"folder", "experiment", "run_name", "sender"})),
    ),
    "loader": ("loader_settings", Slot(("dtrain.dataloader",))),
    "ddp": ("ddp_options", Slot(("dtrain.distributed.ddp",))),
    "fsdp": ("fsdp_options", Slot(("dtrain.distributed.fsdp",))),
    "pictures": ("picture_settings", Slot(("dtrain.reporting.validation_pictures",))),
    "pre_trained": ("weight_settings", Slot(("dtrain.checkpoint.weights",))),
    "predictor": ("Predictor", Slot(("dtrain.predict.predictor",))),
    "cluster": ("cluster_settings", Slot(("dtrain.launch.submit",))),
    "schedule": ("schedule_settings", Slot(("dtrain.training.schedule",))),
}
# The schedules whose length dtrain fills in where the config leaves it out: it knows it, and PolynomialLR's default
# of 5 is nobody's wish.
FILLED = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "PolynomialLR": "total_iters"}
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
PHASES = ("train", "val", "test", "predict")
TOP_LEVEL = {  # the keys of a config with their types; those without one are looked at elsewhere
    "experiment": "str | None",
    "run_name": "str | None",
    "seed": "int | None",
    "device": "str",
    "modules": "",
    **dict.fromkeys((*SLOTS, "trainer", "mlflow", "predictor", "cluster"), ""),
}


@dataclass(frozen=True)
class Call:
    """A call written in YAML: a name, arguments, and where each of them stands in the config."""

    path: KeyPath
    slot: Slot
    name: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)
    shared: frozenset[str] = NONE  # arguments meant for several calls: dropped where the callee takes none
    others: frozenset[str] = NONE  # what else may stand in this section; for 'did you mean'
    filled: frozenset[str] = NONE  # arguments that dtrain fills where the config leaves them out

    def path_of(self, argument: str) -> KeyPath:
        """Where an argument stands in the config."""
        return self.paths.get(argument, (*self.path, argument))


Wrong = list[Mistake]


def calls(config: ConfigDict, only: str | None = None) -> dict[str, Call]:
    """Every call that the config's sections describe, by section: 'model', 'loaders.train', 'metrics.Accuracy', ...

    Args:
        config: The whole config.
        only: Read this one section only.

    Raises:
        ConfigError: A section has not the shape of a call.
    """
    wrong: Wrong = []
    result = read_calls(config, wrong, only)
    if wrong:
        raise ConfigError(wrong)
    return result


def read_calls(config: ConfigDict, wrong: Wrong, only: str | None = None) -> dict[str, Call]:
    """The same for those calls that can be read; the mistakes in the others' shape are added to `wrong`."""
    result: dict[str, Call] = {}
    for section in READERS if only is None else (only,):
        if config.get(section) is not None or section in HOUSE:
            result |= READERS[section](config, section, wrong)
    return result


def mistake(config: ConfigDict, path: KeyPath, text: str) -> Mistake:
    """A mistake at a key, with the key's name in front and its place."""
    return Mistake(f"{dotted(path)}: {text}", place_of(config, path))


def refused(config: ConfigDict, path: KeyPath, text: str) -> ConfigError:
    """The error with that one mistake."""
    return ConfigError(mistake(config, path, text))


def _mapping(config: ConfigDict, path: KeyPath, value: Any, wrong: Wrong) -> Mapping[str, Any] | None:
    """The value if it is a mapping ({} for null); else a mistake."""
    if value is None or is_mapping(value):
        return {} if value is None else value
    wrong.append(mistake(config, path, f"expected a mapping, {found(value)}"))
    return None


def _named(config: ConfigDict, path: KeyPath, values: Mapping[str, Any], wrong: Wrong) -> bool:
    """Whether it has a name; else a mistake."""
    if "name" in values:
        return True
    known = ", ".join(map(str, values)) or "nothing"
    near = nearest("name", map(str, values), 1)
    hint = f"; was 'name' meant by '{near[0]}'?" if near else ""
    wrong.append(mistake(config, path, f"has no 'name', so nothing says what to build (found: {known}){hint}"))
    return False


def call_at(path: KeyPath, values: Mapping[str, Any], slot: Slot) -> Call:
    """The call that a mapping with a `name` describes."""
    return Call(path, slot, values["name"], {key: values[key] for key in values if key != "name"})


def _plain_call(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    values = _mapping(config, (section,), config.get(section), wrong)
    if values is None or not _named(config, (section,), values, wrong):
        return {}
    return {section: call_at((section,), values, SLOTS[section])}


def _settings_call(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    values = _mapping(config, (section,), config.get(section), wrong)
    return {} if values is None else {section: _house_call((section,), section, values)}


def _trainer_calls(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    """The trainer's settings; `name` may name another trainer than dtrain's."""
    values = _mapping(config, (section,), config.get(section), wrong)
    if values is None:
        return {}
    own = _house_call((section,), section, {key: values[key] for key in values if key != "name"})
    if values.get("name") is not None:
        own = replace(own, name=values["name"])
    parts = {key: values.get(key) or {} for key in ("ddp", "fsdp", "pictures")}
    if is_mapping(values.get("pre_trained")):  # a path alone, else
        parts["pre_trained"] = values["pre_trained"]
    return {section: own} | {
        f"{section}.{key}": _house_call((section, key), key, part) for key, part in parts.items() if is_mapping(part)
    }


def _house_call(path: KeyPath, house: str, values: Mapping[str, Any]) -> Call:
    """A call of one of dtrain's own functions."""
    name, slot = HOUSE[house]
    return Call(path, slot, f"{slot.libraries[0]}:{name}", {key: values[key] for key in values})


def _split(path: KeyPath, values: Mapping[str, Any], house: str) -> tuple[dict[str, Any], Call]:
    """Take the keys that one of dtrain's own functions takes out of a section; returns the others and that call."""
    settings = _settings(house)
    rest = {key: values[key] for key in values if key not in settings}
    return rest, _house_call(path, house, {key: values[key] for key in values if key in settings})


@functools.cache
def _settings(house: str) -> frozenset[str]:
    """The keys that one of dtrain's own functions takes."""
    name, slot = HOUSE[house]
    callee = SOURCE.lookup(slot.libraries[0], name)
    assert isinstance(callee, Callee), f"{slot.libraries[0]}:{name} cannot be read"
    return frozenset(item.name for item in callee.parameters)


def _loader_calls(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    """For each phase its dataset and its loader; keys beside the phases go to all of them, a phase's own keys win."""
    values = _mapping(config, (section,), config.get(section), wrong)
    if values is None:
        return {}
    shared = {key: values[key] for key in values if key not in PHASES}
    phases = {phase: values[phase] for phase in PHASES if values.get(phase) is not None}
    named = any(is_mapping(own) and "name" in own for own in phases.values())
    result: dict[str, Call] = {}
    for phase in phases:
        own = _mapping(config, (section, phase), phases[phase], wrong)
        if own is None:
            continue
        merged = shared | {key: own[key] for key in own}
        for key, other in (("batch_size", "global_batch_size"), ("global_batch_size", "batch_size")):
            if own.get(key) is not None and other not in own:
                merged.pop(other, None)  # two ways to say one thing: here, too, the phase's own wins
        paths = {key: (section, phase, key) if key in own else (section, key) for key in merged}
        rest, loader = _split((section, phase), merged, "loader")
        result[f"loaders.{phase}.loader"] = replace(loader, paths=paths)
        if _named(config, (section, phase) if named else (section,), rest if named else values, wrong):
            dataset = call_at((section, phase), rest, SLOTS["loaders"])
            result[f"loaders.{phase}"] = replace(dataset, paths=paths, others=_settings("loader"))
    return result


def _scheduler_calls(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    values = _mapping(config, (section,), config.get(section), wrong)
    if values is None:
        return {}
    rest, schedule = _split((section,), values, "schedule")
    result = {f"{section}.schedule": schedule}
    if _named(config, (section,), values, wrong):
        call = call_at((section,), rest, SLOTS[section])
        filled = FILLED.get(re.split(r"[.:]", str(call.name))[-1])
        result[section] = replace(call, others=_settings("schedule"), filled=frozenset({filled} if filled else ()))
    return result


def _metric_calls(config: ConfigDict, section: str, wrong: Wrong) -> dict[str, Call]:
    """`{name: A}`, `{name: [A, B], shared: 1, B: {own: 2}}`, `{label: {name: A}}` or `[{name: A}, {name: B}]`."""
    value = config.get(section)
    listed = list(enumerate(value)) if isinstance(value, list) else None
    values = {} if listed is not None else _mapping(config, (section,), value, wrong)
    if values is None:
        return {}
    if "name" in values:
        return _metrics_by_name(config, section, values, wrong)
    if listed is None and values and not any(map(is_component, values.values())):
        _named(config, (section,), values, wrong)
        return {}
    found_calls: dict[str | int, Call] = {}
    for key, item in listed if listed is not None else values.items():
        own = _mapping(config, (section, key), item, wrong)
        if own is not None and _named(config, (section, key), own, wrong):
            found_calls[key] = call_at((section, key), own, SLOTS[section])
    if listed is None:
        return {f"metrics.{label}": call for label, call in found_calls.items()}
    names = [_label(call.name) for call in found_calls.values()]
    ends = {key: f"_{key}" if names.count(_label(call.name)) > 1 else "" for key, call in found_calls.items()}
    return {f"metrics.{_label(call.name)}{ends[key]}": call for key, call in found_calls.items()}


def _metrics_by_name(config: ConfigDict, section: str, values: Mapping[str, Any], wrong: Wrong) -> dict[str, Call]:
    """One name or a list of them; keys beside `name` go to those that take them, a metric's own mapping wins."""
    several = isinstance(values["name"], list)
    names = dict(enumerate(values["name"])) if several else {None: values["name"]}
    if not names:
        wrong.append(mistake(config, (section, "name"), "the list is empty; remove 'metrics', or name some"))
    labels = {_label(name) for name in names.values()}
    shared = {key: values[key] for key in values if key != "name" and key not in labels}
    result: dict[str, Call] = {}
    for index, name in names.items():
        label = _label(name)
        where: KeyPath = (section, "name") if index is None else (section, "name", index)
        if f"metrics.{label}" in result:
            text = f"a second '{label}'; to tell them apart, label them: metrics: {{first: {{name: ...}}, second: ...}}"
            wrong.append(mistake(config, where, text))
            continue
        own = _mapping(config, (section, label), values.get(label), wrong)
        if own is None:
            continue
        paths = {key: (section, label, key) if key in own else (section, key) for key in (*shared, *own)}
        arguments = shared | {key: own[key] for key in own}
        dropped = frozenset(shared) - set(own) if several else NONE
        path = where if several else (section,)
        result[f"metrics.{label}"] = Call(path, SLOTS[section], name, arguments, paths | {"name": where}, dropped)
    return result


def _label(name: Any) -> str:
    """The short name under which a metric is logged."""
    return re.split(r"[.:]", str(name))[-1]


def is_component(value: Any) -> bool:
    """A mapping with a `name`: a call inside a call."""
    return is_mapping(value) and "name" in value


def nested(call: Call, plain: Iterable[str] = ()) -> Iterator[Call]:
    """The calls inside a call's arguments, those in `plain` left out, at any depth, outermost first."""

    def walk(path: KeyPath, value: Any) -> Iterator[Call]:
        if is_component(value):
            yield nested_call(call, path, value)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from walk((*path, index), item)
        elif is_mapping(value):
            for key in value:
                yield from walk((*path, key), value[key])

    for key, value in call.arguments.items():
        if key not in plain:
            yield from walk(call.path_of(key), value)


def nested_call(call: Call, path: KeyPath, value: Mapping[str, Any]) -> Call:
    """The call that a component inside a call describes."""
    return call_at(path, value, Slot(call.slot.libraries, given=call.slot.given, nested=True))


READERS = {
    "model": _plain_call,
    "loaders": _loader_calls,
    "loss": _plain_call,
    "metrics": _metric_calls,
    "optimizer": _plain_call,
    "lr_scheduler": _scheduler_calls,
    "trainer": _trainer_calls,
    "mlflow": _settings_call,
    "predictor": _settings_call,
    "cluster": _settings_call,
}
