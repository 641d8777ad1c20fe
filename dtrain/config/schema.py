"""From a config's sections to the calls that they describe: what is called, with what, and where each key stands."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.annotations import takes_callables, takes_mapping, takes_objects
from dtrain.config.did_you_mean import nearest
from dtrain.config.errors import ConfigError, KeyPath, Mistake, bad_syntax, dotted, found, is_mapping, to_plain
from dtrain.config.folds import are_folds
from dtrain.config.load import place_of
from dtrain.config.mixins import joined
from dtrain.config.resolve import LIBRARIES, Found, locate
from dtrain.config.signatures import SOURCE, Callee, Dynamic, module_file
from dtrain.config.task import task_arguments

PHASES = ("train", "val", "test", "predict")
OBJECT = "_object_"  # the key of a section that stands for an object given in Python; see live_objects.py
SAMPLERS = ("sampler", "batch_sampler")
OF_SEVERAL_SETS = ("val", "test")  # the phases that may have a list of sets


class Slot(NamedTuple):
    """What a section of one kind may name: where bare names are searched, and what dtrain itself supplies."""

    libraries: tuple[str, ...] = ()
    given: str = ""  # the argument that dtrain supplies: of this name, else the first one
    given_names: frozenset[str] = frozenset()  # keyword arguments that dtrain supplies
    pairs: bool = False  # a function of (output, target) is itself what is wanted
    named: bool = False  # only an argument of that name is supplied, or one that stands for a dataset
    nested: bool = False  # inside another call: any section's library will do, a function may itself be what is wanted
    given_instead: tuple[str, ...] = ()  # by these names of its first argument, a callee asks for something else


class Offer(dict[str, Any]):
    """What dtrain can supply, by the argument's name; a callee is given the one that it asks for, else the first."""


SLOTS = {
    "model": Slot(LIBRARIES["model"]),
    "loaders": Slot(LIBRARIES["loaders"]),
    "loss": Slot(LIBRARIES["loss"], pairs=True),
    "metrics": Slot(LIBRARIES["metrics"], pairs=True),
    "optimizer": Slot(LIBRARIES["optimizer"], given="params", given_instead=("named_parameters", "model")),
    "lr_scheduler": Slot(LIBRARIES["lr_scheduler"], given="optimizer"),
    "trainer": Slot(("dtrain.trainer",), given="parts"),
    "trackers": Slot(LIBRARIES["trackers"]),
    "mlflow": Slot(given_names=frozenset({"folder", "experiment", "run_name", "sender", "say"})),
}
SAMPLER_SLOT = Slot(LIBRARIES["sampler"], given="dataset", named=True)
OF_SWEEPS = {"sampler": Slot(("optuna.samplers",)), "pruner": Slot(("optuna.pruners",))}
# dtrain's own settings are the arguments of these functions, so they are checked like everything else.
OWN_SETTINGS = {
    "trainer": "dtrain.trainer:Trainer",
    "mlflow": "dtrain.tracking.journal:Journal",
    "predictor": "dtrain.predict.predictor:Predictor",
    "cluster": "dtrain.launch.batch_script:cluster_settings",
    "sweep": "dtrain.launch.sweep:sweep_settings",
    "loader": "dtrain.dataloader:loader_settings",
    "folds": "dtrain.data.folds:fold_settings",
    "ddp": "dtrain.distributed.ddp:ddp_options",
    "fsdp": "dtrain.distributed.fsdp:fsdp_options",
    "swa": "dtrain.training.swa:swa_settings",
    "pictures": "dtrain.reporting.validation_pictures:picture_settings",
    "profile": "dtrain.training.profile:profile_settings",
    "pre_trained": "dtrain.checkpoint.weights:weight_settings",
    "freeze": "dtrain.training.freezing:freeze_settings",
    "groups": "dtrain.training.parameter_groups:group_settings",
    "schedule": "dtrain.training.schedule:schedule_settings",
    "metric": "dtrain.metrics:metric_settings",
}
# The schedules whose length dtrain knows and fills in; PolynomialLR's own default of 5 is hardly ever wanted.
FILLED = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "PolynomialLR": "total_iters"}


NOT_REBUILT = (
    "no config rebuilds an object: in Python, make the same call of dtrain.create_trainer again for fit(), test() and "
    "predict(); dtrain.load_model(run, model=...) loads the weights"
)


@dataclass(frozen=True)
class Call:
    """A call written in YAML: a name, arguments, and where each of them stands in the config."""

    config: ConfigDict = field(repr=False, compare=False)  # the whole of it
    path: KeyPath
    slot: Slot
    name: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()  # arguments meant for several calls: dropped where the callee takes none
    others: frozenset[str] = frozenset()  # what else may stand in this section; for 'did you mean'
    filled: frozenset[str] = frozenset()  # arguments that dtrain fills where the config leaves them out
    is_partial: bool = False  # the class or function itself is wanted, with these arguments fixed

    def path_of(self, argument: str) -> KeyPath:
        """Where an argument stands in the config."""
        return self.paths.get(argument, (*self.path, argument))

    @property
    def stands_for_object(self) -> bool:
        """Whether it is not a call but the record of an object that was given in Python."""
        return OBJECT in self.arguments

    @property
    def object(self) -> Any:
        """That object; None where it is another process that has it, whose config this was."""
        return getattr(self.config, "_objects", {}).get(self.path)

    @functools.cached_property
    def parts(self) -> list["Call"]:
        """Of a trainer whose name is a list, the classes that become one."""
        if self.path != ("trainer",) or not isinstance(self.name, list):
            return []
        result = []
        for index, item in enumerate(self.name):
            path = (*self.path_of("name"), index)
            result.append(Call(self.config, path, self.slot, item, paths={"name": path}))
        return result

    @functools.cached_property
    def found(self) -> Found:
        """What the name leads to, looked up once; a ConfigError where it leads nowhere or may not be used."""
        if self.stands_for_object:  # nothing of it is read from source text
            module, _, name = str(self.name).rpartition(".")
            return Found(Dynamic(module, name))
        if self.parts:
            base = SOURCE.lookup(*OWN_SETTINGS["trainer"].split(":"))
            assert isinstance(base, Callee)
            return Found(joined([part.target for part in self.parts], base))
        try:
            return locate(self.name, own_modules(self.config), self.slot.libraries, self.slot.nested)
        except (ConfigError, SyntaxError) as error:
            text = bad_syntax(error) if isinstance(error, SyntaxError) else error.mistakes[0].text
            raise refused(self.config, self.path_of("name"), text) from None

    @property
    def target(self) -> Callee | Dynamic:
        """The class or function that the name leads to."""
        return self.found.target

    @functools.cached_property
    def components(self) -> dict[KeyPath, "Call"]:
        """The calls written among the arguments, by path; those inside a component are the component's own."""
        slot = Slot(
            self.slot.libraries,
            given=self.slot.given,
            named=self.slot.named,
            nested=True,
            given_instead=self.slot.given_instead,
        )
        annotations = self.annotations
        result: dict[KeyPath, Call] = {}
        for key, value in self.arguments.items():
            annotation, path = annotations.get(key), self.path_of(key)
            if is_component(value) and takes_mapping(annotation):
                continue
            for where, values in _components(path, value):
                result[where] = _call_at(self.config, where, values, slot)
            if takes_objects(annotation):
                for where, name in _texts(path, value):
                    named = Call(self.config, where, slot, name, paths={"name": where})
                    result[where] = replace(named, is_partial=takes_callables(annotation))
        return result

    @property
    def annotations(self) -> dict[str, ast.expr | None]:
        """What the callee says of its arguments' types; nothing where that cannot be read."""
        try:
            target = self.target
        except ConfigError:
            return {}
        return {item.name: item.annotation for item in target.parameters} if isinstance(target, Callee) else {}


def own_loop(config: ConfigDict) -> set[str]:
    """The methods by which the class that `trainer.name` names differs from dtrain's Trainer, as far as can be read.

    Of one that cannot be read, those that a training may have of its own.
    """
    section = config.get("trainer")
    name = section.get("name") if is_mapping(section) else None
    found: set[str] = set()
    for item in name if isinstance(name, list) else [name] if name else []:
        base = ("dtrain.trainer", "Trainer")
        with suppress(ConfigError, SyntaxError):  # reported elsewhere
            target = locate(item, own_modules(config), SLOTS["trainer"].libraries).target
            methods = SOURCE.methods(target.module, target.name, base)
            found |= {"training_step", "evaluation_step"} if methods is None else methods
    return found


def own_modules(config: ConfigDict) -> list[str]:
    """The modules of the user's own, searched first; of `optional_modules` those that are there."""
    listed = [item for _, item in listed_modules(config, "modules") if isinstance(item, str)]
    optional = [item for _, item in listed_modules(config, "optional_modules") if isinstance(item, str)]
    return [*listed, *filter(module_file, optional)]


def listed_modules(config: ConfigDict, key: str) -> list[tuple[KeyPath, Any]]:
    """What `modules` or `optional_modules` lists, one or several, each with its path."""
    value = config.get(key)
    if isinstance(value, list):
        return [((key, index), item) for index, item in enumerate(value)]
    return [] if value is None else [((key,), value)]


def is_component(value: Any) -> bool:
    """A mapping with a `name`: a call inside a call, unless it says that it is data."""
    return is_mapping(value) and "name" in value and not is_data(value)


def has_several(section: Any) -> bool:
    """Whether a section of optimizers or schedulers holds several by name: without a `name`, but mappings with one."""
    values = [section[key] for key in section] if is_mapping(section) and "name" not in section else []
    return any(map(is_component, values)) and all(item is None or is_mapping(item) for item in values)


def is_data(value: Any) -> bool:
    """A mapping with `_data_: true`: passed on as it is, without this key."""
    return is_mapping(value) and value.get("_data_") is True


def _texts(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, str]]:
    """A text, or the texts in a list."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        yield from (((*path, index), item) for index, item in enumerate(value) if isinstance(item, str))


def _components(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """The components in a value, at any depth, outermost alone."""
    if is_component(value):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _components((*path, index), item)
    elif is_mapping(value) and not is_data(value):
        for key in value:
            yield from _components((*path, key), value[key])


def _changed(call: Call, **changes: Any) -> Call:
    """A call of the same name with other arguments; what the name leads to is not looked up again."""
    changed = replace(call, **changes)
    if "found" in vars(call):
        vars(changed)["found"] = call.found
    return changed


def _call_at(config: ConfigDict, path: KeyPath, values: Mapping[str, Any], slot: Slot) -> Call:
    """The call that a mapping with a `name` describes; inside another call `_partial_` may leave it uncalled."""
    if OBJECT in values:
        return Call(config, path, slot, values.get("name"), {OBJECT: values[OBJECT]})
    is_partial = slot.nested and values.get("_partial_", False) is not False  # what is neither is told as such
    read_here = {"name", "_partial_"} if slot.nested and isinstance(values.get("_partial_"), bool) else {"name"}
    arguments = {key: values[key] for key in values if key not in read_here}
    return Call(config, path, slot, values["name"], arguments, is_partial=is_partial)


def mistake(config: ConfigDict, path: KeyPath, text: str) -> Mistake:
    """A mistake at a key, with the key's name in front and its place."""
    return Mistake(f"{dotted(path)}: {text}", place_of(config, path))


def refused(config: ConfigDict, path: KeyPath, text: str) -> ConfigError:
    """The error with that one mistake."""
    return ConfigError(mistake(config, path, text))


def calls(config: ConfigDict) -> dict[str, Call]:
    """Every call of the config's sections ('model', 'loaders.train', 'metrics.Accuracy', ...); else a ConfigError."""
    reading = read(config)
    if reading.mistakes:
        raise ConfigError(reading.mistakes)
    return reading.calls


def read(config: ConfigDict) -> "_Reader":
    """The sections as calls, kept on the config, so that one start reads and looks up everything once.

    A locked config still takes other values for the keys it has; then it is read anew.
    """
    text = repr(to_plain(config))
    reading: _Reader | None = getattr(config, "_reading", None)
    if reading is None or reading.text != text:
        reading = _Reader(config, text)
        reading.all_calls()
        object.__setattr__(config, "_reading", reading)
    return reading


class _Reader:
    """Reads every section of one config into calls; collects the mistakes in the shape of those that cannot be read."""

    def __init__(self, config: ConfigDict, text: str) -> None:
        self.config, self.text = config, text
        self.calls: dict[str, Call] = {}
        self.mistakes: list[Mistake] = []

    def all_calls(self) -> None:
        """Those of every section, in the order in which a training needs them."""
        readers = {
            "model": self.component,
            "loaders": self.loaders,
            "loss": self.component,
            "metrics": self.metrics,
            "optimizer": self.optimizers,
            "lr_scheduler": self.scheduler,
            "trainer": self.trainer,
            "trackers": lambda section, values: self.trackers(section, [values] if values else []),
            **dict.fromkeys(("mlflow", "predictor", "cluster"), self.settings),
            "sweep": self.sweep,
        }
        for section, reader in readers.items():
            value = self.config.get(section)
            if section == "metrics" and isinstance(value, list):
                self.listed_metrics(value)
            elif section == "trackers" and isinstance(value, list):
                self.trackers(section, value)
            elif value is None and section not in OWN_SETTINGS:
                continue
            elif (values := self.mapping((section,), value)) is not None:
                reader(section, values)
        for key in [key for key in self.calls if key.startswith("metrics.")]:
            self.metric_settings(key, self.calls[key])
            self.metric_task(key, self.calls[key])

    def wrong(self, path: KeyPath, text: str) -> None:
        self.mistakes.append(mistake(self.config, path, text))

    def mapping(self, path: KeyPath, value: Any) -> Mapping[str, Any] | None:
        """The value if it is a mapping ({} for null); else a mistake."""
        if value is None or is_mapping(value):
            return {} if value is None else value
        self.wrong(path, f"expected a mapping, {found(value)}")
        return None

    def has_name(self, path: KeyPath, values: Mapping[str, Any]) -> bool:
        """Whether it has a name; else a mistake."""
        if "name" in values:
            return True
        known = ", ".join(map(str, values)) or "nothing"
        near = nearest("name", map(str, values), 1)
        hint = f"; was 'name' meant by '{near[0]}'?" if near else ""
        self.wrong(path, f"has no 'name', so nothing says what to build (found: {known}){hint}")
        return False

    def component(self, section: str, values: Mapping[str, Any]) -> None:
        if self.has_name((section,), values):
            self.calls[section] = _call_at(self.config, (section,), values, SLOTS[section])

    def settings(self, section: str, values: Mapping[str, Any]) -> None:
        self.calls[section] = self.own_call((section,), section, values)

    def sweep(self, section: str, values: Mapping[str, Any]) -> None:
        """What a sweep does; `sampler` and `pruner` are names or calls of Optuna's, which a training does without."""
        own = {key: values[key] for key in values if key not in ("sampler", "pruner")}
        self.calls[section] = self.own_call((section,), section, own)
        for key, slot in OF_SWEEPS.items():
            value, path = values.get(key), (section, key)
            if value is None or module_file("optuna") is None:
                continue
            if isinstance(value, str):
                self.calls[f"{section}.{key}"] = Call(self.config, path, slot, value, paths={"name": path})
            elif (given := self.mapping(path, value)) is not None and self.has_name(path, given):
                self.calls[f"{section}.{key}"] = _call_at(self.config, path, given, slot)

    def own_call(self, path: KeyPath, settings: str, values: Mapping[str, Any]) -> Call:
        """A call of the function whose arguments are dtrain's own settings."""
        return Call(self.config, path, SLOTS.get(settings, Slot()), OWN_SETTINGS[settings], dict(values))

    def trainer(self, section: str, values: Mapping[str, Any]) -> None:
        """The trainer's settings; `name` may name another trainer than dtrain's."""
        own = self.own_call((section,), section, {key: values[key] for key in values if key != "name"})
        self.calls[section] = own if values.get("name") is None else replace(own, name=values["name"])
        for key in ("ddp", "fsdp", "pictures", "pre_trained", "profile", "swa"):
            settings: Any = values.get(key) if key in ("pre_trained", "profile", "swa") else values.get(key) or {}
            if is_mapping(settings):  # `pre_trained` may be a path alone
                self.calls[f"{section}.{key}"] = self.own_call((section, key), key, settings)
        wish = values.get("freeze")
        for index, settings in enumerate(wish if isinstance(wish, list) else [wish]):
            if is_mapping(settings):
                path: KeyPath = (section, "freeze", index) if isinstance(wish, list) else (section, "freeze")
                self.calls[dotted(path)] = self.own_call(path, "freeze", settings)

    def loaders(self, section: str, values: Mapping[str, Any]) -> None:
        """For each phase its dataset and its loader; keys beside the phases go to all of them."""
        shared = {key: values[key] for key in values if key not in PHASES}
        if are_folds(values):
            self.calls["loaders.folds"] = self.own_call((section, "folds"), "folds", shared.pop("folds"))
        elif values.get("folds", ...) is None:
            del shared["folds"]
        data_sets = [item for phase in PHASES for item in self.data_sets(phase, values.get(phase))]
        some_phase_has_a_name = any(is_component(own) for _, _, own in data_sets)
        for phase, path, own in data_sets:
            merged = _phase_values(shared, own)
            paths = {key: (*path, key) if key in own else (section, key) for key in merged}
            for_loader, for_dataset = _split(merged, "loader")
            samplers = {key: for_loader.pop(key) for key in SAMPLERS if key in for_loader}
            samplers = {key: value for key, value in samplers.items() if value is not None}
            self.calls[f"loaders.{phase}.loader"] = replace(self.own_call(path, "loader", for_loader), paths=paths)
            if self.has_name(path, for_dataset) if some_phase_has_a_name else self.has_name((section,), values):
                dataset = _call_at(self.config, path, for_dataset, SLOTS[section])
                self.calls[f"loaders.{phase}"] = replace(dataset, paths=paths, others=_names_of("loader"))
            if phase == "train":
                self.samplers(samplers, paths)
                self.beside_samplers(samplers, for_loader, paths)
            for key in samplers if phase != "train" else ():
                if key in own:  # else it is written for all phases, and meant for train
                    self.wrong(paths[key], "is for loaders.train alone: an evaluation has each sample once, in order")

    def data_sets(self, phase: str, value: Any) -> Iterator[tuple[str, KeyPath, Mapping[str, Any]]]:
        """Name, path and own keys of each data set of a phase: `val`, or of a list with labels `val/near`."""
        path: KeyPath = ("loaders", phase)
        if value is None:
            return
        if phase not in OF_SEVERAL_SETS or not isinstance(value, list):
            if (own := self.mapping(path, value)) is not None:
                yield phase, path, own
            return
        if not value:
            self.wrong(path, "the list is empty; remove it, or name some data")
        labels: list[Any] = []
        for index, item in enumerate(value):
            if (own := self.mapping(where := (*path, index), item)) is None:
                continue
            label = own.get("label")
            if text := _label_mistake(label, labels, needed=len(value) > 1):
                self.wrong((*where, "label") if "label" in own else where, text)
                continue
            labels.append(label)
            name = phase if label is None else f"{phase}/{label}"
            yield name, where, {key: own[key] for key in own if key != "label"}

    def samplers(self, given: Mapping[str, Any], paths: Mapping[str, KeyPath]) -> None:
        """The samplers of the training data, calls of their own."""
        for key, value in given.items():
            if (values := self.mapping(paths[key], value)) is None or not self.has_name(paths[key], values):
                continue
            if _short_name(values["name"]) == "DistributedSampler":
                text = "DistributedSampler is not needed: dtrain deals the samples to the ranks; remove it"
                self.wrong(paths[key], text)
            else:
                self.calls[f"loaders.train.{key}"] = _call_at(self.config, paths[key], values, SAMPLER_SLOT)

    def beside_samplers(
        self, given: Mapping[str, Any], for_loader: Mapping[str, Any], paths: Mapping[str, KeyPath]
    ) -> None:
        """What cannot stand beside a sampler; a batch size beside the phases may be that of the others."""
        if len(given) > 1:
            self.wrong(paths["batch_sampler"], "cannot be combined with 'sampler'; keep one of them")
        for key in given:
            decides = "which samples come, and when" if key == "sampler" else "which samples make up a batch"
            excluded = [other for other in ("batch_size", "global_batch_size") if len(paths.get(other, ())) > 2]
            for other in ["shuffle", *(excluded if key == "batch_sampler" else [])]:
                if for_loader.get(other) is not None:
                    self.wrong(paths[other], f"cannot be combined with '{key}', which decides {decides}; remove it")

    def optimizers(self, section: str, values: Mapping[str, Any]) -> None:
        """One optimizer, or several by name: `{generator: {name: Adam, ...}, critic: {name: Adam, ...}}`."""
        if not has_several(values):
            if self.has_name((section,), values):
                self.optimizer(section, (section,), values)
            return
        for name, own in values.items():
            if name == "schedule":
                self.wrong((section, name), "is a word of dtrain's own under 'lr_scheduler'; name it otherwise")
            elif self.has_name((section, name), own):
                self.optimizer(f"{section}.{name}", (section, name), own)

    def optimizer(self, key: str, path: KeyPath, values: Mapping[str, Any]) -> None:
        """One optimizer, without dtrain's own keys beside its arguments, as far as they are not the optimizer's."""
        call = _call_at(self.config, path, values, SLOTS["optimizer"])
        own, _ = _split(call.arguments, "groups")
        if own:
            with suppress(ConfigError):  # reported elsewhere
                taken = call.target.keywords if isinstance(call.target, Callee) else set()
                own = {name: own[name] for name in own if name not in taken}
        rest = {name: call.arguments[name] for name in call.arguments if name not in own}
        self.calls[key] = _with_own_rate(_changed(call, arguments=rest, others=_names_of("groups")))
        self.calls[f"groups.{key}"] = self.own_call(path, "groups", own)

    def scheduler(self, section: str, values: Mapping[str, Any]) -> None:
        """One scheduler, or one for each of several optimizers by their names."""
        if not has_several(values):
            self.one_scheduler(section, (section,), values)
            return
        known = [key.removeprefix("optimizer.") for key in self.calls if key.startswith("optimizer.")]
        for name, own in values.items():
            if name not in known:
                possible = (
                    f"the config's optimizers are {', '.join(known)}" if known else "the config has one optimizer"
                )
                self.wrong((section, name), f"is not the name of an optimizer; {possible}")
            elif own:
                self.one_scheduler(f"{section}.{name}", (section, name), own)

    def one_scheduler(self, key: str, path: KeyPath, values: Mapping[str, Any]) -> None:
        """A scheduler, and when and from where it moves the rate."""
        settings, rest = _split(values, "schedule")
        self.calls[f"{key}.schedule"] = self.own_call(path, "schedule", settings)
        if self.has_name(path, values):
            call = _call_at(self.config, path, rest, SLOTS["lr_scheduler"])
            filled = FILLED.get(_short_name(call.name))
            others = _names_of("schedule")
            self.calls[key] = replace(call, others=others, filled=frozenset({filled} if filled else ()))

    def trackers(self, section: str, values: Sequence[Any]) -> None:
        """`{name: A}` or `[{name: A}, {name: B}]`."""
        is_list = isinstance(self.config.get(section), list)
        for index, item in enumerate(values):
            path: KeyPath = (section, index) if is_list else (section,)
            if (own := self.mapping(path, item)) is not None and self.has_name(path, own):
                self.calls[f"{section}.{index}"] = _call_at(self.config, path, own, SLOTS[section])

    def metrics(self, section: str, values: Mapping[str, Any]) -> None:
        """`{name: A}`, `{name: [A, B], shared: 1, B: {own: 2}}` or `{label: {name: A}}`."""
        if "name" in values:
            self.metrics_by_name(section, values)
        elif values and not any(map(is_component, values.values())):
            self.has_name((section,), values)
        else:
            self.calls |= {f"metrics.{label}": call for label, call in self.labelled_metrics(values).items()}

    def metric_settings(self, key: str, call: Call) -> None:
        """Split off dtrain's own keys of a metric, as far as they are not the metric's."""
        own, _ = _split(call.arguments, "metric")
        if own:
            with suppress(ConfigError):  # reported elsewhere
                taken = call.target.keywords if isinstance(call.target, Callee) else set()
                if not call.target.module.startswith("monai."):
                    taken |= {"activation"}
                own = {name: own[name] for name in own if name not in taken}
        if own:
            settings = self.own_call(call.path, "metric", own)
            self.calls[f"metric.{key.removeprefix('metrics.')}"] = replace(settings, paths=call.paths)
        rest = {name: call.arguments[name] for name in call.arguments if name not in own}
        self.calls[key] = _changed(call, arguments=rest, others=call.others | _names_of("metric"))

    def metric_task(self, key: str, call: Call) -> None:
        """Give a metric what loss and model leave no doubt about: the task and the number of classes."""
        outer = self.calls.get("loss")
        if outer is not None and _short_name(outer.name) == "DeepSupervision":  # of the same classes as the loss within
            outer = outer.components.get(outer.path_of("loss"))
        loss, model = self.written(outer), self.written(self.calls.get("model"))
        has_heads = f"metric.{key.removeprefix('metrics.')}" in self.calls  # which of them has how many classes?
        if not has_heads and (metric := self.written(call)):
            certain = task_arguments(metric, loss, model)
            self.calls[key] = _changed(call, arguments={**call.arguments, **certain}, filled=frozenset(certain))

    def written(self, call: Call | None) -> tuple[Callee, Mapping[str, Any]] | None:
        """What a call names, as far as it can be read, and its arguments."""
        with suppress(ConfigError):  # reported elsewhere
            if call is not None and isinstance(call.target, Callee):
                return call.target, call.arguments
        return None

    def listed_metrics(self, values: list[Any]) -> None:
        """`[{name: A}, {name: B}]`; the index is in the label where two have the same name."""
        listed = self.labelled_metrics(dict(enumerate(values)))
        names = {index: _short_name(call.name) for index, call in listed.items()}
        labels = {index: f"{name}_{index}" for index, name in names.items() if [*names.values()].count(name) > 1}
        self.calls |= {f"metrics.{labels.get(index, names[index])}": call for index, call in listed.items()}

    def labelled_metrics(self, values: Mapping[Any, Any]) -> dict[Any, Call]:
        """One call for each label of a mapping, or index of a list."""
        result: dict[Any, Call] = {}
        for key, item in values.items():
            path = ("metrics", key)
            if (own := self.mapping(path, item)) is not None and self.has_name(path, own):
                result[key] = _call_at(self.config, path, own, SLOTS["metrics"])
        return result

    def metrics_by_name(self, section: str, values: Mapping[str, Any]) -> None:
        """One name or a list of them; keys beside `name` go to those that take them, a metric's own mapping wins."""
        several = isinstance(values["name"], list)
        names = dict(enumerate(values["name"])) if several else {None: values["name"]}
        if not names:
            self.wrong((section, "name"), "the list is empty; remove 'metrics', or name some")
        labels = {_short_name(name) for name in names.values()}
        shared = {key: values[key] for key in values if key != "name" and key not in labels}
        for index, name in names.items():
            label = _short_name(name)
            where: KeyPath = (section, "name") if index is None else (section, "name", index)
            if f"metrics.{label}" in self.calls:
                cure = "to tell them apart, label them: metrics: {first: {name: ...}, second: ...}"
                self.wrong(where, f"a second '{label}'; {cure}")
                continue
            if (own := self.mapping((section, label), values.get(label))) is None:
                continue
            arguments = {**shared, **own}
            paths = {key: (section, label, key) if key in own else (section, key) for key in arguments}
            dropped = frozenset(shared) - set(own) if several else frozenset()
            path = where if several else (section,)
            call = Call(self.config, path, SLOTS[section], name, arguments, paths | {"name": where}, dropped)
            self.calls[f"metrics.{label}"] = call


def set_names(calls: Mapping[str, Call], phase: str) -> list[str]:
    """The names of a phase's data sets, in order: `val`, or where it is a list with labels `val/near`, `val/far`."""
    names = [key[len("loaders.") : -len(".loader")] for key in calls if re.fullmatch(r"loaders\..*\.loader", key)]
    return [name for name in names if name.partition("/")[0] == phase]


def _label_mistake(label: Any, others: list[Any], needed: bool) -> str:
    """What is wrong with the label of one of several data sets."""
    if label is None:
        return "needs a 'label', by which its figures are told from the others: {label: near, ...}" if needed else ""
    if not isinstance(label, str) or not re.fullmatch(r"[\w-]+", label):
        return f"expected a label of letters, digits, - and _, {found(label)}"
    return f"a second set with the label '{label}'" if label in others else ""


def _with_own_rate(call: Call) -> Call:
    """The same for an optimizer whose rate is `learning_rate`, which reading takes for another name of `lr`."""
    names = call.annotations
    if "lr" not in call.arguments or "lr" in names or "learning_rate" not in names:
        return call
    arguments = {"learning_rate" if key == "lr" else key: value for key, value in call.arguments.items()}
    return replace(call, arguments=arguments, paths={"learning_rate": call.path_of("lr")})


def _phase_values(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A phase's keys with those of all phases; its own win, also where the batch size is written in the other way."""
    merged = {**shared, **own}
    for key, other in (("batch_size", "global_batch_size"), ("global_batch_size", "batch_size")):
        if own.get(key) is not None and other not in own:
            merged.pop(other, None)
    return merged


def _split(values: Mapping[str, Any], settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of one of the groups of dtrain's own settings, and the others."""
    own = {key: values[key] for key in values if key in _names_of(settings)}
    return own, {key: values[key] for key in values if key not in own}


@functools.cache
def _names_of(settings: str) -> frozenset[str]:
    """The keys of one of the groups of dtrain's own settings."""
    callee = SOURCE.lookup(*OWN_SETTINGS[settings].split(":"))
    assert isinstance(callee, Callee), f"{OWN_SETTINGS[settings]} cannot be read"
    return frozenset(item.name for item in callee.parameters)


def keys_of(settings: str) -> frozenset[str]:
    """The same for those who put sections together in Python."""
    return _names_of(settings)


def _short_name(name: Any) -> str:
    """`torchmetrics.Accuracy` -> 'Accuracy'."""
    return re.split(r"[.:]", str(name))[-1]
