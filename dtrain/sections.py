"""The shape of each section: which calls (a name and arguments) it describes. Knows no object."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ml_collections import ConfigDict

from dtrain.config import place_of
from dtrain.source import SOURCE, Callee
from dtrain.yamlfile import ConfigError, KeyPath, Mistake, dotted, type_name

ANY = -1
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Slot:
    """What a section of one kind may name: where bare names are looked up, and what dtrain itself supplies."""

    libraries: tuple[str, ...] = ()
    given: int = 0  # leading positional arguments that dtrain supplies
    given_names: frozenset[str] = frozenset()  # keyword arguments that dtrain supplies
    later: int | None = None  # a function that still lacks so many leading arguments is itself what is wanted


_LOSS = Slot(("torch.nn", "torch.nn.functional", "monai.losses"), later=2)
SLOTS = {
    "model": Slot(
        ("torch.nn", "monai.networks.nets", "vit_pytorch.vit", "pytorch3dunet.unet3d.model", "torchvision.models")
    ),
    "loaders": Slot(
        ("torch.utils.data", "monai.transforms", "monai.data", "torchvision.transforms", "torchvision.datasets")
    ),
    "loss": _LOSS,
    "metrics": Slot(
        (
            "torchmetrics",
            "torchmetrics.classification",
            "torchmetrics.segmentation",
            "torchmetrics.functional",
            "monai.metrics",
        ),
        later=2,
    ),
    "optimizer": Slot(("torch.optim",), given=1),
    "lr_scheduler": Slot(("torch.optim.lr_scheduler",), given=1),
}

# The settings of dtrain's own rooms are arguments of these functions, so they are checked like everything else.
HOUSE = {
    "trainer": ("dtrain.trainer", "Trainer", frozenset({"parts"})),
    "mlflow": ("dtrain.tracking", "Journal", frozenset({"folder", "experiment", "run_name"})),
    "loader": ("dtrain.dataloader", "loader_settings", frozenset()),
    "ddp": ("dtrain.distributed", "ddp_options", frozenset()),
    "schedule": ("dtrain.optimizer", "schedule_settings", frozenset()),
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
LEAST: dict[str, dict[str, float]] = {  # the least that a number may be, where the type alone admits less
    "trainer": {
        "max_epochs": 0, "max_steps": 0, "accumulate": 1, "log_every_steps": 1, "validate_every_steps": 1,
        "checkpoint_every_steps": 1, "keep_last": 1, "keep_best": 0, "early_stop_patience": 1, "clip_grad_norm": 0,
        "ema_decay": 0,
    },
    "loaders": {"batch_size": 1, "global_batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "timeout": 0},
    "lr_scheduler": {"warmup_steps": 0, "warmup_start": 0},
    "mlflow": {"exit_timeout_seconds": 0},
}  # fmt: skip
PHASES = ("train", "val", "test", "predict")
TOP_LEVEL = {
    "experiment": "str",
    "run_name": "str",
    "seed": "int | None",
    "device": "str",
    "modules": "list[str] | str | None",
    "model": "dict",
    "loaders": "dict",
    "loss": "dict",
    "metrics": "dict | list | None",
    "optimizer": "dict",
    "lr_scheduler": "dict | None",
    "trainer": "dict | None",
    "mlflow": "dict | None",
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


def calls(config: ConfigDict, only: str | None = None) -> dict[str, Call]:
    """Every call that the config's sections describe, by section: 'model', 'loaders.train', 'metrics.Accuracy', ...

    Args:
        config: The whole config.
        only: Read this one section only.

    Raises:
        ConfigError: A section has not the shape of a call.
    """
    mistakes: list[Mistake] = []
    result: dict[str, Call] = {}
    for section in READERS if only is None else (only,):
        if config.get(section) is not None or section in HOUSE:
            try:
                result |= READERS[section](config, section)
            except ConfigError as error:
                mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return result


def _section(config: ConfigDict, section: str) -> Any:
    value = config.get(section)
    return {} if value is None else value


def mistake(config: ConfigDict, path: KeyPath, text: str) -> Mistake:
    """A mistake at a key, with the key's name in front and its place."""
    return Mistake(f"{dotted(path)}: {text}", place_of(config, path))


def refused(config: ConfigDict, path: KeyPath, text: str) -> ConfigError:
    """The error with that one mistake."""
    return ConfigError(mistake(config, path, text))


def _mapping(config: ConfigDict, section: str) -> Mapping[str, Any]:
    value = _section(config, section)
    if not isinstance(value, Mapping | ConfigDict):
        raise refused(config, (section,), f"expected a mapping, found {type_name(value)} {value!r}")
    return value


def call_at(config: ConfigDict, path: KeyPath, value: Mapping[str, Any], slot: Slot) -> Call:
    """The call that a mapping with a `name` describes."""
    if "name" not in value:
        known = ", ".join(map(str, value)) or "nothing"
        raise refused(config, path, f"has no 'name', so nothing says what to build (found: {known})")
    return Call(path, slot, value["name"], {key: value[key] for key in value if key != "name"})


def _plain_call(config: ConfigDict, section: str) -> dict[str, Call]:
    return {section: call_at(config, (section,), _mapping(config, section), SLOTS[section])}


def _house_call(config: ConfigDict, section: str) -> dict[str, Call]:
    values = _mapping(config, section)
    module, name, given = HOUSE[section]
    wanted = values.get("name") if section == "trainer" else None
    arguments = {key: values[key] for key in values if key != "name" or section != "trainer"}
    result = {section: Call((section,), Slot((module,), given_names=given), wanted or f"{module}:{name}", arguments)}
    if section == "trainer" and isinstance(ddp := values.get("ddp"), Mapping | ConfigDict):
        module, name, _ = HOUSE["ddp"]
        result["trainer.ddp"] = Call(
            (section, "ddp"), Slot((module,)), f"{module}:{name}", {key: ddp[key] for key in ddp}
        )
    return result


def _split(config: ConfigDict, path: KeyPath, values: Mapping[str, Any], house: str) -> tuple[dict[str, Any], Call]:
    """Take the keys that one of dtrain's own functions takes out of a section; returns the others and that call."""
    module, name, _ = HOUSE[house]
    settings = _settings(house)
    own = {key: values[key] for key in values if key in settings}
    rest = {key: values[key] for key in values if key not in settings}
    return rest, Call(path, Slot((module,)), f"{module}:{name}", own)


@functools.cache
def _settings(house: str) -> tuple[str, ...]:
    """The keys that one of dtrain's own functions takes."""
    module, name, _ = HOUSE[house]
    found = SOURCE.lookup(module, name)
    assert isinstance(found, Callee), f"{module}:{name} cannot be read"
    return tuple(item.name for item in found.parameters)


def _loader_calls(config: ConfigDict, section: str) -> dict[str, Call]:
    values = _mapping(config, section)
    shared = {key: values[key] for key in values if key not in PHASES}
    result: dict[str, Call] = {}
    for phase in PHASES:
        if phase not in values or values[phase] is None:
            continue
        own = values[phase]
        if not isinstance(own, Mapping | ConfigDict):
            raise refused(config, (section, phase), f"expected a mapping, found {type_name(own)} {own!r}")
        merged = shared | {key: own[key] for key in own}
        paths = {key: (section, phase, key) if key in own else (section, key) for key in merged}
        rest, loader = _split(config, (section, phase), merged, "loader")
        dataset = call_at(config, (section, phase), rest, SLOTS["loaders"])
        result[f"loaders.{phase}"] = replace(dataset, paths=paths, others=frozenset(_settings("loader")))
        result[f"loaders.{phase}.loader"] = replace(loader, paths=paths)
    return result


def _scheduler_calls(config: ConfigDict, section: str) -> dict[str, Call]:
    rest, schedule = _split(config, (section,), _mapping(config, section), "schedule")
    call = call_at(config, (section,), rest, SLOTS[section])
    filled = FILLED.get(str(call.name).rpartition(".")[2])
    call = replace(call, others=frozenset(_settings("schedule")), filled=frozenset({filled} if filled else ()))
    return {section: call, f"{section}.schedule": schedule}


def _metric_calls(config: ConfigDict, section: str) -> dict[str, Call]:
    """`{name: A}`, `{name: [A, B], shared: 1, B: {own: 2}}`, `{label: {name: A}}` or `[{name: A}, {name: B}]`."""
    values, slot = _section(config, section), SLOTS[section]
    if isinstance(values, list):
        listed = [
            call_at(config, (section, index), _entry(config, (section, index), item), slot)
            for index, item in enumerate(values)
        ]
        return {f"metrics.{_label(item.name, listed, index)}": item for index, item in enumerate(listed)}
    values = _mapping(config, section)
    if "name" not in values:
        return {
            f"metrics.{key}": call_at(config, (section, key), _entry(config, (section, key), values[key]), slot)
            for key in values
        }
    if not isinstance(values["name"], list):
        return {f"metrics.{_label(values['name'])}": call_at(config, (section,), values, slot)}
    names = {str(name) for name in values["name"]} | {_label(name) for name in values["name"]}
    shared = {key: values[key] for key in values if key != "name" and key not in names}
    result = {}
    for name in values["name"]:
        own = _entry(config, (section, name), values.get(str(name)) or values.get(_label(name)) or {})
        paths = {key: (section, name, key) if key in own else (section, key) for key in shared | dict(own)}
        arguments = shared | {key: own[key] for key in own}
        result[f"metrics.{_label(name)}"] = Call((section,), slot, name, arguments, paths, frozenset(shared) - set(own))
    return result


def _entry(config: ConfigDict, path: KeyPath, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | ConfigDict):
        raise refused(config, path, f"expected a mapping, found {type_name(value)} {value!r}")
    return value


def _label(name: Any, listed: list[Call] | None = None, index: int = 0) -> str:
    """The short name under which a metric is logged; a second one of the same name gets its index."""
    short = re.split(r"[.:]", str(name))[-1]
    twice = listed is not None and sum(_label(item.name) == short for item in listed) > 1
    return f"{short}_{index}" if twice else short


def is_component(value: Any) -> bool:
    """A mapping with a `name`: a call inside a call."""
    return isinstance(value, Mapping | ConfigDict) and "name" in value


def nested(call: Call) -> Iterator[tuple[KeyPath, Any]]:
    """The components inside a call's arguments, at any depth, outermost first."""

    def walk(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
        if is_component(value):
            yield path, value
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from walk((*path, index), item)
        elif isinstance(value, Mapping | ConfigDict):
            for key in value:
                yield from walk((*path, key), value[key])

    for key, value in call.arguments.items():
        yield from walk(call.path_of(key), value)


def nested_slot(slot: Slot) -> Slot:
    """What a component inside a call of this slot may name; dtrain supplies nothing to it."""
    return Slot(slot.libraries, later=ANY)


READERS = {
    "model": _plain_call,
    "loaders": _loader_calls,
    "loss": _plain_call,
    "metrics": _metric_calls,
    "optimizer": _plain_call,
    "lr_scheduler": _scheduler_calls,
    "trainer": _house_call,
    "mlflow": _house_call,
}
