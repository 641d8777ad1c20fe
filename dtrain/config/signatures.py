"""What a name stands for and which arguments it takes, read from source text by `ast`, importing nothing.

A misspelt key of a torch class is found without the two seconds that importing torch takes, and nothing that a config
names is executed before it is known to be a class or a function of an allowed package.
"""

import ast
import functools
import itertools
import re
import sys
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.annotations import Parameter, is_record, own_parameters, record_fields
from dtrain.config.errors import first_few

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


class Callee(NamedTuple):
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
    def positional(self) -> list[Parameter]:
        """What can be given by position."""
        return [item for item in self.parameters if item.positional]

    @property
    def keywords(self) -> set[str]:
        """The names of what can be given by name."""
        return {item.name for item in self.parameters if item.keyword}

    @property
    def signature(self) -> str:
        """`AdamW(params, lr: float = 1e-3, ...)` in one line; of what goes through `**kwargs`, a few names."""
        parts = [str(item) for item in self.parameters if not item.through] + (["*args"] if self.variadic else [])
        through = [item.name for item in self.parameters if item.through]
        if through:
            parts.append(f"**kwargs: {first_few(through, 4)}")
        return f"{self.name}({', '.join(parts + (['**kwargs'] if self.open else []))})"


Function = ast.FunctionDef | ast.AsyncFunctionDef
Binding = ast.ClassDef | Function | ast.expr | tuple[str, str | None]  # a definition, an assigned value, or an import
_UNKNOWN = ast.Constant(None)  # the value of a name that is bound in a way not followed here


class Module:
    """One parsed source file: what its top level binds; a SyntaxError where it cannot be read as Python."""

    def __init__(self, name: str, file: ModuleFile) -> None:
        self.name, self.file = name, file
        text, body = _read(file.path) if file.path else ("", [])
        self.bindings: dict[str, Binding] = {}
        self.attributes: dict[str, ast.expr] = {}  # what is set on what it binds: `function.higher_is_better = True`
        self.stars: list[str] = []
        for statement, conditional in _statements(body):
            self._bind(statement, conditional)
        # Whether it may have names that cannot be seen in its text.
        self.hides = "__getattr__" in self.bindings or (file.path is None and not file.is_package)
        self.hides |= any(hider in f"\n{text}" for hider in _HIDERS)

    def _bind(self, node: ast.stmt, conditional: bool) -> None:
        if isinstance(node, ast.ClassDef | Function):
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
                self._assign(target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self.bindings[target.id] = value or _UNKNOWN
        elif isinstance(target, ast.Attribute):
            self.attributes[ast.unparse(target)] = value or _UNKNOWN
        elif isinstance(target, ast.Tuple | ast.List):
            self.bindings |= {item.id: _UNKNOWN for item in ast.walk(target) if isinstance(item, ast.Name)}

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name if self.file.is_package else self.name.rpartition(".")[0]
        base = package.rsplit(".", node.level - 1)[0]
        return f"{base}.{node.module}" if node.module else base


# What may give a module names that cannot be seen in its text.
_HIDERS = ("globals()", "sys.modules[__name__]", "\nexec(")


def _text(path: Path) -> str:
    """What a file says, in the encoding that it names itself."""
    with tokenize.open(path) as file:
        return file.read()


def _may_bind(text: str, name: str) -> bool:
    """Whether a module could mean something by a name: False only where its text, read but not parsed, rules that out.

    Parsing is nearly all of the time that it takes to check a config, and most names are in one of many files searched.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)  # as Python reads names
    bound = re.search(rf"(?<![\w.`'\"]){name}(?![\w.`'\"])", text)  # not as an attribute or between quotes
    others = re.search(r"\bimport\s*\(?\s*\*", text)
    return bool(bound or others) or any(hider in f"\n{text}" for hider in ("__getattr__", *_HIDERS))


def _read(path: Path) -> tuple[str, list[ast.stmt]]:
    """A file's text and its statements."""
    try:
        text = _text(path)
        with warnings.catch_warnings():  # such as of '\d'; whoever imports it will see them
            warnings.simplefilter("ignore")
            return text, ast.parse(text, filename=str(path)).body
    except (SyntaxError, OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SyntaxError) and error.filename:
            raise
        # Its encoding, a NUL byte, brackets without end.
        raise SyntaxError(f"cannot be read: {error}", (str(path), 1, None, None)) from None


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
        for file, is_package in ((place / "__init__.py", True), (place.with_suffix(".py"), False)):
            if file.is_file():
                return ModuleFile(file, is_package)
        is_compiled = any(place.parent.glob(f"{rest[-1]}.*.so"))
        if is_compiled or place.is_dir():
            return ModuleFile(None, not is_compiled)
    return None


def is_standard(name: str) -> bool:
    """Whether a module, or a name in it, belongs to the standard library."""
    return name.partition(".")[0] in sys.stdlib_module_names


class Definition(NamedTuple):
    """A `class` or `def` as written, and the module it is written in."""

    module: Module
    node: ast.ClassDef | Function


Lineage = tuple[Definition | None, ...]  # a class and its bases; None stands for one that cannot be read
Upwards = Callable[[], Iterable[Definition | None]]  # gives them one by one, each time from the class itself
# What a name can mean. A text is the name of a module, or of anything in the standard library, which is not followed.
Meaning = Definition | Dynamic | str | None
Visited = frozenset[tuple[str, str]]  # the modules and names that led here: imports may form a circle


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
    """Follows names through source files."""

    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}
        self._texts: dict[Path, str] = {}  # of those that were not parsed yet
        self._callees: dict[ast.stmt, Callee | Dynamic] = {}
        self._in_progress: set[ast.stmt] = set()  # functions whose `**kwargs` are being followed: some call themselves

    def forget(self) -> None:
        """Give back the memory of what was read, which a training has better uses for; who asks again, reads again."""
        for known in (self._texts, self._modules, self._callees):
            known.clear()

    def _can_mean(self, file: ModuleFile, name: str) -> bool:
        """Whether a module that was not parsed may mean something by a name that is not one of its submodules."""
        if file.path and file.path not in self._texts:
            try:
                self._texts[file.path] = _text(file.path)
            except (SyntaxError, OSError, ValueError):
                return True  # who parses it will say why it cannot be read
        return file.path is None or _may_bind(self._texts[file.path], name)

    def module(self, name: str) -> Module | None:
        """The parsed module, or None when there is none of that name; a SyntaxError where the file is not Python."""
        if name not in self._modules and (file := module_file(name)):
            self._modules[name] = Module(name, file)
        return self._modules.get(name)

    def names(self, module_name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The public names of a module that may be classes or functions."""
        module = self.module(module_name)
        if module is None or module_name in seen:
            return set()
        names = set().union(*(self.names(star, seen | {module_name}) for star in module.stars))
        for name, value in module.bindings.items():
            if not isinstance(value, tuple) or (value[1] and not is_standard(value[0])):
                names.add(name)
        return {name for name in names if not name.startswith("_")}

    def lookup(self, module_name: str, name: str) -> Callee | Dynamic | str | None:
        """What `name` means in a module: a callee, what only an import can tell, a text (see `Meaning`), nothing."""
        meaning = self._lookup(module_name, name, frozenset())
        return self._callee(*meaning) if isinstance(meaning, Definition) else meaning

    def search(self, library: str, name: str) -> Callee | Dynamic | str | None:
        """The same in one of many libraries, which is not parsed where its text rules the name out."""
        file = None if library in self._modules else module_file(library)
        if file is None or self._can_mean(file, name):
            return self.lookup(library, name)
        return f"{library}.{name}" if file.is_package and module_file(f"{library}.{name}") else None

    def attribute(self, module_name: str, name: str, attribute: str) -> Any:
        """The plain value that a class or a function gives an attribute in its source text.

        None where it has no such attribute; `...` where only the object itself can tell. Of a class that makes objects
        of other classes (`__new__`), the value that all of these agree on.
        """
        meaning = self._lookup(module_name, name, frozenset())
        if not isinstance(meaning, Definition):
            return ...
        module, node = meaning
        if isinstance(node, ast.ClassDef):
            return self._class_attribute(self._upwards(module, node), attribute)
        written = module.attributes.get(f"{node.name}.{attribute}")
        return None if written is None else _plain(written)

    def definitions(self, module_name: str, name: str) -> Iterator[Definition]:
        """What a name leads to as it is written: a function; a class and those of its bases that can be read."""
        meaning = self._lookup(module_name, name, frozenset())
        if isinstance(meaning, Definition) and isinstance(meaning.node, ast.ClassDef):
            yield from filter(None, self._lineage(meaning.module, meaning.node))
        elif isinstance(meaning, Definition):
            yield meaning

    def methods(self, module_name: str, name: str, above: tuple[str, str]) -> set[str] | None:
        """The methods that a class and its bases define, without those of the base `above` (its module and name).

        None where something of it cannot be read.
        """
        meaning = self._lookup(module_name, name, frozenset())
        if not isinstance(meaning, Definition) or not isinstance(meaning.node, ast.ClassDef):
            return None
        found: set[str] = set()
        for owner in self._lineage(meaning.module, meaning.node):
            if owner is None:
                return None
            if (owner.module.name, owner.node.name) != above:
                found |= {item.name for item, _ in _statements(owner.node.body) if isinstance(item, Function)}
        return found

    def method(self, module_name: str, name: str, method: str) -> tuple[list[Parameter], bool] | None:
        """What a method of a class takes after `self`, and whether it takes anything else, too; None: not known."""
        meaning = self._lookup(module_name, name, frozenset())
        if not isinstance(meaning, Definition) or not isinstance(meaning.node, ast.ClassDef):
            return None
        for owner in self._upwards(meaning.module, meaning.node):
            if owner is None:
                return None
            for item, _ in _statements(owner.node.body):
                if isinstance(item, ast.FunctionDef) and item.name == method:
                    takes = self._takes(owner.module, item, tuple, method=True)
                    return takes and (list(takes.parameters), takes.open or takes.variadic)
                if isinstance(item, ast.Assign) and method in map(ast.unparse, item.targets):
                    return None
        return None

    def _class_attribute(self, lineage: Iterable[Definition | None], attribute: str) -> Any:
        for owner in lineage:
            if owner is None:
                return ...
            body = [item for item, _ in _statements(owner.node.body)]
            new = next((item for item in body if isinstance(item, ast.FunctionDef) and item.name == "__new__"), None)
            if made := self._made_by(owner, new) if new else []:
                values = [self._class_attribute(lineage, attribute) if lineage else ... for lineage in made]
                return values[0] if all(value == values[0] for value in values) else ...
            if _is_set_by_methods(owner.node, attribute):
                return ...
            for item in body:
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if attribute in names and (value := getattr(item, "value", None)):
                    return _plain(value)
        return None

    def _made_by(self, owner: Definition, new: ast.FunctionDef) -> list[Iterator[Definition | None] | None]:
        """The lineages of the objects that a `__new__` returns, other than of its own class; None: not known."""
        made: list[Iterator[Definition | None] | None] = []
        for value in (item.value for item in ast.walk(new) if isinstance(item, ast.Return)):
            text = ast.unparse(value.func if isinstance(value, ast.Call) else value or _UNKNOWN)
            if (
                isinstance(value, ast.Name | ast.Constant | None)
                or text.startswith("super(")
                or text == "object.__new__"
            ):
                continue
            meaning = self._follow(owner.module, text)
            match meaning:
                case Definition(module, ast.ClassDef() as node) if node is not owner.node:
                    made.append(self._upwards(module, node))
                case _:
                    made.append(None)
        return made

    def _lookup(self, module_name: str, name: str, visited: Visited) -> Meaning:
        if is_standard(module_name):
            return f"{module_name}.{name}"
        module = self.module(module_name)
        if module is None or (module_name, name) in visited:
            return None
        visited |= {(module_name, name)}
        binding = module.bindings.get(name)
        if binding is None:
            return self._unbound(module, name, visited)
        if isinstance(binding, ast.ClassDef | Function):
            return Definition(module, binding)
        if isinstance(binding, tuple):
            return self._imported(module, name, binding, visited)
        is_alias = isinstance(binding, ast.Name | ast.Attribute)
        alias = self._follow(module, ast.unparse(binding), visited) if is_alias else None
        return alias or Dynamic(module_name, name)

    def _unbound(self, module: Module, name: str, visited: Visited) -> Meaning:
        """What a name means that the module's own top level does not bind: an `import *` may, or it is a submodule."""
        may_be_hidden = module.hides
        for star in [] if name.startswith("_") else [item for item in module.stars if not is_standard(item)]:
            meaning = self._lookup(star, name, visited)
            if isinstance(meaning, Dynamic) and not meaning.certain:
                may_be_hidden = True
            elif meaning:
                return meaning
        if module.file.is_package and module_file(f"{module.name}.{name}"):
            return f"{module.name}.{name}"
        return Dynamic(module.name, name, certain=False) if may_be_hidden else None

    def _imported(self, module: Module, name: str, imported: tuple[str, str | None], visited: Visited) -> Meaning:
        origin, attribute = imported
        if attribute is None:
            return origin
        if not is_standard(origin) and not module_file(origin.partition(".")[0]):
            return Dynamic(module.name, name)  # its import will say what is missing, and where it is asked for
        meaning = self._lookup(origin, attribute, visited)
        if isinstance(meaning, Dynamic) and not meaning.certain:
            return Dynamic(module.name, name)
        return f"{origin}.{attribute}" if meaning is None and module_file(f"{origin}.{attribute}") else meaning

    def _follow(self, module: Module, dotted_name: str, visited: Visited = frozenset()) -> Meaning:
        """What a dotted name means inside a module."""
        meaning: Meaning = module.name
        for part in dotted_name.split("."):
            if not isinstance(meaning, str) or not part.isidentifier():
                return None
            meaning = self._lookup(meaning, part, visited)
        return meaning

    def _callee(self, module: Module, node: ast.ClassDef | Function) -> Callee | Dynamic:
        if node in self._callees:
            return self._callees[node]
        if is_class := isinstance(node, ast.ClassDef):
            takes = self._constructor(functools.partial(self._upwards, module, node))
        else:
            takes = self._takes(module, node, tuple, method=False)
        where = (module.name, node.name, str(module.file.path), node.lineno, is_class)
        callee = Dynamic(module.name, node.name) if takes is None else Callee(*where, *takes)
        if not self._in_progress:  # else it may lack what is being followed just now
            self._callees[node] = callee
        return callee

    def _lineage(self, module: Module, node: ast.ClassDef, seen: frozenset[ast.ClassDef] = frozenset()) -> Lineage:
        """The class and its bases in the order in which Python asks them."""
        return tuple(self._upwards(module, node, seen))

    def _upwards(
        self, module: Module, node: ast.ClassDef, seen: frozenset[ast.ClassDef] = frozenset()
    ) -> Iterator[Definition | None]:
        """The same one by one: who finds an answer on the way need not have the rest parsed, such as nn.Module."""
        yield None if _has_metaclass(node) else Definition(module, node)
        written = (ast.unparse(base).partition("[")[0] for base in node.bases)
        bases = [text for text in written if text.rpartition(".")[2] not in _NO_PARAMETERS]
        if len(bases) == 1:
            yield from self._above(module, bases[0], seen | {node})
            return
        result: list[Definition | None] = []
        for text in bases:
            further = list(self._above(module, text, seen | {node}))
            result = [item for item in result if item is None or item not in further] + further
        yield from result

    def _above(self, module: Module, base: str, seen: frozenset[ast.ClassDef]) -> Iterator[Definition | None]:
        """A base of a class, by its name in a module, and what is above that."""
        match self._follow(module, base):
            case Definition(base_module, ast.ClassDef() as node) if node not in seen:
                yield from self._upwards(base_module, node, seen)
            case _:
                yield None

    def _constructor(self, upwards: Upwards) -> _Takes | None:
        """What the first constructor of a class and its bases takes; None when it cannot be read."""
        for index, owner in enumerate(upwards()):
            if owner is None:
                return None
            body = [item for item, _ in _statements(owner.node.body)]
            methods = {item.name: item for item in body if isinstance(item, ast.FunctionDef)}
            new, init = methods.get("__new__"), methods.get("__init__")
            if new and init and new.args.vararg and new.args.kwarg:
                new = None  # it lets everything through to __init__
            if method := new or init:
                return self._takes(owner.module, method, functools.partial(_beyond, upwards, index), method=True)
            assigned = {ast.unparse(name) for item in body if isinstance(item, ast.Assign) for name in item.targets}
            if assigned & {"__init__", "__new__"}:
                return None
            if is_record(owner.node):
                return self._record((owner, *_beyond(upwards, index)))
            if _changes_arguments(owner.node):  # such as attrs' define, which writes the constructor
                return None
        return _Takes()

    def _record(self, lineage: Lineage) -> _Takes | None:
        fields: dict[str, Parameter] = {}
        for owner in reversed(lineage):
            if owner is None:
                return None
            fields |= {item.name: item for item in record_fields(owner.node)} if is_record(owner.node) else {}
        return _Takes(tuple(fields.values()))

    def _takes(self, module: Module, node: Function, behind: Upwards, method: bool) -> _Takes | None:
        """What a function takes, with what it hands on through `**kwargs` to the constructors `behind` it."""
        if _changes_arguments(node):
            return None
        own = tuple(own_parameters(node, method))
        further = self._through_kwargs(module, node, behind) if node.args.kwarg else ()
        names = {item.name for item in own}
        added = tuple(item for item in further or () if item.name not in names)
        return _Takes(own + added, further is None, node.args.vararg is not None)

    def _through_kwargs(self, module: Module, node: Function, behind: Upwards) -> tuple[Parameter, ...] | None:
        """The keys that a function reads out of its `**kwargs` or hands on; None when that cannot be known."""
        if node in self._in_progress:
            return ()
        self._in_progress.add(node)
        try:
            result: dict[str, Parameter] = {}
            for use in _uses_of_kwargs(node):
                passed = [Parameter(use, default="...")] if isinstance(use, str) else None
                if isinstance(use, ast.Call):
                    passed = self._passed_on(module, use, behind)
                if passed is None:
                    return None
                for item in passed:
                    result.setdefault(item.name, item._replace(positional=False, through=True))
            return tuple(result.values())
        finally:
            self._in_progress.discard(node)

    def _passed_on(self, module: Module, call: ast.Call, behind: Upwards) -> list[Parameter] | None:
        """What the callee of `f(..., **kwargs)` still takes beyond the arguments written in that call."""
        text = ast.unparse(call.func)
        bound = re.fullmatch(r"super\(.*\)\.(__init__|__new__)", text)
        meaning = None if bound else self._follow(module, text.removesuffix(".__init__"))
        callee = self._callee(*meaning) if isinstance(meaning, Definition) else None
        takes = self._constructor(behind) if bound else callee
        if not isinstance(takes, _Takes | Callee) or takes.open:
            return None
        by_keyword = {item.arg for item in call.keywords if item.arg}
        stars = (index for index, item in enumerate(call.args) if isinstance(item, ast.Starred))
        takes_self = text.endswith(".__new__") or (text.endswith("__init__") and not bound)
        by_position = max(next(stars, len(call.args)) - takes_self, 0)
        positional = [item for item in takes.parameters if item.positional][:by_position]
        return [item for item in takes.parameters if item.name not in by_keyword and item not in positional]


def _beyond(upwards: Upwards, index: int) -> Iterator[Definition | None]:
    """The bases beyond the one with an index."""
    return itertools.islice(upwards(), index + 1, None)


def _has_metaclass(node: ast.ClassDef) -> bool:
    """Whether a class has a metaclass that may take arguments of its own."""
    return any(item.arg == "metaclass" and "ABCMeta" not in ast.unparse(item.value) for item in node.keywords)


def _changes_arguments(node: ast.ClassDef | Function) -> bool:
    """Whether a decorator may make something else of it."""
    names = {ast.unparse(item).partition("(")[0].rpartition(".")[2].strip("_") for item in node.decorator_list}
    return not names <= _HARMLESS


def _plain(value: ast.expr) -> Any:
    """A literal's value; `...` for what must be computed."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ...


def _is_set_by_methods(node: ast.stmt, attribute: str) -> bool:
    """Whether a property of a class, or a method that sets it, makes an attribute's value the object's own affair."""
    return any(
        (isinstance(item, ast.FunctionDef) and item.name == attribute)
        or (isinstance(item, ast.Attribute) and item.attr == attribute and isinstance(item.ctx, ast.Store))
        for item in ast.walk(node)
    )


_EMPTINESS_TESTS = ast.If | ast.BoolOp | ast.UnaryOp | ast.FormattedValue | ast.Compare | ast.Assert | ast.IfExp


def _uses_of_kwargs(node: Function) -> Iterator[str | ast.Call | None]:
    """What a function does with its `**kwargs`: the key that it reads, or the call that it hands all of it to.

    Harmless uses are left out (asking whether it is empty, listing its names, adding to it); None: not understood.
    """
    parents = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
    for item in ast.walk(node):
        if not isinstance(item, ast.Name) or not node.args.kwarg or item.id != node.args.kwarg.arg:
            continue
        match parents[item], parents.get(parents[item]):
            case ast.keyword(arg=None), ast.Call() as call:  # f(**kwargs)
                yield call
            case (
                (ast.Subscript(slice=ast.Constant(value=str()), ctx=ast.Store()), _)  # kwargs["key"] = ...
                | (ast.Attribute(attr="update" | "keys" | "__len__"), ast.Call())
                | (ast.Call(func=ast.Name(id="len" | "sorted" | "bool" | "list" | "iter")), _)
            ):
                continue
            case (
                (ast.Subscript(slice=ast.Constant(value=str(key))), _)  # kwargs["key"]
                | (ast.Attribute(attr="pop" | "get" | "setdefault"), ast.Call(args=[ast.Constant(value=str(key)), *_]))
                | (ast.Compare(left=ast.Constant(value=str(key))), _)  # "key" in kwargs
            ):
                yield key
            case parent, _ if not isinstance(parent, _EMPTINESS_TESTS | ast.Delete):
                yield None


SOURCE = Source()
