"""What docstrings say of a callee and its arguments (Google's, NumPy's and Sphinx's forms), read from source text."""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from dtrain.config.signatures import SOURCE, Module

MAX_LENGTH = 300  # characters of one description
_HEADING = re.compile(r"^( *)(?:Args|Arguments|Parameters|Keyword Args|Keyword Arguments)\s*:?\s*$")
_ENTRY = re.compile(
    r"^[`*]*(\w+)[`*]*(?:, *[`*]*\w+[`*]*)*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s*(?::\s|--\s|:$)(.*)"
)
_NUMPY = re.compile(r"^(\w+)(?:\s*:.*)?$")
_SPHINX = re.compile(r":param (?:[^:]*\s)?(\w+):\s*((?:(?!\n\s*:|\n\s*\n).)*)", re.S)


class Documented(NamedTuple):
    """What is said of a callee: in one sentence or two, and of each argument by name."""

    summary: str = ""
    arguments: dict[str, str] = {}  # noqa: RUF012 - never changed


@functools.cache
def documented(module: str, name: str) -> Documented:
    """What the docstrings of a class (its constructor's and those of its bases, too) or a function say."""
    summary, arguments = "", dict[str, str]()
    for text in _texts(module, name):
        summary = summary or _plain(re.split(r"\n\s*\n|\n\s*(?:Args|Arguments|Parameters)\b", text.strip())[0])
        for argument, said in _arguments(text):
            if said:
                arguments.setdefault(argument, _plain(said))
    return Documented(summary, arguments)


def _texts(module: str, name: str) -> Iterator[str]:
    """The docstrings, nearest first."""
    for owner, node in SOURCE.definitions(module, name):
        inside = {ast.unparse(item.targets[0]): item.value for item in node.body if isinstance(item, ast.Assign)}
        # torch puts the texts of its optimizers and convolutions together.
        written = owner.attributes.get(f"{node.name}.__doc__") or inside.get("__doc__")
        yield inspect.cleandoc(_constant(owner, written)) if written else ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
            yield from (ast.get_docstring(methods[key]) or "" for key in ("__init__", "__new__") if key in methods)


def _constant(module: Module, node: ast.expr) -> str:
    """A text put together in the source of constants and of names of its module, as far as it can be read."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return _constant(module, node.left) + _constant(module, node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_constant(module, item) for item in node.values)
    if isinstance(node, ast.FormattedValue):
        return _constant(module, node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _constant(module, node.func.value)
    value = module.bindings.get(ast.unparse(node))
    if isinstance(value, tuple) and value[1] and (origin := SOURCE.module(value[0])):
        module, value = origin, origin.bindings.get(value[1])
    return _constant(module, value) if isinstance(value, ast.Constant | ast.BinOp | ast.JoinedStr) else ""


def _arguments(text: str) -> Iterator[tuple[str, str]]:
    """The arguments that a docstring describes, each with its text."""
    yield from ((match[1], match[2]) for match in _SPHINX.finditer(text))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if match := _HEADING.match(line):
            is_numpy = lines[number + 1 : number + 2] and set(lines[number + 1].strip()) == {"-"}
            block = _block(lines[number + 1 + bool(is_numpy) :], len(match[1]) + (0 if is_numpy else 1))
            yield from _entries(block, _NUMPY if is_numpy else _ENTRY)


def _block(lines: list[str], indent: int) -> list[str]:
    """The lines up to the first one that is indented less."""
    end = next((number for number, line in enumerate(lines) if line.strip() and _indent(line) < indent), len(lines))
    return lines[:end]


def _entries(lines: list[str], entry: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """The entries of a block: lines at its own indentation begin one, what is indented more belongs to it."""
    least = min((_indent(line) for line in lines if line.strip()), default=0)
    name, said = "", list[str]()
    for line in [*lines, ""]:
        match = entry.match(line.strip()) if line.strip() and _indent(line) == least else None
        if match:
            yield name, "\n".join(said)
            name, said = match[1], [match[2] if entry is _ENTRY else ""]
        elif _indent(line) == least and line.strip():
            said += [line] if entry is _ENTRY and said and said[-1].strip() else []
        else:
            said.append(line)
    yield name, "\n".join(said)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(text: str) -> str:
    """One paragraph without the marks of reStructuredText."""
    text = re.split(r"\n\s*\n|\n?\s*\.\. \w+::", text.strip())[0]
    text = re.sub(r":\w+(?::\w+)*:`(?:~[\w.]*\.)?([^`<]*)(?:<[^`]*>)?`", r"\1", text).replace("``", "`")
    text = " ".join(text.split())
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3].rsplit(' ', 1)[0]}..."
