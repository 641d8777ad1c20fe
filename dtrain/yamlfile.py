"""YAML 1.2 text to plain values with the place of every key, and back; knows no section and no setting of dtrain."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

MAX_VALUES = 100_000  # counted after aliases are expanded, so that an 'alias bomb' is refused too
MAX_DEPTH = 50

KeyPath = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a key was written: a file with line and column (from 1), or a command-line argument (line 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with a config, told in one line."""

    text: str
    place: Place | None = None

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        return f"{self.place}: {text}" if self.place else text


class ConfigError(Exception):
    """The config or the command line is wrong; holds every mistake that was found. Exit status 2."""

    def __init__(self, mistakes: Iterable[Mistake] | Mistake | str) -> None:
        if isinstance(mistakes, str):
            mistakes = Mistake(mistakes)
        self.mistakes = [mistakes] if isinstance(mistakes, Mistake) else list(dict.fromkeys(mistakes))
        super().__init__("\n".join(map(str, self.mistakes)))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that `name` was probably meant to be, best first."""
    lower: dict[str, str] = {}
    for item in known:
        lower.setdefault(item.lower(), item)
    found = difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.6)
    return [lower[item] for item in found]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing."""
    found = nearest(name, known)
    return f"; did you mean {' or '.join(repr(item) for item in found)}?" if found else ""


def dotted(path: Sequence[str | int]) -> str:
    """('loaders', 'train', 0) -> 'loaders.train.0'."""
    return ".".join(map(str, path))


def type_name(value: Any) -> str:
    """What a user calls the type of a YAML value."""
    if value is None:
        return "null"
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return "mapping"
    return {str: "text"}.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------- YAML 1.2

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2): `1e-4` is a float, `on` a text."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text) and len(text) < 4000:
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser; plain scalars are tagged as such, and get their type from `scalar`."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "tag:yaml.org,2002:str"
        return "tag:yaml.org,2002:seq" if kind is yaml.SequenceNode else "tag:yaml.org,2002:map"


class _Dumper(yaml.SafeDumper):
    """Writes what `scalar` reads: a text that would be read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and not isinstance(scalar(value), str):
            return f"tag:yaml.org,2002:{_TAGS[type(scalar(value))]}"
        return super().resolve(kind, value, implicit)  # what YAML 1.1 would misread is quoted for its readers


_TAGS = {bool: "bool", int: "int", float: "float", type(None): "null"}
_TYPES = {"int": int, "float": float, "str": str}


class _Reader:
    """Turns a YAML node tree into plain values and notes the place of every key."""

    def __init__(self, file: str, fixed_place: Place | None = None) -> None:
        self.file, self.fixed_place = file, fixed_place
        self.places: dict[KeyPath, Place] = {}
        self.mistakes: list[Mistake] = []
        self.count = 0

    def place(self, node: Any) -> Place:
        return self.fixed_place or Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def wrong(self, node: Any, text: str) -> None:
        self.mistakes.append(Mistake(text, self.place(node)))

    def value(self, node: Any, path: KeyPath = ()) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            what = f"more than {MAX_VALUES} values" if self.count > MAX_VALUES else f"nesting deeper than {MAX_DEPTH}"
            raise ConfigError(Mistake(f"{what} (aliases expanded); that is no config", self.place(node)))
        if path:
            self.places.setdefault(path, self.place(node))
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in ("plain", "str", "int", "float", "bool", "null"):
            return self._scalar_value(node, tag)
        self.wrong(node, f"the tag '{tag}' is not allowed; a config holds plain values, lists and mappings only")
        return None

    def _scalar_value(self, node: Any, tag: str) -> Any:
        value = node.value if tag == "str" else scalar(node.value)
        if tag in _TYPES and not isinstance(value, _TYPES[tag]) and not (tag == "float" and isinstance(value, int)):
            self.wrong(node, f"'{node.value}' is no {tag}")
        return float(value) if tag == "float" and isinstance(value, int) else value

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        first: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "plain" and key_node.value == "<<":
                merged = self.merge(value_node, path) | merged
                continue
            key = self.key(key_node)
            if key is None:
                continue
            if key in own:
                place = self.place(first[key])
                self.wrong(key_node, f"duplicate key '{dotted((*path, key))}', first written in line {place.line}")
                continue
            first[key] = key_node
            self.places[(*path, key)] = self.place(key_node)
            own[key] = self.value(value_node, (*path, key))
        return merged | own

    def merge(self, node: Any, path: KeyPath) -> dict[str, Any]:
        """`<<: *name` or `<<: [*a, *b]`: keys written here win, then the earlier of the list."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for item in nodes:
            value = self.value(item, path) if isinstance(item, yaml.MappingNode) else None
            if value is None:
                self.wrong(item, "'<<' takes a mapping or a list of mappings")
            else:
                result = value | result
        return result

    def key(self, node: Any) -> str | None:
        value = self._scalar_value(node, node.tag.removeprefix("tag:yaml.org,2002:")) if _isscalar(node) else None
        if not isinstance(value, str):
            self.wrong(node, f"a key is a text; put {_shown(node)} in quotes" if _isscalar(node) else "a key is a text")
        elif "." in value:
            self.wrong(node, f"the key '{value}' holds a dot; nest the keys instead (dots are for the command line)")
        elif not value.isprintable() or not value or value.startswith("__"):
            self.wrong(node, f"{value!r} cannot be a key")
        else:
            return value
        return None


def _isscalar(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _shown(node: Any) -> str:
    return f"'{node.value}'" if _isscalar(node) else "it"


def parse(text: str, file: str, fixed_place: Place | None = None) -> tuple[Any, dict[KeyPath, Place]]:
    """Parse one YAML document.

    Args:
        text: The document.
        file: Its name, for places.
        fixed_place: Where everything in it was written, when that is no file.

    Returns:
        The value (None for an empty document) and the place of every key in it.

    Raises:
        ConfigError: Not YAML, or more than plain values, lists and mappings with text keys.
    """
    reader = _Reader(file, fixed_place)
    whole = fixed_place or Place(file, 1, 1)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        value = None if node is None else reader.value(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_mistake(error, text, file, fixed_place)) from None
    except yaml.YAMLError as error:
        raise ConfigError(Mistake(f"not valid YAML: {error}", whole)) from None
    except RecursionError:
        raise ConfigError(Mistake(f"nesting deeper than {MAX_DEPTH}; that is no config", whole)) from None
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return value, reader.places


def _syntax_mistake(error: yaml.MarkedYAMLError, text: str, file: str, fixed_place: Place | None) -> Mistake:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Mistake(f"not valid YAML: {error.problem}", fixed_place or Place(file, 1, 1))
    problem = f"{error.problem or 'cannot be read'}{f' ({error.context})' if error.context else ''}"
    lines = text.splitlines() or [""]
    if "${" in lines[min(mark.line, len(lines) - 1)]:
        problem += "; inside {...} or [...] a reference needs quotes: '${...}'"
    return Mistake(f"not valid YAML: {problem}", fixed_place or Place(file, mark.line + 1, mark.column + 1))


def dump(value: Any) -> str:
    """Plain values as YAML that `parse`, and a reader of YAML 1.1, read back to the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
