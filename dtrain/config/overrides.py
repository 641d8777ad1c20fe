"""`KEY=VALUE` on the command line: dots lead into sections, numbers into lists; the value is YAML."""

import re
from typing import Any

from dtrain.config.errors import ConfigError, KeyPath, Place, dotted, shown
from dtrain.config.pytorch3dunet import canonical_key, canonical_names
from dtrain.config.yaml12 import key_mistake, parse


def override(values: dict[str, Any], places: dict[KeyPath, Place], text: str) -> None:
    """Set one `KEY=VALUE` in the values of a config, and note its place; a ConfigError says what is wrong with it."""
    place = Place(f"argument {shown(text)}")
    key, equals, value_text = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError("expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3", place)
    value, inner_places = parse(value_text, text, place)
    if isinstance(value, dict):
        value.pop("_delete_", None)  # whatever a base says, an override replaces all of it
    path, value = canonical_key(tuple(key.split(".")), value, values)
    parent: Any = values
    done: KeyPath = ()
    for part in path[:-1]:
        index = _step(parent, str(part), done, place)
        done = (*done, index)
        if isinstance(parent, dict) and parent.get(index) is None:
            parent[index] = {}
            places[done] = place
        parent = parent[index]
    last = _step(parent, str(path[-1]), done, place)
    parent[last] = value
    places |= {(*done, last): place} | {(*done, last, *rest): place for rest in inner_places}
    canonical_names(values, places)  # the value may be a mapping in another dialect


def _step(parent: Any, part: str, done: KeyPath, place: Place) -> Any:
    """The key or the list index that `part` means inside `parent`."""
    if isinstance(parent, dict):
        if wrong := key_mistake(part, done):
            raise ConfigError(wrong, place)
        return part
    if isinstance(parent, list):
        if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(parent):
            possible = f"0 to {len(parent) - 1}" if parent else "none, it is empty"
            text = f"'{dotted(done)}' is a list: {shown(part)} is not one of its indices ({possible})"
            raise ConfigError(text, place)
        return int(part)
    raise ConfigError(f"'{dotted(done)}' is {shown(parent)}, so it has no key {shown(part)}", place)
