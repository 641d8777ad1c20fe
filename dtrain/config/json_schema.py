"""A config as JSON Schema (draft 2020-12), for editors: every section with the signatures of what it names."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.annotations import Parameter
from dtrain.config.check import given_names, is_passed_on, supplied, takes_config
from dtrain.config.docstrings import documented
from dtrain.config.errors import ConfigError, KeyPath
from dtrain.config.json_types import ANYTHING, REFERENCE, Schema, any_of, definitions, property_of
from dtrain.config.load import notes_on
from dtrain.config.pytorch3dunet import RENAMES, further_keys
from dtrain.config.resolve import ALL_LIBRARIES, LIBRARIES
from dtrain.config.rules import RANGES, TOP_LEVEL
from dtrain.config.schema import (
    FILLED,
    OF_SEVERAL_SETS,
    OWN_SETTINGS,
    PHASES,
    SAMPLER_SLOT,
    SLOTS,
    Call,
    Slot,
    own_modules,
    read,
)
from dtrain.config.signatures import SOURCE, Callee

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXTS = {  # of the keys that no signature describes
    "config_version": "The version of configs that this file is written in (1 is the newest). Default: the newest.",
    "experiment": "MLflow's experiment. Default: the file's name without .yaml.",
    "run_name": "MLflow's name of the run. Default: the experiment and a time stamp.",
    "seed": "Of weights, order, augmentation, dropout. Default: 0.",
    "device": "auto | cpu | cuda | cuda:N | mps, or a list: the first that is there. auto: a GPU if there is one.",
    "modules": "Python modules of your own, searched first.",
    "optional_modules": "The same, of which some may be missing, such as those of a machine's own.",
    "model": "A component: a torch.nn.Module.",
    "loaders": "A component: a dataset per phase. Keys here go to every phase; a phase's own keys win.",
    "loss": "A component: a module or a function f(output, target). Without it the model computes its loss.",
    "metrics": "Components: torchmetrics, objects with update/compute/reset, functions of (output, target).",
    "optimizer": "A component: a torch.optim.Optimizer; or several by name.",
    "lr_scheduler": "A component: a scheduler of torch.optim; or one for each of several optimizers.",
    "_base_": "A file, or a list of files, which this one is merged over.",
    "_delete_": "true: this mapping replaces the one of the base, and is not merged with it.",
    "_partial_": "true: the class or function itself, with these arguments fixed.",
    "name": "A bare name, or package.module:Name.",
}
_NEAR = ("dtrain.components.", "torch.optim")  # the libraries whose arguments a config's schema has, named or not
_NESTED = Slot(nested=True)
_PATH = {"type": "string", "pattern": r"[.:]|\$\{"}  # package.module:Name


class Keys(NamedTuple):
    """What may stand in a section beside its name."""

    properties: dict[str, Schema]
    required: list[str]
    open: bool
    summary: str

    @property
    def further(self) -> Any:
        """Of other keys: nothing, or where the signature does not tell, anything."""
        return ANYTHING if self.open else False


def schema_of(config: ConfigDict | None = None) -> Schema:
    """The schema of one config, with the arguments of what it names, of its modules, and of dtrain's own components.

    Without a config, of all that the libraries have. Where the config has bases, nothing is required: they may have it.
    """
    return _Writer(config).whole()


def call_keys(call: Call, section: str = "", texts: bool = True) -> Keys:
    """The arguments that a config may give what a call names."""
    try:
        target = call.target
    except ConfigError:
        return Keys({}, [], True, "")
    if not isinstance(target, Callee) or takes_config(call, target):
        return Keys({}, [], True, "")
    said = documented(target.module, target.name) if texts else None
    given = set(call.slot.given_names)
    if call.slot.nested:  # a function's first arguments may be left open, and may be given
        given |= {item.name for item in [supplied(call, target)] if item}
    else:
        given |= given_names(call, target)
    taken = [item for item in target.parameters if item.keyword and item.name not in given]
    ranges = RANGES.get(section, {})
    properties = {
        item.name: property_of(
            item, said.arguments.get(item.name, "") if said else "", ranges.get(item.name), _settings_in(section, item)
        )
        for item in taken
    }
    needed = [item.name for item in taken if item.default is None and item.name not in call.filled]
    required = [] if call.is_partial or is_passed_on(call, target) else needed
    return Keys(properties, required, target.open, said.summary if said else "")


def _settings_in(section: str, parameter: Parameter) -> Schema | None:
    """What a mapping among the values of one of the trainer's settings holds."""
    is_own = section == "trainer" and parameter.name in OWN_SETTINGS
    return {"$ref": f"#/$defs/{parameter.name}"} if is_own else None


@functools.cache
def own_keys(settings: str) -> Keys:
    """The keys of one group of dtrain's own settings."""
    section = {"loader": "loaders", "groups": "optimizer", "schedule": "lr_scheduler"}.get(settings, settings)
    slot = SLOTS.get(settings, Slot()) if settings in ("trainer", "mlflow") else Slot()
    return call_keys(Call(ConfigDict(), (settings,), slot, OWN_SETTINGS[settings]), section)


def library_names(libraries: Iterable[str]) -> list[str]:
    """The bare names that a section finds in its libraries."""
    found: set[str] = set()
    for library in libraries:
        try:
            found |= SOURCE.names(library)
        except SyntaxError:  # an optional library for another Python
            continue
    return sorted(found)


def searched(section: str) -> tuple[str, ...]:
    """The libraries in which a section looks for a bare name; transforms are not datasets."""
    return tuple(item for item in LIBRARIES[section] if section != "loaders" or "transforms" not in item)


def component_names(config: ConfigDict, section: str, is_nested: bool) -> list[str]:
    """The bare names that a section, or a call inside it, may use: one's own first."""
    libraries = ALL_LIBRARIES if is_nested else searched(section) if section in LIBRARIES else ()
    return list(dict.fromkeys([*library_names(own_modules(config)), *library_names(libraries)]))


class _Writer:
    """Writes the schema of one config, or of all."""

    def __init__(self, config: ConfigDict | None) -> None:
        self.config = config
        self.modules = own_modules(config) if config is not None else []
        self.calls = read(config).calls if config is not None else {}
        self.defs: dict[str, Schema] = {}  # those of single names
        places = getattr(config, "_places", {})
        self.is_complete = config is not None and not any(path[:1] == ("_base_",) for path in places)
        self.is_foreign = config is not None and bool(notes_on(config))  # pytorch-3dunet's, with nulls for nothing
        renamed = [*RENAMES, *(further_keys() if self.is_foreign or config is None else ())]
        self.other_names = [path for path in renamed if config is None or self.is_foreign or path in places]

    def whole(self) -> Schema:
        settings = {name: self.own(name) for name in OWN_SETTINGS}
        sections = {
            "model": self.component("model"),
            "loaders": self.loaders(),
            "loss": self.component("loss"),
            "metrics": self.metrics(),
            "optimizer": self.several("optimizer", "groups"),
            "lr_scheduler": self.several("lr_scheduler", "schedule"),
            "trainer": self.trainer(settings["trainer"]),
        }
        tops = {name: self.top(name) for name in TOP_LEVEL if name not in sections}
        top = tops | {name: {"$ref": f"#/$defs/{name}"} for name in sections}
        top |= {"_base_": {"type": ["string", "array"], "items": {"type": "string"}, "description": TEXTS["_base_"]}}
        top |= self.named_otherwise((), top)
        defs = {**definitions(), "component": self.nested(), **settings, **sections, **self.defs}
        return {
            "$schema": DIALECT,
            "title": "dtrain" if self.config is None else f"dtrain: {self.config.get('experiment')}",
            "type": "object",
            "properties": {name: top[name] for name in sorted(top, key=[*TOP_LEVEL, *top].index)},
            "additionalProperties": False,
            "$defs": defs,
        }

    def own(self, settings: str) -> Schema:
        """One group of dtrain's own settings."""
        keys = own_keys(settings)
        extra = self.named_otherwise((settings,), keys.properties)
        properties = {**{key: self.admitting_null(item) for key, item in keys.properties.items()}, **extra}
        result = {"type": ["object", "null"], "description": keys.summary, "properties": properties}
        if self.is_foreign and settings == "predictor":
            properties["name"] = {"type": "string"}  # it has one more
        required = {"required": keys.required} if keys.required and self.is_complete else {}
        return result | required | {"additionalProperties": False}

    def top(self, name: str) -> Schema:
        """A key of the top level that is not a component."""
        text = {"description": TEXTS[name]} if name in TEXTS else {}
        if name in OWN_SETTINGS:
            return {"$ref": f"#/$defs/{name}"}
        if name == "device":
            one = {"type": "string", "pattern": r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$|\$\{"}
            return {"anyOf": [one, {"type": "array", "items": one}], "default": "auto"} | text
        if "modules" in name:
            return {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
            } | text
        names = {"int": "integer", "str": "string", "None": "null"}
        types: list[Schema] = [{"type": names[item]} for item in TOP_LEVEL[name].split(" | ") if item in names]
        least, _ = RANGES[""].get(name, (None, None))
        result = any_of([*types, REFERENCE]) if types else {}
        return result | ({} if least is None else {"minimum": least}) | text

    # ------------------------------------------------------------------------------------------------- components

    def candidates(self, section: str, libraries: Iterable[str], slot: Slot) -> dict[str, Call]:
        """The names that a section may use and whose arguments the schema tells, each as a call."""
        result: dict[str, Call] = {}
        config = ConfigDict() if self.config is None else self.config
        near = [item for item in libraries if self.config is None or item.startswith(_NEAR)]
        for module in dict.fromkeys([*self.modules, *near]):
            for name in library_names([module]):
                if name not in result and (module not in self.modules or _is_callee(module, name)):
                    filled = frozenset({FILLED[name]} if section == "lr_scheduler" and name in FILLED else ())
                    path = f"{module}:{name}" if self.config is None else name
                    result[name] = Call(config, (section,), slot, path, filled=filled)
        return result | {name: call for call in self.used(section) for name in self.written_names(call)}

    def used(self, section: str) -> Iterator[Call]:
        """What the config itself names there; under 'component' what lies inside other calls."""
        if section == "component":
            yield from (inner for call in self.calls.values() for inner in inside(call))
        elif section == "loaders":
            yield from (self.calls[key] for key in self.calls if f"{key}.loader" in self.calls)
        else:
            own = [key for key in self.calls if key.partition(".")[0] == section and not key.endswith(".schedule")]
            yield from (self.calls[key] for key in own)

    def written_names(self, call: Call) -> list[str]:
        """A call's name as the file has it; pytorch-3dunet's names are translated."""
        name = str(call.name)
        return [name, name.rpartition(".")[2]] if self.is_foreign else [name]

    def branches(self, section: str, libraries: Iterable[str], slot: Slot) -> dict[str, Keys]:
        """The keys of each name."""
        result = {}
        for name, call in self.candidates(section, libraries, slot).items():
            keys = call_keys(call, section)
            if keys.properties or not keys.open:
                further = self.named_otherwise((section,), keys.properties)
                own = {key: self.admitting_null(item) for key, item in keys.properties.items()}
                result[name] = keys._replace(properties={**own, **further})
        return result

    def name_schema(self, section: str, libraries: Iterable[str]) -> Schema:
        """A bare name that is found, or a path."""
        known = [*(item for item in self.modules), *libraries]
        names = dict.fromkeys([*(call.name for call in self.used(section)), *library_names(known)])
        enum: Schema = {"enum": [name for name in names if isinstance(name, str)]}
        others = _PATH if self.config is not None else {"type": "string"}  # a config may have modules of its own
        return {"anyOf": [enum, others], "description": TEXTS["name"]}

    def admitting_null(self, schema: Schema) -> Schema:
        """The same where null means that there is nothing, as in pytorch-3dunet's files."""
        if not self.is_foreign or schema.get("$ref") == ANYTHING["$ref"]:
            return schema
        return {"anyOf": [schema, {"type": "null"}]}

    def named_otherwise(self, path: KeyPath, properties: Mapping[str, Any]) -> dict[str, Schema]:
        """The same keys by the names that other programs have for them, as far as the config uses them."""
        found: dict[str, Schema] = {}
        for old in self.other_names:
            if old[:-1] == path and old[-1] not in properties:
                new = RENAMES.get(old, ())
                same = properties.get(str(new[-1])) if new[:-1] == path and new else None
                text = f"Another program's name of {'.'.join(map(str, new))}." if new else "Of pytorch-3dunet's files."
                if not same and len(new) == 1:
                    same = {"$ref": f"#/$defs/{new[0]}"} if str(new[0]) in SLOTS else None
                if old[-1] == "eval_score_higher_is_better":
                    same = {"type": "boolean"}
                found[str(old[-1])] = {**(same or {}), "description": text, "deprecated": True}
        return found

    def name_key(self, section: str) -> str:
        """`name`, or what the file has in its place."""
        others = [str(old[-1]) for old in self.other_names if RENAMES.get(old) == (section, "name")]
        written = getattr(self.config, "_places", {})
        return next((key for key in others if (section, key) in written and len(others) == 1), "name")

    def component(self, section: str, settings: str = "") -> Schema:
        """A section that names one component, with dtrain's own keys beside its arguments."""
        libraries = searched(section)
        name = {"name": self.name_schema(section, libraries)}
        result = self.by_name(name, self.branches(section, libraries, SLOTS[section]), _refs(settings))
        return {"type": ["object", "null"], "description": TEXTS[section], **result}

    def nested(self) -> Schema:
        """A component inside another one."""
        branches = self.branches("component", ALL_LIBRARIES, _NESTED)
        partial = {"_partial_": {"type": "boolean", "description": TEXTS["_partial_"]}}
        name = self.name_schema("component", ALL_LIBRARIES)
        name["anyOf"] = [*name["anyOf"], {"type": "array", "items": {"type": "string"}}]
        return {"type": "object", **self.by_name({"name": name}, branches, partial), "required": ["name"]}

    def by_name(self, name: Schema, branches: Mapping[str, Keys], extra: Mapping[str, Schema]) -> Schema:
        """What may stand beside each name; of one that is not known, anything."""
        taken = {key for keys in branches.values() for key in keys.properties}
        delete = {"_delete_": {"type": "boolean", "description": TEXTS["_delete_"]}}
        free = {key: item for key, item in extra.items() if key not in taken}
        rules = [
            {
                "if": _is_named("name", one),
                "then": {
                    "properties": {"name": {"description": keys.summary}, **extra, **keys.properties, **delete},
                    **({"required": keys.required} if keys.required and self.is_complete else {}),
                    "additionalProperties": keys.further,
                },
            }
            for one, keys in branches.items()
        ]
        required = {"required": ["name"]} if self.is_complete and not self.is_foreign else {}
        return {"properties": {**name, **free, **delete}, **required, **({"allOf": rules} if rules else {})}

    def several(self, section: str, settings: str) -> Schema:
        """One component, or several by labels of the user's own."""
        self.defs[f"{section}.one"] = self.component(section, settings)
        one = {"$ref": f"#/$defs/{section}.one"}
        several = {"additionalProperties": {"if": {"type": "object"}, "then": one}}
        is_one = {"properties": {"name": {"type": "string"}}, "required": ["name"]}
        labelled = {"not": is_one, "additionalProperties": {"type": ["object", "null"]}, "minProperties": 1}
        return {
            "type": ["object", "null"],
            "description": TEXTS[section],
            "if": {**labelled, "type": "object"},
            "then": several,
            "else": one,
        }

    # ------------------------------------------------------------------------------------------ particular sections

    def loaders(self) -> Schema:
        """A dataset for each phase: named beside the phases, or in each."""
        libraries = searched("loaders")
        branches = self.branches("loaders", libraries, SLOTS["loaders"])
        own, key = _refs("loader"), self.name_key("loaders")
        own |= {each: {"$ref": "#/$defs/sampler"} for each in ("sampler", "batch_sampler")}
        name = {"name": self.name_schema("loaders", libraries)}
        label: Schema = {"label": {"type": "string", "description": "Of one of several sets: its figures' name."}}
        self.defs["sampler"] = self.sampler()
        self.defs["phase"] = {"type": ["object", "null"], **self.by_name(name, {}, own | label)}
        self.defs["phase"].pop("required", None)
        self.defs["phase"]["allOf"] = [
            {"if": _is_named("name", one), "then": {"$ref": f"#/$defs/loaders.{one}"}} for one in branches
        ]
        phases = {each: _one_or_list({"$ref": "#/$defs/phase"}, each) for each in PHASES}
        phases |= {"valid": phases["val"]} if ("loaders", "valid") in self.other_names else {}
        beside = {"folds": {"anyOf": [{"$ref": "#/$defs/folds"}, {"type": "null"}]}, "_delete_": True}
        for one, keys in branches.items():
            about: Schema = {"name": {"description": keys.summary}}
            inner = {**about, **own, **keys.properties, **label, "_delete_": True}
            self.defs[f"loaders.{one}"] = {"properties": inner, "additionalProperties": keys.further}
        rules = [
            {"if": _is_named(key, one), "then": self.shared_data(one, keys, {**own, **beside, key: True}, phases)}
            for one, keys in branches.items()
        ]
        properties = {key: name["name"], **own, **beside, **phases}
        result: Schema = {"type": ["object", "null"], "description": TEXTS["loaders"], "properties": properties}
        if self.calls and all(not call_keys(call, texts=False).open for call in self.used("loaders")):
            shared = {name for keys in branches.values() for name in keys.properties}
            unnamed = _closed([*properties, *shared])
            result |= {"if": {"not": {"required": [key]}}, "then": unnamed}
        return result | ({"allOf": rules} if rules else {})

    def shared_data(self, one: str, keys: Keys, beside: Mapping[str, Any], phases: Iterable[str]) -> Schema:
        """A section whose phases share a dataset, and may have keys of their own."""
        own = {name: {"$ref": f"#/$defs/loaders.{one}/properties/{name}"} for name in keys.properties}
        is_unnamed = {"type": "object", "not": {"required": ["name"]}}
        unnamed = {"if": is_unnamed, "then": {"$ref": f"#/$defs/loaders.{one}"}}
        within = {each: _one_or_list(unnamed, each) for each in phases}
        return {"properties": {**beside, **own, **within}, "additionalProperties": keys.further}

    def sampler(self) -> Schema:
        libraries = LIBRARIES["sampler"]
        branches = self.branches("loaders.train", libraries, SAMPLER_SLOT)
        name = {"name": self.name_schema("loaders.train", libraries)}
        return {"type": ["object", "null"], **self.by_name(name, branches, {}), "description": "Which samples come."}

    def metrics(self) -> Schema:
        """`{name: [A, B], shared: 1, A: {own: 2}}`, `{label: {name: A}}` or `[{name: A}]`."""
        libraries = searched("metrics")
        # Task and number of classes are filled in where model and loss leave no doubt.
        branches = {
            name: keys._replace(required=[])
            for name, keys in self.branches("metrics", libraries, SLOTS["metrics"]).items()
        }
        own, name = _refs("metric"), self.name_schema("metrics", libraries)
        self.defs["metric.one"] = {
            **self.by_name({"name": name}, branches, own),
            "type": "object",
            "required": ["name"],
        }
        one, rules = {"$ref": "#/$defs/metric.one"}, []
        for each, keys in branches.items():
            named = {"anyOf": [{"const": each}, {"type": "array", "contains": {"const": each}}]}
            inner = {"type": ["object", "null"], "properties": {**own, **keys.properties}}
            self.defs[f"metrics.{each}"] = {**inner, "additionalProperties": keys.further}
            args = {key: {"$ref": f"#/$defs/metrics.{each}/properties/{key}"} for key in keys.properties}
            takes = {**own, **args, re.split(r"[.:]", each)[-1]: {"$ref": f"#/$defs/metrics.{each}"}}
            rule: Schema = {"properties": takes, **({"additionalProperties": ANYTHING} if keys.open else {})}
            rules.append({"if": {"properties": {"name": named}}, "then": rule})
        known = {"enum": [*branches]}
        names = {"anyOf": [known, {"type": "array", "items": known}]}
        several = {"properties": {"name": {"anyOf": [name, {"type": "array", "items": name, "minItems": 1}]}}}
        by_name = {
            **several,
            "if": {"properties": {"name": names}},
            "then": {
                "properties": {"name": True, "_delete_": True},
                **({"allOf": rules} if rules else {}),
                "unevaluatedProperties": False,
            },
        }
        key = self.name_key("metrics")
        return {
            "type": ["object", "array", "null"],
            "description": TEXTS["metrics"],
            "if": {"type": "object", "required": [key]},
            "then": by_name,
            "else": {"items": one, "additionalProperties": one},
        }

    def trainer(self, own: Schema) -> Schema:
        """The trainer's settings, and those of a class of one's own."""
        call = self.calls.get("trainer")
        keys = call_keys(call, "trainer") if call is not None else None
        further = keys.properties if keys else {}
        name = {"type": ["string", "array"], "items": {"type": "string"}, "description": "A Trainer of your own."}
        properties = {**further, **own["properties"], "name": name, "_delete_": {"type": "boolean"}}
        if self.config is None:  # a class of one's own may take anything
            own = own | {"if": {"not": {"required": ["name"]}}, "then": _closed(properties)}
        is_open = self.config is None or (keys is not None and keys.open)
        return {**own, "properties": properties, "additionalProperties": ANYTHING if is_open else False}


def _is_callee(module: str, name: str) -> bool:
    try:
        return isinstance(SOURCE.lookup(module, name), Callee)
    except SyntaxError:
        return False


def inside(call: Call) -> Iterator[Call]:
    """The calls among a call's arguments, at any depth."""
    for inner in call.components.values():
        yield inner
        yield from inside(inner)


def _refs(settings: str) -> dict[str, Schema]:
    """The keys of one group of dtrain's own settings, as references."""
    names = own_keys(settings).properties if settings else ()
    return {name: {"$ref": f"#/$defs/{settings}/properties/{name}"} for name in names}


def _closed(properties: Iterable[str]) -> Schema:
    return {"properties": dict.fromkeys(properties, True), "additionalProperties": False}


def _is_named(key: str, name: str) -> Schema:
    return {"required": [key], "properties": {key: {"const": name}}}


def _one_or_list(schema: Schema, phase: str) -> Schema:
    """A phase's data set; of val and test there may be several."""
    if phase not in OF_SEVERAL_SETS:
        return schema
    return {"if": {"type": "array"}, "then": {"items": schema, "minItems": 1}, "else": schema}
