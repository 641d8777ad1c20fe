"""From a YAML file, the files under its `_base_` and overrides to one locked ConfigDict that knows its keys' places."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, KeyPath, Mistake, Place, dotted, found, is_mapping, type_name
from dtrain.config.folds import fill_in_validation
from dtrain.config.overrides import override
from dtrain.config.pytorch3dunet import canonical_names, translate
from dtrain.config.variables import expand
from dtrain.config.yaml12 import MAX_DEPTH, dump, key_mistake, parse, read_text

MAX_FILES = 100  # under `_base_`, counted as often as they are read


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read a YAML file, the files under its `_base_`, and `KEY=VALUE` overrides into one config.

    Overrides have dotted keys, list indices as numbers, and values in YAML. The result is a locked ConfigDict with
    canonical key names; mappings inside lists are ConfigDicts too. A ConfigError has every mistake that reading can
    find.
    """
    return _to_config(_read(path, overrides))


def merged(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain values whose `${...}` are left to be resolved where they are read next."""
    return _read(path, overrides).values


def _read(path: str | Path, overrides: Sequence[str]) -> "_Tree":
    tree = _read_file(Path(path), (), None, iter(range(MAX_FILES)))
    _apply_all(overrides, lambda text: override(tree.values, tree.places, text))
    if overrides:
        tree.texts["overrides.txt"] = "\n".join([*overrides, ""])
    if tree.values.get("experiment") is None:
        tree.values["experiment"] = Path(path).stem
    return tree


def sources(config: ConfigDict) -> dict[str, str]:
    """The texts that a config was read from, as written: file name -> text."""
    return dict(getattr(config, "_texts", {}))


def from_mapping(values: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The same for a mapping made in Python: a locked deep copy with canonical key names (no places).

    It may hold plain values, lists and mappings with text keys only; else a ConfigError.
    """
    if isinstance(values, ConfigDict) and hasattr(values, "_places"):
        return values
    if not is_mapping(values):
        raise ConfigError(f"expected a mapping, {found(values)}; dtrain.load_config reads a file")
    mistakes: list[Mistake] = []
    tree = _Tree(_checked(values, (), mistakes), {})
    if mistakes:
        raise ConfigError(mistakes)
    canonical_names(tree.values, tree.places)
    if tree.values.get("experiment") is None:  # else a copy in a file would be named by that
        tree.values["experiment"] = "default"
    return _to_config(tree)


def _checked(value: Any, path: KeyPath, mistakes: list[Mistake]) -> Any:
    """A plain copy of a value made in Python."""
    if len(path) > MAX_DEPTH:
        mistakes.append(Mistake(f"{dotted(path[:3])}...: nesting deeper than {MAX_DEPTH}"))
        return None
    if is_mapping(value):
        for key in value:
            if wrong := key_mistake(key, path) if isinstance(key, str) else f"a key must be a string, {found(key)}":
                mistakes.append(Mistake(f"{dotted(path)}: {wrong}" if path else wrong))
        return {key: _checked(value[key], (*path, key), mistakes) for key in value}
    if isinstance(value, list | tuple):
        return [_checked(item, (*path, index), mistakes) for index, item in enumerate(value)]
    if isinstance(value, bool | None):
        return value
    if isinstance(value, Integral | Real):  # so are NumPy's numbers
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, str | Path):
        return str(value)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    mistakes.append(Mistake(f"{dotted(path)}: a config holds plain values, lists and mappings only, found a {name}"))
    return None


def notes_on(config: ConfigDict) -> list[str]:
    """Lines for the user about how keys of another program's file were read."""
    return list(getattr(config, "_notes", ()))


def run_folder(config: ConfigDict) -> Path:
    """Where a training leaves what it makes: `trainer.checkpoint_dir`, else a folder named like the experiment."""
    named = (config.get("trainer") or {}).get("checkpoint_dir")
    return Path(named or f"runs/{config.get('experiment') or 'default'}")


def place_of(config: ConfigDict, path: Sequence[str | int]) -> Place | None:
    """Where the key `path` of `config` was written; the nearest key above it that has a place otherwise."""
    places = getattr(config, "_places", {})
    return next((places[above] for end in range(len(path), -1, -1) if (above := tuple(path[:end])) in places), None)


def to_config_dict(value: Any, locked: bool = False) -> Any:
    """A deep copy with ConfigDicts for mappings, also inside lists, in the order written."""
    if is_mapping(value):
        result = ConfigDict(sort_keys=False, allow_dotted_keys=True)  # keys of data may be regular expressions
        for key in value:
            result[key] = to_config_dict(value[key], locked)
        return result.lock() if locked else result
    return [to_config_dict(item, locked) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Mapping[str, Any] | ConfigDict) -> str:
    """The config as YAML that load_config reads back to the same values."""
    return dump(_escaped(config))


def _escaped(value: Any) -> Any:
    """A plain copy of a value that `expand` turns back into it."""
    if is_mapping(value):
        return {key: _escaped(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


@dataclass
class _Tree:
    """Plain values with the place of every key. A place may be left over from a value that was replaced."""

    values: dict[str, Any]
    places: dict[KeyPath, Place]
    texts: dict[str, str] = field(default_factory=dict)  # the files as written, by name


def _apply_all(items: Sequence[Any], action: Callable[[Any], None]) -> None:
    """Do it for each item, and raise all mistakes together."""
    mistakes: list[Mistake] = []
    for item in items:
        try:
            action(item)
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)


def _read_file(path: Path, ancestors: tuple[Path, ...], place: Place | None, left: Iterator[int]) -> _Tree:
    """A file merged over the files under its `_base_`. `left` counts down the files that may still be read."""
    if next(left, None) is None:
        raise ConfigError(f"more than {MAX_FILES} files under '_base_'", Place(ancestors[0].name, 1, 1))
    text = read_text(path, place)
    if path.resolve() in ancestors:
        raise ConfigError(f"circular reference in '_base_': {path} is already being read", place)
    values, places = parse(text, str(path))
    start = Place(str(path), 1, 1)
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type_name(values)}"
        raise ConfigError(f"the file {what}; a config is a mapping of sections (model, loaders, ...)", start)
    own = _Tree(values, places | {(): start}, {path.name: text})
    result = _Tree({}, {})

    def read_base(index: int) -> None:
        where = own.places.get(("_base_", index), own.places.get(("_base_",)))
        if not isinstance(bases[index], str):
            raise ConfigError(f"_base_: expected a file name or a list of them, {found(bases[index])}", where)
        _merge(result, _read_file(path.parent / bases[index], (*ancestors, path.resolve()), where, left))

    base = expand(own.values, own.places, values.pop("_base_", None), ("_base_",))
    bases = base if isinstance(base, list) else [] if base is None else [base]
    _apply_all(range(len(bases)), read_base)
    canonical_names(own.values, own.places)
    _merge(result, own)
    return result


def _merge(into: _Tree, other: _Tree) -> None:
    """Merge `other` into `into`: mappings key by key, all else is replaced, also mappings with `_delete_: true`."""
    replaced: set[KeyPath] = set()

    def merge(below: dict[str, Any], above: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        for key, value in above.items():
            here = (*path, key)
            if isinstance(value, dict):
                delete = value.pop("_delete_", False)
                if not isinstance(delete, bool):
                    text = f"{dotted((*here, '_delete_'))}: expected true or false, {found(delete)}"
                    raise ConfigError(text, other.places.get((*here, "_delete_")))
                if isinstance(below.get(key), dict) and not delete:
                    merge(below[key], value, here)
                    continue
                value = merge({}, value, here)
            below[key] = value
            replaced.add(here)
        return below

    merge(into.values, other.values, ())
    kept = (path for path in into.places if not any(path[:end] in replaced for end in range(1, len(path) + 1)))
    into.places = {path: into.places[path] for path in kept} | other.places
    for name, text in other.texts.items():
        while name in into.texts and into.texts[name] != text:  # two files of one name in different folders
            name = f"_{name}"
        into.texts[name] = text


def _to_config(tree: _Tree) -> ConfigDict:
    values = expand(tree.values, tree.places, tree.values)
    notes = translate(values, tree.places)
    fill_in_validation(values, tree.places)
    config = to_config_dict(values, locked=True)
    # Places are kept beside the fields: they are not settings, and a copy of a section needs none.
    for name, kept in (("_places", tree.places), ("_texts", tree.texts), ("_notes", notes)):
        object.__setattr__(config, name, kept)
    return config
