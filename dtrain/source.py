"""Reads from source text what a name stands for and what it takes, importing nothing; knows no config, no section.

A misspelt key of a torch class is found without the two seconds that importing torch takes, and nothing that a config
names is executed before it is known to be a class or a function of an allowed package.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class ModuleFile(NamedTuple):
    """Where a module's source is: None for a namespace package or a compiled module."""

    path: Path | None
    is_package: bool


class Dynamic(NamedTuple):
    """A name that exists but whose meaning only an import can tell (made at run time, compiled, ...)."""

    module: str
    name: str


@dataclass(frozen=True)
class Parameter:
    """One argument that a callee takes by keyword (or by position, if `positional`)."""

    name: str
    annotation: ast.expr | None = None
    default: str | None = None  # its source text; None: the argument is required
    positional: bool = True
    keyword: bool = True

    def __str__(self) -> str:
        text = self.name + (f": {ast.unparse(self.annotation)}" if self.annotation else "")
        return (
            text
            if self.default is None
            else f"{text} = {self.default}"
            if self.annotation
            else f"{text}={self.default}"
        )


@dataclass(frozen=True)
class Callee:
    """A class or a function: where it is written and what it takes."""

    module: str
    name: str
    file: str
    line: int
    is_class: bool
    parameters: tuple[Parameter, ...] = ()
    open: bool = False  # takes further keys, and which ones cannot be known
    variadic: bool = False  # takes any number of positional arguments

    @property
    def signature(self) -> str:
        """`AdamW(params, lr: float = 1e-3, ...)` in one line."""
        parts = (
            [str(item) for item in self.parameters]
            + (["*args"] if self.variadic else [])
            + (["**kwargs"] if self.open else [])
        )
        return f"{self.name}({', '.join(parts)})"


class Module:
    """One parsed source file: what its top level binds."""

    def __init__(self, name: str, file: ModuleFile) -> None:
        self.name, self.file = name, file
        text = file.path.read_text(encoding="utf-8") if file.path else ""
        self.tree = ast.parse(text, filename=str(file.path))
        self.bindings: dict[str, ast.stmt | ast.expr | tuple[str, str | None]] = {}
        self.stars: list[str] = []
        for statement in _statements(self.tree.body):
            self._bind(statement)

    @property
    def package(self) -> str:
        """The package against which its relative imports resolve."""
        return self.name if self.file.is_package else self.name.rpartition(".")[0]

    def _bind(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            self.bindings[node.name] = node
        elif isinstance(node, ast.Import):
            for item in node.names:
                name = item.asname or item.name.partition(".")[0]
                self.bindings[name] = (item.name if item.asname else name, None)
        elif isinstance(node, ast.ImportFrom):
            origin = self._origin(node)
            for item in node.names:
                if item.name == "*":
                    self.stars.append(origin)
                else:
                    self.bindings[item.asname or item.name] = (origin, item.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.bindings[target.id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            self.bindings[node.target.id] = node.value

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - (node.level - 1)]
        return ".".join([*base, node.module] if node.module else base)

    @cached_property
    def exported(self) -> set[str] | None:
        """`__all__` where it is a plain list."""
        value = self.bindings.get("__all__")
        if isinstance(value, ast.List | ast.Tuple):
            return {item.value for item in value.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)}
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, also those under `if`, `try` and `with` (but not under `if TYPE_CHECKING`)."""
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements([item for handler in node.handlers for item in handler.body])
            yield from _statements(node.orelse + node.finalbody + node.body)
        elif isinstance(node, ast.With):
            yield from _statements(node.body)
        else:
            yield node


def module_file(name: str) -> ModuleFile | None:
    """Where a module's source is, found without importing anything (the usual way to find `a.b` imports `a`)."""
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names or not all(part.isidentifier() for part in name.split(".")):
        return None
    spec = next((spec for finder in sys.meta_path if (spec := finder.find_spec(top, None)) is not None), None)
    if spec is None:
        return None
    folders = [Path(item) for item in spec.submodule_search_locations or ()]
    if not rest:
        return ModuleFile(Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None, bool(folders))
    for part in rest[:-1]:
        folders = [folder / part for folder in folders if (folder / part).is_dir()]
    for folder in folders:
        place = folder / rest[-1]
        if (place / "__init__.py").is_file():
            return ModuleFile(place / "__init__.py", True)
        if place.with_suffix(".py").is_file():
            return ModuleFile(place.with_suffix(".py"), False)
        if any(folder.glob(f"{rest[-1]}.*.so")):
            return ModuleFile(None, False)
        if place.is_dir():
            return ModuleFile(None, True)
    return None


class _Owner(NamedTuple):
    """A class as written, and the module it is written in."""

    module: Module
    node: ast.ClassDef


_NO_PARAMETERS = {"object", "ABC", "Generic", "Protocol", "NamedTuple"}  # bases that say nothing about arguments


class Source:
    """Follows names through source files. `find` tells where a module's file is, without importing it."""

    def __init__(self, find: Callable[[str], ModuleFile | None]) -> None:
        self.find = find
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The parsed module, or None when there is none of that name.

        Raises:
            SyntaxError: The file is no Python.
        """
        if name not in self._modules:
            file = self.find(name)
            self._modules[name] = Module(name, file) if file else None
        return self._modules[name]

    def names(self, module_name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The public names of a module that may be classes or functions."""
        module = self.module(module_name)
        if module is None or module_name in seen:
            return set()
        found = {name for name, value in module.bindings.items() if not isinstance(value, tuple) or value[1]}
        for star in module.stars:
            found |= self.names(star, seen | {module_name})
        return {name for name in found if not name.startswith("_")}

    def lookup(
        self, module_name: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Callee | Dynamic | str | None:
        """What `name` means in a module: a callee, something only an import can tell, a module's name, or nothing."""
        found = self._lookup(module_name, name, seen)
        return self._callee(*found) if isinstance(found, tuple) and not isinstance(found, Dynamic) else found

    def _lookup(
        self, module_name: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[Module, ast.stmt] | Dynamic | str | None:
        module = self.module(module_name)
        if module is None or (module_name, name) in seen:
            return None
        seen |= {(module_name, name)}
        value = module.bindings.get(name)
        if isinstance(value, ast.stmt):
            return module, value
        if isinstance(value, tuple):
            origin, attribute = value
            if attribute is None:
                return origin
            if origin.partition(".")[0] in sys.stdlib_module_names:
                return f"{origin}.{attribute}"
            if not self.find(origin.partition(".")[0]):
                return Dynamic(module_name, name)
            found = self._lookup(origin, attribute, seen)
            if found is None and self.find(f"{origin}.{attribute}"):
                return f"{origin}.{attribute}"
            return found
        if isinstance(value, ast.Name):
            return self._lookup(module_name, value.id, seen) or Dynamic(module_name, name)
        if value is not None:
            return Dynamic(module_name, name)
        for star in module.stars:
            if not name.startswith("_") and (found := self._lookup(star, name, seen)):
                return found
        if module.file.is_package and self.find(f"{module_name}.{name}"):
            return f"{module_name}.{name}"
        unreadable = "__getattr__" in module.bindings or (module.file.path is None and not module.file.is_package)
        return Dynamic(module_name, name) if unreadable else None

    def _callee(self, module: Module, node: ast.stmt) -> Callee | Dynamic:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters, is_open, variadic = self._parameters(module, node, (), method=False)
            return Callee(
                module.name, node.name, str(module.file.path), node.lineno, False, parameters, is_open, variadic
            )
        if not isinstance(node, ast.ClassDef):
            return Dynamic(module.name, getattr(node, "name", "?"))
        found = self._constructor(self._lineage(module, node))
        if found is None:
            return Dynamic(module.name, node.name)
        return Callee(module.name, node.name, str(module.file.path), node.lineno, True, *found)

    def _lineage(
        self, module: Module, node: ast.ClassDef, seen: frozenset[ast.ClassDef] = frozenset()
    ) -> tuple[_Owner | None, ...]:
        """The class and its bases, depth first; None stands for a base that cannot be read."""
        result: list[_Owner | None] = [_Owner(module, node)]
        for base in node.bases:
            text = ast.unparse(base).partition("[")[0]
            if text.rpartition(".")[2] in _NO_PARAMETERS:
                continue
            found = self._follow(module, text)
            if isinstance(found, tuple) and isinstance(found[1], ast.ClassDef) and found[1] not in seen:
                result += [
                    item
                    for item in self._lineage(found[0], found[1], seen | {node})
                    if item is None or item not in result
                ]
            else:
                result.append(None)
        return tuple(result)

    def _follow(self, module: Module, text: str) -> tuple[Module, ast.stmt] | None:
        """The definition that a dotted name means inside a module."""
        where: str | None = module.name
        found: object = None
        for part in text.split("."):
            if where is None or not part.isidentifier():
                return None
            found = self._lookup(where, part)
            where = found if isinstance(found, str) else None
        return found if isinstance(found, tuple) and not isinstance(found, Dynamic) else None

    def _constructor(self, lineage: tuple[_Owner | None, ...]) -> tuple[tuple[Parameter, ...], bool, bool] | None:
        """Parameters, open, variadic of the first constructor in the lineage; None when it cannot be read."""
        for index, owner in enumerate(lineage):
            if owner is None:
                return None
            methods = {item.name: item for item in _statements(owner.node.body) if isinstance(item, ast.FunctionDef)}
            for name in ("__new__", "__init__"):
                if name in methods:
                    return self._parameters(owner.module, methods[name], lineage[index + 1 :], method=True)
            if any("dataclass" in ast.unparse(item) for item in owner.node.decorator_list):
                return _fields(owner.node), False, False
        return (), False, False

    def _parameters(
        self,
        module: Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        behind: tuple[_Owner | None, ...],
        method: bool,
    ) -> tuple[tuple[Parameter, ...], bool, bool]:
        """What a function takes, with what it hands on through `**kwargs` to the constructors `behind` it."""
        own = _own_parameters(node, method)
        if node.args.kwarg is None:
            return own, False, node.args.vararg is not None
        further = self._through_kwargs(module, node, node.args.kwarg.arg, behind)
        if further is None:
            return own, True, node.args.vararg is not None
        names = {item.name for item in own}
        return own + tuple(item for item in further if item.name not in names), False, node.args.vararg is not None

    def _through_kwargs(
        self,
        module: Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        kwargs: str,
        behind: tuple[_Owner | None, ...],
    ) -> tuple[Parameter, ...] | None:
        """The keys that a function reads out of its `**kwargs` or hands on; None when that cannot be known."""
        found: dict[str, Parameter] = {}
        for use in _uses(node, kwargs):
            if use.harmless:
                continue
            if use.key is not None:
                found.setdefault(use.key, Parameter(use.key, default="...", positional=False))
                continue
            passed = self._passed_on(module, node, use.call, behind) if use.call else None
            if passed is None:
                return None
            for item in passed:
                found.setdefault(item.name, replace(item, positional=False))
        return tuple(found.values())

    def _passed_on(
        self,
        module: Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        call: ast.Call,
        behind: tuple[_Owner | None, ...],
    ) -> list[Parameter] | None:
        """What the callee of `f(..., **kwargs)` still takes beyond the arguments written in that call."""
        text = ast.unparse(call.func)
        if re.fullmatch(r"super\(.*\)\.(__init__|__new__)", text):
            target = self._constructor(behind)
        elif (definition := self._follow(module, text.removesuffix(".__init__"))) is not None:
            callee = self._callee(*definition)
            target = None if isinstance(callee, Dynamic) else (callee.parameters, callee.open, callee.variadic)
        else:
            return None
        if target is None or target[1]:
            return None
        by_keyword = {item.arg for item in call.keywords if item.arg}
        starred = any(isinstance(item, ast.Starred) for item in call.args)
        by_position = (
            0
            if starred
            else len(call.args) - text.endswith((".__init__", ".__new__")) * (not text.startswith("super("))
        )
        positional = [item for item in target[0] if item.positional][: max(by_position, 0)]
        return [item for item in target[0] if item.name not in by_keyword and item not in positional]


class _Use(NamedTuple):
    """One place where a function uses its `**kwargs`."""

    harmless: bool = False  # asks whether it is empty, lists its names, adds to it
    key: str | None = None  # reads this key
    call: ast.Call | None = None  # hands all of it on


def _uses(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[_Use]:
    """Every use of `name` in the body of a function."""
    parents = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and item.id == name:
            yield _use(item, parents)


def _use(item: ast.Name, parents: dict[ast.AST, ast.AST]) -> _Use:
    parent = parents.get(item)
    above = parents.get(parent) if parent else None
    if isinstance(parent, ast.keyword) and parent.arg is None and isinstance(above, ast.Call):
        return _Use(call=above)
    if (
        isinstance(parent, ast.Subscript)
        and isinstance(parent.slice, ast.Constant)
        and isinstance(parent.slice.value, str)
    ):
        return _Use(harmless=True) if isinstance(parent.ctx, ast.Store) else _Use(key=parent.slice.value)
    if isinstance(parent, ast.Attribute) and isinstance(above, ast.Call):
        first = above.args[0] if above.args else None
        if (
            parent.attr in ("pop", "get", "setdefault")
            and isinstance(first, ast.Constant)
            and isinstance(first.value, str)
        ):
            return _Use(key=first.value)
        return _Use(harmless=parent.attr in ("update", "keys", "__len__"))
    if isinstance(parent, ast.Compare):
        left = parent.left
        if isinstance(left, ast.Constant) and isinstance(left.value, str):
            return _Use(key=left.value)
    tests = isinstance(
        parent, ast.If | ast.BoolOp | ast.UnaryOp | ast.FormattedValue | ast.Compare | ast.Assert | ast.IfExp
    )
    counts = (
        isinstance(parent, ast.Call)
        and isinstance(parent.func, ast.Name)
        and parent.func.id in ("len", "sorted", "bool", "list", "iter")
    )
    return _Use(harmless=tests or counts)


def _own_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> tuple[Parameter, ...]:
    static = any(ast.unparse(item) == "staticmethod" for item in node.decorator_list)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    result = []
    for index, item in enumerate(positional):
        default = ast.unparse(arguments.defaults[index - missing]) if index >= missing else None
        result.append(Parameter(item.arg, item.annotation, default, keyword=item not in arguments.posonlyargs))
    if method and not static:
        result = result[1:]
    for item, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        result.append(Parameter(item.arg, item.annotation, ast.unparse(value) if value else None, positional=False))
    return tuple(result)


def _fields(node: ast.ClassDef) -> tuple[Parameter, ...]:
    """The constructor's parameters of a dataclass."""
    return tuple(
        Parameter(item.target.id, item.annotation, ast.unparse(item.value) if item.value else None)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


SOURCE = Source(module_file)
