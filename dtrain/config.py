"""YAML and overrides in, one locked ConfigDict out, every key with its place; knows no component, no torch, no rank."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.yamlfile import ConfigError, KeyPath, Mistake, Place, did_you_mean, dotted, dump, parse, scalar

MAX_BYTES = 4_000_000  # no hand-written config is larger; a data file given by mistake is refused before it is parsed


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read a YAML file, the files under its `_base_`, and `KEY=VALUE` overrides into one config.

    Args:
        path: The YAML file.
        overrides: `KEY=VALUE` texts; dotted keys, list indices as numbers, values in YAML.

    Returns:
        A locked ConfigDict with canonical key names; mappings inside lists are ConfigDicts too.

    Raises:
        ConfigError: With every mistake that reading can find.
    """
    tree = _read_file(Path(path), ancestors=())
    tree.values.setdefault("experiment", Path(path).stem)
    mistakes: list[Mistake] = []
    for text in overrides:
        try:
            _override(tree, text)
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    if overrides:
        tree.texts["overrides.txt"] = "\n".join([*overrides, ""])
    return _to_config(tree)


def sources(config: ConfigDict) -> dict[str, str]:
    """The texts that a config was read from, as written: file name -> text."""
    return dict(getattr(config, "_texts", {}))


def from_mapping(values: Mapping[str, Any]) -> ConfigDict:
    """The same for a mapping made in Python: a locked deep copy with canonical key names (no places)."""
    if isinstance(values, ConfigDict) and hasattr(values, "_places"):
        return values
    tree = _Tree(to_plain(values), {})
    _canonical_names(tree)
    return _to_config(tree)


def place_of(config: ConfigDict, path: Sequence[str | int]) -> Place | None:
    """Where the key `path` of `config` was written; the nearest key above it that has a place otherwise."""
    places = getattr(config, "_places", {})
    path = tuple(path)
    while path and path not in places:
        path = path[:-1]
    return places.get(path)


def to_plain(value: Any) -> Any:
    """A deep copy in plain dicts and lists (ConfigDict's own to_dict shares lists and skips dicts inside them)."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: to_plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return copy.deepcopy(value)


def to_config_dict(value: Any) -> Any:
    """A deep copy with unlocked ConfigDicts for mappings, also inside lists, in the order written."""
    if isinstance(value, Mapping | ConfigDict):
        result = ConfigDict(sort_keys=False)
        for key in value:
            result[key] = to_config_dict(value[key])
        return result
    if isinstance(value, list | tuple):
        return [to_config_dict(item) for item in value]
    return copy.deepcopy(value)


def to_yaml(config: Mapping[str, Any] | ConfigDict) -> str:
    """The config as YAML that load_config reads back to the same values."""
    return dump(_escaped(to_plain(config)))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------- files and `_base_`


@dataclass
class _Tree:
    """Plain values with the place of every key."""

    values: dict[str, Any]
    places: dict[KeyPath, Place]
    texts: dict[str, str] = field(default_factory=dict)  # the files as written, by name


def _read_file(path: Path, ancestors: tuple[Path, ...], place: Place | None = None) -> _Tree:
    text = _read_text(path, place)
    if path.resolve() in ancestors:
        raise ConfigError(Mistake(f"'_base_' goes round in a circle: {path} is already being read", place))
    values, places = parse(text, str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ConfigError(
            Mistake(
                f"the file {found}; a config is a mapping of sections (model, loaders, ...)", Place(str(path), 1, 1)
            )
        )
    tree = _Tree(values, places, {path.name: text})
    bases = tree.values.pop("_base_", None)
    _canonical_names(tree)
    if bases is None:
        return tree
    where = tree.places.get(("_base_",))
    names = bases if isinstance(bases, list) else [bases]
    result = _Tree({}, {})
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(Mistake(f"'_base_' takes a file name or a list of them, found {name!r}", where))
        base = _read_file(path.parent / name, (*ancestors, path.resolve()), where)
        _merge(result, base, ())
        result.texts |= base.texts
    _merge(result, tree, ())
    result.texts |= tree.texts
    return result


def _read_text(path: Path, place: Place | None) -> str:
    """The file's text; every reason why there is none is one mistake."""
    try:
        if path.is_dir():
            raise ConfigError(Mistake(f"{path} is a folder, expected a YAML file", place))
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(Mistake(f"{path} is larger than {MAX_BYTES // 1_000_000} MB; that is no config", place))
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        known = [str(folder / item.name) for item in folder.iterdir() if item.suffix in (".yaml", ".yml")]
        raise ConfigError(Mistake(f"there is no file {path}{did_you_mean(str(path), known)}", place)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            Mistake(f"not UTF-8 text: byte {error.object[error.start]:#x} at {error.start}", Place(str(path), 1, 1))
        ) from None
    except OSError as error:
        raise ConfigError(Mistake(f"cannot read {path}: {error.strerror}", place)) from None
    except ValueError as error:  # a NUL byte in the name
        raise ConfigError(Mistake(f"cannot read {str(path)!r}: {error}", place)) from None


def _merge(into: _Tree, other: _Tree, path: KeyPath) -> None:
    """Lay `other` over `into`: mappings key by key, everything else replaced. `_delete_: true` drops what lay below."""
    below, above = _at(into.values, path), _at(other.values, path)
    for key, value in above.items():
        here = (*path, key)
        mergeable = isinstance(value, dict) and isinstance(below.get(key), dict)
        if mergeable and value.pop("_delete_", False) is not True:
            into.places[here] = other.places.get(here, into.places.get(here, Place("")))
            _merge(into, other, here)
            continue
        if isinstance(value, dict):
            value.pop("_delete_", None)
        below[key] = value
        into.places = {old: place for old, place in into.places.items() if old[: len(here)] != here}
        into.places |= {old: place for old, place in other.places.items() if old[: len(here)] == here}


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values[key]
    return values


# ------------------------------------------------------------------------------------------------------ other dialects

# pytorch-3dunet's and its forks' names for the same settings. One table, applied to files and overrides alike, so that
# everything behind load_config knows one name for each thing.
_RENAMES: dict[KeyPath, KeyPath] = {
    ("manual_seed",): ("seed",),
    ("eval_metric",): ("metrics",),
    ("metrics", "names"): ("metrics", "name"),
    ("trainer", "optimizer"): ("optimizer",),
    ("trainer", "lr_scheduler"): ("lr_scheduler",),
    ("optimizer", "learning_rate"): ("optimizer", "lr"),
    ("loaders", "dataset"): ("loaders", "name"),
    ("loaders", "valid"): ("loaders", "val"),
    ("loaders", "train", "dataset"): ("loaders", "train", "name"),
    ("loaders", "val", "dataset"): ("loaders", "val", "name"),
    ("loaders", "test", "dataset"): ("loaders", "test", "name"),
    ("trainer", "max_num_epochs"): ("trainer", "max_epochs"),
    ("trainer", "max_num_iterations"): ("trainer", "max_steps"),
    ("trainer", "validate_after_iters"): ("trainer", "validate_every_steps"),
    ("trainer", "log_after_iters"): ("trainer", "log_every_steps"),
    ("trainer", "eval_score_higher_is_better"): ("trainer", "mode"),
    ("trainer", "mlflow_path"): ("mlflow", "tracking_uri"),
    ("trainer", "experiment_name"): ("experiment",),
    ("mlflow", "mlflow_path"): ("mlflow", "tracking_uri"),
    ("mlflow", "experiment_name"): ("experiment",),
    ("mlflow_path",): ("mlflow", "tracking_uri"),
    ("experiment_name",): ("experiment",),
}
_MODES = {True: "max", False: "min"}


def _canonical_names(tree: _Tree) -> None:
    for old, new in _RENAMES.items():
        parent = _mapping_at(tree.values, old[:-1])
        if parent is None or old[-1] not in parent:
            continue
        place = tree.places.get(old)
        target = _mapping_at(tree.values, new[:-1], create=True)
        if target is None or new[-1] in target:
            text = f"'{dotted(old)}' and '{dotted(new)}' are two names of one setting; keep one of them"
            raise ConfigError(Mistake(text, place))
        value = parent.pop(old[-1])
        target[new[-1]] = _MODES[value] if isinstance(value, bool) and new == ("trainer", "mode") else value
        moved = {(*new, *path[len(old) :]): where for path, where in tree.places.items() if path[: len(old)] == old}
        tree.places = {path: where for path, where in tree.places.items() if path[: len(old)] != old} | moved
    metrics = tree.values.get("metrics")
    if isinstance(metrics, dict) and isinstance(metrics.get("multiple"), bool):
        del metrics["multiple"]  # a fork's flag for 'name is a list', which the list itself says


def _mapping_at(values: Any, path: KeyPath, create: bool = False) -> dict[Any, Any] | None:
    for key in path:
        if isinstance(values, dict) and create and values.get(key) is None:
            values[key] = {}
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def _canonical_path(path: KeyPath) -> KeyPath:
    for old, new in _RENAMES.items():
        if path[: len(old)] == old:
            path = (*new, *path[len(old) :])
    return path


# ---------------------------------------------------------------------------------------------------------- overrides


def _override(tree: _Tree, text: str) -> None:
    """Set one `KEY=VALUE` in the tree.

    Raises:
        ConfigError: The text has no '=', no key, a bad value, or leads through something that is no mapping or list.
    """
    place = Place(f"argument '{text}'")
    key, equals, value_text = text.partition("=")
    if not equals or not key or key.startswith(".") or key.endswith(".") or ".." in key:
        raise ConfigError(Mistake("expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3", place))
    value, places = parse(value_text, text, place)
    parts = tuple(key.split("."))
    path = _canonical_path(parts)
    if parts[-1] == "eval_score_higher_is_better" and isinstance(value, bool):
        value = _MODES[value]
    parent: Any = tree.values
    done: KeyPath = ()
    for part, following in zip(path, (*path[1:], None), strict=True):
        index = _step(parent, str(part), done, place)
        done = (*done, index)
        tree.places[done] = place if following is None or done not in tree.places else tree.places[done]
        if following is None:
            parent[index] = value
            tree.places = {old: where for old, where in tree.places.items() if old[: len(done)] != done or old == done}
            tree.places |= {(*done, *rest): place for rest in places}
        else:
            if isinstance(parent, dict) and parent.get(index) is None:
                parent[index] = {}
            parent = parent[index]


def _step(parent: Any, part: str, done: KeyPath, place: Place) -> Any:
    """The key or the list index that `part` means inside `parent`."""
    if isinstance(parent, dict):
        if part.startswith("__") or not part.isprintable():
            raise ConfigError(Mistake(f"{part!r} cannot be a key", place))
        return part
    if isinstance(parent, list):
        if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(parent):
            possible = f"0 to {len(parent) - 1}" if parent else "none, it is empty"
            raise ConfigError(
                Mistake(f"'{dotted(done)}' is a list: '{part}' is none of its indices ({possible})", place)
            )
        return int(part)
    raise ConfigError(Mistake(f"'{dotted(done)}' is {parent!r}, so it has no key '{part}'", place))


# ------------------------------------------------------------------------------------------------------ `${...}`

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}$]*)\}")


def _interpolate(tree: _Tree) -> None:
    mistakes: list[Mistake] = []
    for path, value in list(_texts(tree.values)):
        if "${" in value:
            try:
                parent = _at(tree.values, path[:-1])
                parent[path[-1]] = _resolved(tree, path, ())
            except ConfigError as error:
                mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)


def _texts(values: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, str):
            yield (*path, key), value
        else:
            yield from _texts(value, (*path, key))


def _resolved(tree: _Tree, path: KeyPath, chain: tuple[KeyPath, ...]) -> Any:
    """The value at `path` with its references replaced; a text that is one reference keeps the type of its target."""
    text = _at(tree.values, path)
    place = tree.places.get(path)
    if path in chain:
        raise ConfigError(
            Mistake(f"'{dotted(path)}' refers to itself: {' -> '.join(map(dotted, (*chain, path)))}", place)
        )
    if not isinstance(text, str):
        return _resolved_tree(tree, path, chain)
    whole = _REFERENCE.fullmatch(text)
    if whole and whole[1] is not None:
        return _target(tree, whole[1], path, chain)

    def part(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${"  # `$${` writes a literal `${`
        value = _target(tree, match[1], path, chain)
        if isinstance(value, dict | list):
            raise ConfigError(Mistake(f"'${{{match[1]}}}' is a {type(value).__name__}; it can only stand alone", place))
        return "" if value is None else str(value)

    return _REFERENCE.sub(part, text)


def _resolved_tree(tree: _Tree, path: KeyPath, chain: tuple[KeyPath, ...]) -> Any:
    value = copy.deepcopy(_at(tree.values, path))
    for inner, text in list(_texts(value)):
        if "${" in text:
            _at(value, inner[:-1])[inner[-1]] = _resolved(tree, (*path, *inner), (*chain, path))
    return value


def _target(tree: _Tree, reference: str, path: KeyPath, chain: tuple[KeyPath, ...]) -> Any:
    """`NAME`, `NAME:-default` from the environment, `a.b` from the config."""
    name, has_default, default = reference.partition(":-")
    place = tree.places.get(path)
    if "." not in name and name in os.environ:
        return scalar(os.environ[name])
    if has_default:
        return scalar(default)
    keys: KeyPath = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    try:
        _at(tree.values, keys)
    except (KeyError, IndexError, TypeError):
        if "." in name:
            known = [dotted(known) for known in tree.places]
            raise ConfigError(Mistake(f"'${{{reference}}}': no such key{did_you_mean(name, known)}", place)) from None
        text = f"'${{{reference}}}': the environment has no variable {name!r}; set it, or write ${{{name}:-default}}"
        raise ConfigError(Mistake(text, place)) from None
    return _resolved(tree, keys, (*chain, path))


# ------------------------------------------------------------------------------------------------------------- result


def _to_config(tree: _Tree) -> ConfigDict:
    _interpolate(tree)
    config = to_config_dict(tree.values)
    _lock(config)
    # Places ride along outside of the fields: they are no settings, and a copy of a section needs none.
    object.__setattr__(config, "_places", tree.places)
    object.__setattr__(config, "_texts", tree.texts)
    return config


def _lock(value: Any) -> None:
    if isinstance(value, ConfigDict):
        value.lock()
    for item in value.values() if isinstance(value, ConfigDict) else value if isinstance(value, list) else ():
        _lock(item)
