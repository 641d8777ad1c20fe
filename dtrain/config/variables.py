"""`${NAME}`, `${NAME:-default}` and `${section.key}` in a config's values: of the environment, or of another key."""

import os
import re
from collections.abc import Mapping
from typing import Any

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, KeyPath, Mistake, Place, dotted, shown, type_name
from dtrain.config.yaml12 import MAX_DEPTH, MAX_VALUES, scalar

_REFERENCE = re.compile(r"(?P<literal>\$\$\{)|\$\{(?P<name>[^{}]*)\}|(?P<broken>\$\{)")
_FORMS = "write ${NAME}, ${NAME:-default} or ${section.key}, and $${ for a plain ${"
_TEXTS = {("experiment",), ("run_name",)}  # the environment's `12345` is a name here, and cannot be put in quotes


def expand(values: Mapping[str, Any], places: Mapping[KeyPath, Place], value: Any, path: KeyPath = ()) -> Any:
    """A copy of `value`, which stands at `path` of the whole config, with its variables replaced.

    The config's own `values` stay as they are, so the order of keys does not matter. A ConfigError has every reference
    that leads nowhere.
    """
    expansion = _Expansion(values, places)
    result = expansion.value(value, path)
    if expansion.mistakes:
        raise ConfigError(expansion.mistakes)
    return result


class _Expansion:
    """Replaces variables and collects every mistake; `chain` is always the keys whose references led here."""

    def __init__(self, values: Mapping[str, Any], places: Mapping[KeyPath, Place]) -> None:
        self.values, self.places = values, places
        self.count = self.depth = 0
        self.mistakes: list[Mistake] = []

    def value(self, value: Any, path: KeyPath, chain: tuple[KeyPath, ...] = ()) -> Any:
        self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > 2 * MAX_VALUES or self.depth > 2 * MAX_DEPTH:  # references to lists of references to lists ...
            raise ConfigError("references grow without end; this is not a config", self.places.get(path))
        if isinstance(value, dict):
            value = {key: self.value(item, (*path, key), chain) for key, item in value.items()}
        elif isinstance(value, list):
            value = [self.value(item, (*path, index), chain) for index, item in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            value = self.text(value, path, chain)
        self.depth -= 1
        return value

    def text(self, text: str, path: KeyPath, chain: tuple[KeyPath, ...]) -> Any:
        """A text with its references replaced; one that is nothing but a reference takes its target's type."""
        if path in chain:
            circle = " -> ".join(map(dotted, (*chain[chain.index(path) :], path)))
            return self.wrong(path, f"circular reference: {circle}")
        whole = _REFERENCE.fullmatch(text)
        if whole and whole["name"] is not None:
            return self.target(whole["name"], path, chain, typed=path not in _TEXTS)
        result = _REFERENCE.sub(lambda match: self.part(match, path, chain), text)
        self.count += len(result) // 100
        return result

    def part(self, match: re.Match[str], path: KeyPath, chain: tuple[KeyPath, ...]) -> str:
        """What replaces a reference amid a text."""
        if match["literal"]:
            return "${"
        if match["broken"]:
            self.wrong(path, f"{shown(match.string)}: a '${{' without its '}}'; {_FORMS}")
            return ""
        value = self.target(match["name"], path, chain, typed=False)
        if isinstance(value, dict | list):
            self.wrong(path, f"'{match[0]}' is a {type_name(value)}; it must stand alone")
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    def target(self, reference: str, path: KeyPath, chain: tuple[KeyPath, ...], typed: bool) -> Any:
        """What `NAME`, `NAME:-default` (the environment) or `section.key` (the config) stands for."""
        name, has_default, default = (part.strip() for part in reference.partition(":-"))
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            return self.wrong(path, f"'${{{reference}}}' is not a valid reference; {_FORMS}")
        is_key = "." in name
        set_to = None if is_key else os.environ.get(name)
        if set_to or (set_to is not None and not has_default):
            return scalar(set_to) if typed else set_to
        if is_key or not has_default:  # `${seed}` without a default may be a key of the top level
            keys: KeyPath = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
            value: Any = self.values
            try:
                for key in keys:
                    value = value[key]
            except (LookupError, TypeError):
                pass  # there is no such key
            else:
                return self.value(value, keys, (*chain, path))
        if has_default:
            return scalar(default) if typed else default
        if is_key:
            known = did_you_mean(name, map(dotted, self.places))
            return self.wrong(path, f"'${{{reference}}}': there is no such key{known}")
        text = f"'${{{reference}}}': the environment has no variable {name!r}; set it, or write ${{{name}:-default}}"
        return self.wrong(path, text)

    def wrong(self, path: KeyPath, text: str) -> None:
        self.mistakes.append(Mistake(f"{dotted(path)}: {text}", self.places.get(path)))
