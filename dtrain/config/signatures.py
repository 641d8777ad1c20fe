"""Reads from source text what a name stands for and what it takes, importing nothing; knows no config, no section.

A misspelt key of a torch class is found without the two seconds that importing torch takes, and nothing that a config
names is executed before it is known to be a class or a function of an allowed package.
"""

import ast
import re
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dtrain.config.annotations import Parameter, is_record, own_parameters, record_fields

MAX_NAME = 200  # characters of a module's name; file systems take no more than 255


class ModuleFile(NamedTuple):
    """Where a module's source is: no path for a namespace package or a compiled module."""

    path: Path | None
    is_package: bool


class Dynamic(NamedTuple):
    """A name whose meaning only an import can tell (made at run time, compiled, ...)."""

    module: str
    name: str
    certain: bool = True  # that there is such a name at all


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
        """`AdamW(params, lr: float = 1e-3, ...)` in one line; of what goes through `**kwargs`, a few names."""
        parts = [str(item) for item in self.parameters if not item.through] + (["*args"] if self.variadic else [])
        through = [item.name for item in self.parameters if item.through]
        if through:
            rest = f", ... {len(through) - 3} more" if len(through) > 4 else ""
            parts.append(f"**kwargs: {', '.join(through[: 3 if rest else 4])}{rest}")
        return f"{self.name}({', '.join(parts + (['**kwargs'] if self.open else []))})"


Binding = ast.stmt | ast.expr | tuple[str, str | None]  # a definition, an assigned value, or an import
_UNKNOWN = ast.Constant(None)  # the value of a name that is bound in a way not followed here


class Module:
    """One parsed source file: what its top level binds.

    Raises:
        SyntaxError: The file cannot be read as Python.
    """

    def __init__(self, name: str, file: ModuleFile) -> None:
        self.name, self.file = name, file
        text, body = _read(file.path) if file.path else ("", [])
        self.bindings: dict[str, Binding] = {}
        self.stars: list[str] = []
        for statement, conditional in _statements(body):
            self._bind(statement, conditional)
        # Whether it may have names that cannot be seen in its text.
        self.hides = "__getattr__" in self.bindings or (file.path is None and not file.is_package)
        self.hides |= re.search(r"\bglobals\(\)|\bsys\.modules\[__name__\]|^exec\(", text, re.M) is not None

    @property
    def package(self) -> str:
        """The package against which its relative imports resolve."""
        return self.name if self.file.is_package else self.name.rpartition(".")[0]

    def _bind(self, node: ast.stmt, conditional: bool) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            twice = conditional and isinstance(self.bindings.get(node.name), ast.stmt)
            self.bindings[node.name] = _UNKNOWN if twice else node  # which one holds, only a run can tell
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
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    self.bindings[target.id] = node.value or _UNKNOWN
                elif isinstance(target, ast.Tuple | ast.List):
                    self.bindings |= {item.id: _UNKNOWN for item in ast.walk(target) if isinstance(item, ast.Name)}

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - (node.level - 1)]
        return ".".join([*base, node.module] if node.module else base)


def _read(path: Path) -> tuple[str, list[ast.stmt]]:
    """A file's text and its statements."""
    try:
        with tokenize.open(path) as file:  # in the encoding that the file itself names
            text = file.read()
        with warnings.catch_warnings():  # such as of '\d'; whoever imports it will see them
            warnings.simplefilter("ignore")
            return text, ast.parse(text, filename=str(path)).body
    except (SyntaxError, OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SyntaxError) and error.filename:
            raise
        wrong = SyntaxError(f"cannot be read: {error}")  # its encoding, a NUL byte, brackets without end
        wrong.filename, wrong.lineno = str(path), 1
        raise wrong from None


def _statements(body: list[ast.stmt], conditional: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Top-level statements, also those under `if`, `try`, `with` and `for`, but not what is for type checkers only."""
    for node in body:
        if isinstance(node, ast.If):
            test = ast.unparse(node.test).removeprefix("typing.")
            yield from _statements([] if test == "TYPE_CHECKING" else node.body, True)
            yield from _statements([] if test == "not TYPE_CHECKING" else node.orelse, True)
        elif isinstance(node, ast.Try):
            yield from _statements([item for handler in node.handlers for item in handler.body], True)
            yield from _statements(node.orelse + node.finalbody + node.body, conditional)
        elif isinstance(node, ast.With | ast.For | ast.While):
            yield from _statements(node.body, conditional)
        else:
            yield node, conditional


def spec_folders(top: str) -> tuple[Path | None, list[Path]]:
    """The source file of a top-level module, and the folders of its submodules; found without importing it."""
    if top in sys.stdlib_module_names or top.startswith("__"):
        return None, []
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next((spec for finder in finders if (spec := finder.find_spec(top, None)) is not None), None)
    if spec is None:
        return None, []
    folders = [Path(item) for item in spec.submodule_search_locations or ()]
    return Path(spec.origin) if spec.origin and spec.has_location else None, folders


def module_file(name: str) -> ModuleFile | None:
    """Where a module's source is, found without importing anything (the usual way to find `a.b` imports `a`)."""
    top, *rest = name.split(".")
    if not all(part.isidentifier() and len(part) <= MAX_NAME for part in (top, *rest)):
        return None
    origin, folders = spec_folders(top)
    if origin is None and not folders:
        return None
    if not rest:
        readable = origin is not None and origin.suffix == ".py" and origin.is_file()
        return ModuleFile(origin if readable else None, bool(folders))
    for part in rest[:-1]:
        folders = [folder / part for folder in folders if (folder / part).is_dir()]
    for place in (folder / rest[-1] for folder in folders):
        if (place / "__init__.py").is_file():
            return ModuleFile(place / "__init__.py", True)
        if place.with_suffix(".py").is_file():
            return ModuleFile(place.with_suffix(".py"), False)
        if any(place.parent.glob(f"{rest[-1]}.*.so")):
            return ModuleFile(None, False)
        if place.is_dir():
            return ModuleFile(None, True)
    return None


def is_standard(name: str) -> bool:
    """Whether a module, or a name in it, belongs to the standard library."""
    return name.partition(".")[0] in sys.stdlib_module_names


class _Owner(NamedTuple):
    """A class as written, and the module it is written in."""

    module: Module
    node: ast.ClassDef


class _Takes(NamedTuple):
    """What a call accepts."""

    parameters: tuple[Parameter, ...] = ()
    open: bool = False
    variadic: bool = False


_NO_PARAMETERS = {"object", "ABC", "Generic", "Protocol", "NamedTuple"}  # bases that say nothing about arguments
_HARMLESS = {  # decorators that leave the arguments as they are written
    "staticmethod", "classmethod", "property", "final", "override", "overload", "deprecated", "runtime_checkable",
    "total_ordering", "dataclass", "cache", "lru_cache", "no_grad", "inference_mode", "abstractmethod",
    "no_type_check", "compatibility", "set_module",
}  # fmt: skip


class Source:
    """Follows names through source files. `find` tells where a module's file is, without importing it."""

    def __init__(self, find: Callable[[str], ModuleFile | None]) -> None:
        self.find = find
        self._modules: dict[str, Module] = {}
        self._callees: dict[ast.stmt, Callee | Dynamic] = {}
        self._busy: set[ast.stmt] = set()  # functions whose `**kwargs` are being followed: some call themselves

    def module(self, name: str) -> Module | None:
        """The parsed module, or None when there is none of that name.

        Raises:
            SyntaxError: The file is no Python.
        """
        if name not in self._modules and (file := self.find(name)):
            self._modules[name] = Module(name, file)
        return self._modules.get(name)

    def names(self, module_name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The public names of a module that may be classes or functions."""
        module = self.module(module_name)
        if module is None or module_name in seen:
            return set()
        names = {
            name
            for name, value in module.bindings.items()
            if not isinstance(value, tuple) or (value[1] and not is_standard(value[0]))
        }
        for star in module.stars:
            names |= self.names(star, seen | {module_name})
        return {name for name in names if not name.startswith("_")}

    def lookup(self, module_name: str, name: str) -> Callee | Dynamic | str | None:
        """What `name` means in a module: a callee, something only an import can tell, or nothing.

        A text is the name of a module, or of anything in the standard library, which is not followed.
        """
        there = self._lookup(module_name, name, frozenset())
        return self._callee(*there) if isinstance(there, tuple) and not isinstance(there, Dynamic) else there

    def _lookup(
        self, module_name: str, name: str, seen: frozenset[tuple[str, str]]
    ) -> tuple[Module, ast.stmt] | Dynamic | str | None:
        if is_standard(module_name):
            return f"{module_name}.{name}"
        module = self.module(module_name)
        if module is None or (module_name, name) in seen:
            return None
        seen |= {(module_name, name)}
        value = module.bindings.get(name)
        if isinstance(value, ast.stmt):
            return module, value
        if isinstance(value, tuple):
            return self._imported(module_name, name, value, seen)
        if isinstance(value, ast.Name | ast.Attribute):
            return self._follow(module, ast.unparse(value), seen) or Dynamic(module_name, name)
        if value is not None:
            return Dynamic(module_name, name)
        hidden = module.hides
        for star in () if name.startswith("_") else module.stars:
            there = None if is_standard(star) else self._lookup(star, name, seen)
            if there and not _is_uncertain(there):
                return there
            hidden |= there is not None
        if module.file.is_package and self.find(f"{module_name}.{name}"):
            return f"{module_name}.{name}"
        return Dynamic(module_name, name, certain=False) if hidden else None

    def _imported(
        self, module_name: str, name: str, value: tuple[str, str | None], seen: frozenset[tuple[str, str]]
    ) -> tuple[Module, ast.stmt] | Dynamic | str | None:
        origin, attribute = value
        if attribute is None:
            return origin
        if not is_standard(origin) and not self.find(origin.partition(".")[0]):
            return Dynamic(module_name, name)  # its import will say what is missing, and where it is asked for
        there = self._lookup(origin, attribute, seen)
        if _is_uncertain(there):
            return Dynamic(module_name, name)
        return f"{origin}.{attribute}" if there is None and self.find(f"{origin}.{attribute}") else there

    def _follow(
        self, module: Module, text: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[Module, ast.stmt] | Dynamic | str | None:
        """What a dotted name means inside a module."""
        there: tuple[Module, ast.stmt] | Dynamic | str | None = module.name
        for part in text.split("."):
            if not isinstance(there, str) or not part.isidentifier():
                return None
            there = self._lookup(there, part, seen)
        return there

    def _callee(self, module: Module, node: ast.stmt) -> Callee | Dynamic:
        if node not in self._callees:
            callee = self._read_callee(module, node)
            if self._busy:
                return callee  # it may lack what is being followed just now
            self._callees[node] = callee
        return self._callees[node]

    def _read_callee(self, module: Module, node: ast.stmt) -> Callee | Dynamic:
        takes: _Takes | None = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            takes = self._takes(module, node, (), method=False)
        elif isinstance(node, ast.ClassDef):
            takes = self._constructor(self._lineage(module, node))
        name = str(getattr(node, "name", "?"))
        if takes is None:
            return Dynamic(module.name, name)
        return Callee(module.name, name, str(module.file.path), node.lineno, isinstance(node, ast.ClassDef), *takes)

    def _lineage(
        self, module: Module, node: ast.ClassDef, seen: frozenset[ast.ClassDef] = frozenset()
    ) -> tuple[_Owner | None, ...]:
        """The class and its bases in the order in which Python asks them; None stands for one that cannot be read."""
        result: list[_Owner | None] = []
        for base in node.bases:
            text = ast.unparse(base).partition("[")[0]
            if text.rpartition(".")[2] in _NO_PARAMETERS:
                continue
            there = self._follow(module, text)
            if isinstance(there, tuple) and isinstance(there[1], ast.ClassDef) and there[1] not in seen | {node}:
                further = self._lineage(there[0], there[1], seen | {node})
                result = [item for item in result if item is None or item not in further] + list(further)
            else:
                result.append(None)
        metaclass = any(item.arg == "metaclass" and "ABCMeta" not in ast.unparse(item.value) for item in node.keywords)
        return (None if metaclass else _Owner(module, node), *result)

    def _constructor(self, lineage: tuple[_Owner | None, ...]) -> _Takes | None:
        """What the first constructor in the lineage takes; None when it cannot be read."""
        for index, owner in enumerate(lineage):
            if owner is None:
                return None
            own = [item for item, _ in _statements(owner.node.body)]
            methods = {item.name: item for item in own if isinstance(item, ast.FunctionDef)}
            new, init = methods.get("__new__"), methods.get("__init__")
            if new and init and new.args.vararg and new.args.kwarg:
                new = None  # it lets everything through to __init__
            if method := new or init:
                return self._takes(owner.module, method, lineage[index + 1 :], method=True)
            if {"__init__", "__new__"} & {
                ast.unparse(name) for item in own if isinstance(item, ast.Assign) for name in item.targets
            }:
                return None
            if is_record(owner.node):
                return self._record(lineage[index:])
            if _changes_arguments(owner.node):  # such as attrs' define, which writes the constructor
                return None
        return _Takes()

    def _record(self, lineage: tuple[_Owner | None, ...]) -> _Takes | None:
        fields: dict[str, Parameter] = {}
        for owner in reversed(lineage):
            if owner is None:
                return None
            fields |= {item.name: item for item in record_fields(owner.node)} if is_record(owner.node) else {}
        return _Takes(tuple(fields.values()))

    def _takes(
        self,
        module: Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        behind: tuple[_Owner | None, ...],
        method: bool,
    ) -> _Takes | None:
        """What a function takes, with what it hands on through `**kwargs` to the constructors `behind` it."""
        if _changes_arguments(node):
            return None
        own, variadic = own_parameters(node, method), node.args.vararg is not None
        if node.args.kwarg is None:
            return _Takes(own, False, variadic)
        further = self._through_kwargs(module, node, node.args.kwarg.arg, behind)
        names = {item.name for item in own}
        added = tuple(item for item in further or () if item.name not in names)
        return _Takes(own + added, further is None, variadic)

    def _through_kwargs(
        self,
        module: Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        kwargs: str,
        behind: tuple[_Owner | None, ...],
    ) -> tuple[Parameter, ...] | None:
        """The keys that a function reads out of its `**kwargs` or hands on; None when that cannot be known."""
        if node in self._busy:
            return ()
        self._busy.add(node)
        try:
            result: dict[str, Parameter] = {}
            for use in _uses(node, kwargs):
                if use.key is not None:
                    result.setdefault(use.key, Parameter(use.key, default="...", positional=False, through=True))
                elif not use.harmless:
                    passed = self._passed_on(module, use.call, behind) if use.call else None
                    if passed is None:
                        return None
                    for item in passed:
                        result.setdefault(item.name, replace(item, positional=False, through=True))
            return tuple(result.values())
        finally:
            self._busy.discard(node)

    def _passed_on(self, module: Module, call: ast.Call, behind: tuple[_Owner | None, ...]) -> list[Parameter] | None:
        """What the callee of `f(..., **kwargs)` still takes beyond the arguments written in that call."""
        text = ast.unparse(call.func)
        bound = re.fullmatch(r"super\(.*\)\.(__init__|__new__)", text)
        takes: _Takes | Callee | None
        if bound:
            takes = self._constructor(behind)
        else:
            there = self._follow(module, text.removesuffix(".__init__"))
            callee = self._callee(*there) if isinstance(there, tuple) and not isinstance(there, Dynamic) else None
            takes = callee if isinstance(callee, Callee) else None
        if takes is None or takes.open:
            return None
        by_keyword = {item.arg for item in call.keywords if item.arg}
        stars = (index for index, item in enumerate(call.args) if isinstance(item, ast.Starred))
        by_position = next(stars, len(call.args)) - (
            text.endswith(".__new__") or (text.endswith("__init__") and not bound)
        )
        positional = [item for item in takes.parameters if item.positional][: max(by_position, 0)]
        return [item for item in takes.parameters if item.name not in by_keyword and item not in positional]


def _is_uncertain(there: object) -> bool:
    return isinstance(there, Dynamic) and not there.certain


def _changes_arguments(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a decorator may make something else of it."""
    names = {ast.unparse(item).partition("(")[0].rpartition(".")[2].strip("_") for item in node.decorator_list}
    return not names <= _HARMLESS


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
            yield _use(item, parents[item], parents.get(parents[item]))


def _use(item: ast.Name, parent: ast.AST, above: ast.AST | None) -> _Use:
    if isinstance(parent, ast.keyword) and parent.arg is None and isinstance(above, ast.Call):
        return _Use(call=above)
    if isinstance(parent, ast.Subscript) and (key := _text(parent.slice)) is not None:
        return _Use(harmless=True) if isinstance(parent.ctx, ast.Store) else _Use(key=key)
    if isinstance(parent, ast.Attribute) and isinstance(above, ast.Call):
        key = _text(above.args[0]) if above.args and parent.attr in ("pop", "get", "setdefault") else None
        return _Use(key=key) if key is not None else _Use(harmless=parent.attr in ("update", "keys", "__len__"))
    if isinstance(parent, ast.Compare) and (key := _text(parent.left)) is not None:
        return _Use(key=key)
    counts = isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("len", "sorted", "bool", "list", "iter")
    tests = ast.If | ast.BoolOp | ast.UnaryOp | ast.FormattedValue | ast.Compare | ast.Assert | ast.IfExp | ast.Delete
    return _Use(harmless=counts or isinstance(parent, tests))


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


SOURCE = Source(module_file)
