"""YAML 1.2 files and texts to plain values with the place of every key, and back."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, KeyPath, Mistake, Place, dotted, shown

MAX_BYTES = 1_000_000  # no hand-written config is larger; a data file given by mistake is refused before it is parsed
MAX_VALUES = 20_000  # counted after aliases are expanded, so that an 'alias bomb' is refused too
MAX_DEPTH = 50
HAS_DOT = "contains a dot; nest the keys instead (dots are for the command line)"
MAX_DIGITS = 100  # a longer number is a text: Python refuses to print integers of thousands of digits
_WORDS: dict[str, bool | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2): `1e-4` is a float, `on` a text.

    What no float can hold (`1e999`) and what has more digits than any setting stay texts.
    """
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text) if math.isfinite(float(text)) else text
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser; plain scalars are tagged as such, and get their type from `scalar`."""

    def __init__(self, text: str, place: Callable[[Any], Place]) -> None:
        super().__init__(text)
        self.place = place
        self.count = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count, self.depth = self.count + 1, self.depth + 1
        if too_much := _too_much(self.count, self.depth - 1):
            raise ConfigError(too_much, self.place(self.peek_event()))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "tag:yaml.org,2002:str"
        return "tag:yaml.org,2002:seq" if kind is yaml.SequenceNode else "tag:yaml.org,2002:map"


def _too_much(count: int, depth: int) -> str:
    if count > MAX_VALUES:
        return f"more than {MAX_VALUES} values (aliases expanded); this is not a config"
    return f"nesting deeper than {MAX_DEPTH}; this is not a config" if depth > MAX_DEPTH else ""


_TAGS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}
_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "null": "null"}


class _Reader:
    """Turns a YAML node tree into plain values and notes the place of every key."""

    def __init__(self, file: str, fixed_place: Place | None = None) -> None:
        self.file, self.fixed_place = file, fixed_place
        self.places: dict[KeyPath, Place] = {}
        self.mistakes: list[Mistake] = []
        self.count = 0
        self.merging: list[Any] = []

    def place(self, node: Any) -> Place:
        return self.fixed_place or Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def wrong(self, node: Any, text: str) -> None:
        self.mistakes.append(Mistake(text, self.place(node)))

    def counted(self, node: Any, path: KeyPath) -> None:
        self.count += 1
        if too_much := _too_much(self.count, len(path)):
            raise ConfigError(too_much, self.place(node))

    def value(self, node: Any, path: KeyPath = (), place: Place | None = None) -> Any:
        self.counted(node, path)
        if path:
            self.places[path] = place or self.place(node)
        tag = _tag(node)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        return self.refuse_tag(node)

    def scalar(self, node: Any) -> Any:
        tag = _tag(node)
        if tag == "plain":
            return scalar(node.value)
        if tag not in _TAGS:
            return self.refuse_tag(node)
        value = node.value if tag == "str" else scalar(node.value)
        if tag == "float" and type(value) is int:
            return float(value)
        if type(value) is not _TAGS[tag]:
            self.wrong(node, f"{shown(node.value)} is not {_TYPE_NAMES[tag]}")
        return value

    def refuse_tag(self, node: Any) -> None:
        text = f"the tag {shown(_tag(node))} is not allowed; a config holds plain values, lists and mappings only"
        self.wrong(node, text)

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        """A mapping; what `<<` merges in is read first, so that the keys written here win, and their places too."""
        result: dict[str, Any] = {}
        for key_node, value_node in reversed(node.value):
            if _is_merge(key_node):
                result |= self.merged(value_node, path)
        first: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = None if _is_merge(key_node) else self.key(key_node, path)
            if key is None:
                continue
            if key in first:
                where = "" if self.fixed_place else f", first written on line {first[key].start_mark.line + 1}"
                self.wrong(key_node, f"duplicate key '{dotted((*path, key))}'{where}")
                continue
            first[key] = key_node
            result[key] = self.value(value_node, (*path, key), self.place(key_node))
        return result

    def merged(self, node: Any, path: KeyPath) -> dict[str, Any]:
        """`<<: *name` or `<<: [*a, *b]`: the earlier of the list wins."""
        result: dict[str, Any] = {}
        for item in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            self.counted(item, path)
            if item in self.merging:
                self.wrong(item, "'<<' merges a mapping into itself")
            elif isinstance(item, yaml.MappingNode):
                self.merging.append(item)
                result |= self.mapping(item, path)
                self.merging.pop()
            else:
                self.wrong(item, "'<<' takes a mapping or a list of mappings")
        return result

    def key(self, node: Any, path: KeyPath) -> str | None:
        value = self.scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(node, yaml.ScalarNode):
            wrong = f"a key must be a string, found a {'list' if _tag(node) == 'seq' else 'mapping'}"
        elif not isinstance(value, str):
            wrong = f"a key must be a string; put {shown(node.value)} in quotes"
        elif not (wrong := key_mistake(value, path, is_override=self.fixed_place is not None)):
            return value
        self.wrong(node, wrong)
        return None


def _tag(node: Any) -> str:
    return str(node.tag.removeprefix("tag:yaml.org,2002:"))


def _is_merge(node: Any) -> bool:
    return node.tag == "plain" and node.value == "<<"


def key_mistake(key: str, path: KeyPath, is_override: bool = False) -> str:
    """Why a text cannot be a key of the mapping at `path`; empty if it can.

    Sections and their keys have no dots; what lies deeper may be data, such as regular expressions. Where the value of
    an override lies is known to its caller alone; the keys of calls are checked once more by `check`.
    """
    if "." in key and len(path) < 2 and not is_override:
        return f"the key {shown(key)} {HAS_DOT}"
    bad = not key or not key.isprintable() or key.startswith("__") or len(key) > MAX_DIGITS
    return f"{shown(key)} cannot be a key" if bad else ""


def read_text(path: Path, place: Place | None) -> str:
    """The file's text; every reason why there is none is one mistake."""
    try:
        if path.is_dir():
            snapshot = path / "config.yaml"  # of a run folder
            cure = f"; a run's config is {snapshot}" if snapshot.is_file() else ""
            raise ConfigError(f"{path} is a folder, expected a YAML file{cure}", place)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES // 1_000_000} MB; this is not a config", place)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}{_similar_file(path)}", place) from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        text = f"not UTF-8 text: byte {error.object[error.start]:#x}"
        raise ConfigError(text, Place(str(path), len(before), len(before[-1]) + 1)) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", place) from None
    except ValueError as error:  # a NUL byte in the name
        raise ConfigError(f"cannot read {str(path)!r}: {error}", place) from None


def _similar_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    try:
        return did_you_mean(str(path), [str(folder / item.name) for item in folder.glob("*.y*ml")])
    except OSError:
        return ""


def parse(text: str, file: str, fixed_place: Place | None = None) -> tuple[Any, dict[KeyPath, Place]]:
    """The value of one YAML document (None for an empty one), and the place of every key in it.

    Places are in `file`, or all at `fixed_place`, such as an argument of the command line. A ConfigError where it is
    not YAML, or more than plain values, lists and mappings with text keys.
    """
    reader = _Reader(file, fixed_place)
    try:
        node = _Loader(text, reader.place).get_single_node()
        value = None if node is None else reader.value(node)
    except (yaml.reader.ReaderError, yaml.MarkedYAMLError) as error:
        raise ConfigError(_syntax_mistake(error, text, file, fixed_place)) from None
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return value, reader.places


def _syntax_mistake(error: Any, text: str, file: str, fixed_place: Place | None) -> Mistake:
    line, column = 1, 1
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position].split("\n")
        line, column = len(before), len(before[-1]) + 1
        problem = f"the character {chr(error.character)!a} is not allowed"
    else:
        if mark := error.problem_mark or error.context_mark:
            line, column = mark.line + 1, mark.column + 1
        begun = error.context_mark.line + 1 if error.context_mark else line
        context = f" ({error.context}{f' begun on line {begun}' if begun != line else ''})" if error.context else ""
        problem = (error.problem or "cannot be read") + context
        if error.problem == "but found another document":
            problem = "a second document begins here; a config is one"
        lines = text.splitlines() or [""]
        if "${" in lines[min(line, len(lines)) - 1]:
            problem += "; inside {...} or [...] a reference needs quotes: '${...}'"
        if "found character '\\t'" in problem:
            problem += "; indent with spaces"
        problem += _indentation(lines[: max(line, 1)]) if "mapping values are not allowed" in problem else ""
    return Mistake(f"not valid YAML: {problem}", fixed_place or Place(file, line, column))


def _indentation(lines: list[str]) -> str:
    """That the last line is indented more than the one above it, which takes no keys of its own."""
    *_, above, own = [0, 0, *(len(line) - len(line.lstrip()) for line in lines if line.strip())]
    return f"; this line is indented by {own} spaces, the one above it by {above}" if own > above else ""


class _Dumper(yaml.SafeDumper):
    """Writes what `scalar` reads: a text that would be read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # PyYAML writes Unicode's line breaks as they are, and reads them back as blanks.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and not isinstance(scalar(value), str):
            return f"tag:yaml.org,2002:{_NAMES[type(scalar(value))]}"
        return super().resolve(kind, value, implicit)  # what YAML 1.1 would misread is quoted for its readers


_NAMES = {kind: name for name, kind in _TAGS.items()}
_Dumper.add_representer(str, _Dumper.represent_str)


def dump(value: Any) -> str:
    """Plain values as YAML that `parse`, and a reader of YAML 1.1, read back to the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
