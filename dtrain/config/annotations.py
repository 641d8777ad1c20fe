"""What a `def` or a class says about its arguments (names, defaults, types), and whether a YAML value fits a type."""

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

from dtrain.config.errors import found, is_mapping, shown
from dtrain.config.yaml12 import scalar

# What a YAML value can never be, so that such an annotation neither accepts nor excuses it. A component (a mapping with
# a `name`) is built into an object and is not looked at here.
_CALLABLES = {"Callable", "type", "Type"}  # of these, a bare name stands for the function or class itself
_NAMED = {"Module", "Dataset", "Metric", *_CALLABLES}
OBJECTS = {"Tensor", "Optimizer", "Generator", "ndarray", "LRScheduler", *_NAMED}
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
TUPLES = {"tuple", "Tuple"}
LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "set", "Set", *TUPLES}
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "ConfigDict"}
# Words of YAML 1.1 and Python that YAML 1.2 reads as texts, and what is meant by them.
_OTHER_SPELLINGS = {"none": None, "nil": None, "yes": True, "on": True, "no": False, "off": False}


class Parameter(NamedTuple):
    """One argument that a callee takes."""

    name: str
    annotation: ast.expr | None = None
    default: str | None = None  # its source text; None: the argument is required
    positional: bool = True
    keyword: bool = True
    through: bool = False  # taken out of `**kwargs`

    def __str__(self) -> str:
        text = self.name + (f": {ast.unparse(self.annotation)}" if self.annotation else "")
        equals = " = " if self.annotation else "="
        return text if self.default is None else f"{text}{equals}{self.default}"


def own_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> Iterator[Parameter]:
    """What a `def` names itself; of a method without `self`."""
    takes = node.args
    positional = [*takes.posonlyargs, *takes.args]
    defaults = [None] * (len(positional) - len(takes.defaults)) + takes.defaults
    pairs = [*zip(positional, defaults, strict=True)][int(method) :]
    pairs += zip(takes.kwonlyargs, takes.kw_defaults, strict=True)
    for item, default in pairs:
        source = ast.unparse(default) if default else None
        yield Parameter(item.arg, item.annotation, source, item not in takes.kwonlyargs, item not in takes.posonlyargs)


def is_record(node: ast.stmt) -> bool:
    """A dataclass or a NamedTuple: its annotated names are its arguments."""
    if not isinstance(node, ast.ClassDef):
        return False
    if any(ast.unparse(item).rpartition(".")[2] == "NamedTuple" for item in node.bases):
        return True
    decorators = [ast.unparse(item) for item in node.decorator_list if "init=False" not in ast.unparse(item)]
    return any(item.partition("(")[0].rpartition(".")[2] == "dataclass" for item in decorators)


def record_fields(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Parameter]:
    """The arguments that a dataclass or NamedTuple adds to those of its bases."""
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        options, default = {}, ast.unparse(item.value) if item.value else None
        if isinstance(item.value, ast.Call) and ast.unparse(item.value.func).rpartition(".")[2] == "field":
            options = {option.arg: ast.unparse(option.value) for option in item.value.keywords}
            factory = options.get("default_factory")
            default = options.get("default") or (factory and f"{factory}()")
        if name_of(item.annotation) not in ("ClassVar", "KW_ONLY") and options.get("init") != "False":
            yield Parameter(item.target.id, item.annotation, default)


def wrong_type(value: object, annotation: ast.expr | None) -> str:
    """`expected int, found string '3'; write 3 without quotes`, or nothing where it fits or the type is not known."""
    if annotation is None or _admits(value, annotation):
        return ""
    return f"expected {_described(annotation)}, {found(value)}{correction(value, annotation)}"


def correction(value: object, annotation: ast.expr | None) -> str:
    """`; write 1000` where a value of another type was meant (1e3, "yes", "None", a number in quotes), or nothing."""
    meant: Any = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, str):
        meant = _OTHER_SPELLINGS.get(value.lower(), scalar(value))
    if type(meant) is type(value) or annotation is None or not _admits(meant, annotation):
        return ""
    is_quoted = isinstance(value, str) and scalar(value) is not value
    return f"; write {shown(meant)}{' without quotes' if is_quoted else ''}"


def wanted_as(value: object, annotation: ast.expr | None) -> str:
    """'Tensor' or 'tuple' where a list fits an annotation in that way alone; else nothing."""
    members = list(members_of(annotation)) if annotation and isinstance(value, list) else []
    fitting = {name_of(item) for item in members if _fits(value, item)}
    return "Tensor" if fitting == {"Tensor"} else "tuple" if fitting and fitting <= TUPLES else ""


def takes_objects(annotation: ast.expr | None) -> bool:
    """Whether objects are taken and no text, so that a text can only be the name of one: `collate_fn: padded`."""
    return annotation is not None and not _admits("", annotation) and bool(_object_names(annotation) & _NAMED)


def takes_callables(annotation: ast.expr | None) -> bool:
    """Whether a function or class itself is taken, not what it makes."""
    return annotation is not None and bool(_object_names(annotation) & _CALLABLES)


def _object_names(annotation: ast.expr) -> set[str]:
    """The kinds of objects in an annotation, also as items of a list."""
    members = list(members_of(annotation))
    items = [items_of(item)[0] for item in members if isinstance(item, ast.Subscript) and name_of(item) in LISTS]
    return {name_of(item) for item in members if name_of(item) in OBJECTS}.union(*map(_object_names, items))


def takes_mapping(annotation: ast.expr | None) -> bool:
    """Whether a mapping is taken and no object, such as dict[str, int] | None: then one with a `name` is data."""
    members = [item for item in members_of(annotation) if name_of(item) != "None"] if annotation else []
    return bool(members) and all(
        name_of(item) in MAPPINGS and not (isinstance(item, ast.Subscript) and _object_names(items_of(item)[-1]))
        for item in members
    )


def takes_mappings(annotation: ast.expr | None) -> bool:
    """Whether a list of mappings is what is wanted, such as list[dict] | None: then nothing inside it is built."""
    members = [item for item in members_of(annotation) if name_of(item) != "None"] if annotation else []
    return bool(members) and all(
        isinstance(item, ast.Subscript) and name_of(item) in LISTS and name_of(items_of(item)[0]) in MAPPINGS
        for item in members
    )


def members_of(annotation: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of a union, at any depth; quoted annotations are read."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            yield from members_of(ast.parse(annotation.value, mode="eval").body)
        except SyntaxError:
            yield ast.Name("Any")
    elif isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from members_of(annotation.left)
        yield from members_of(annotation.right)
    elif isinstance(annotation, ast.Subscript) and name_of(annotation) in ("Union", "Optional"):
        for item in items_of(annotation):
            yield from members_of(item)
        if name_of(annotation) == "Optional":
            yield ast.Constant(None)
    else:
        yield annotation


def _admits(value: object, annotation: ast.expr) -> bool:
    return any(_fits(value, item) for item in members_of(annotation))


def _fits(value: object, annotation: ast.expr) -> bool:
    """Whether a value fits an annotation that is not a union."""
    name = name_of(annotation)
    items = items_of(annotation) if isinstance(annotation, ast.Subscript) else []
    if name == "Literal" and items:
        return any(shown(value) == _literal(item) for item in items)
    if name in _SCALARS:
        return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
    if name in LISTS:
        if not items or not isinstance(value, list):
            return isinstance(value, list)
        if name in TUPLES and ast.unparse(items[-1]) != "...":
            return len(value) == len(items) and all(_admits(*pair) for pair in zip(value, items, strict=True))
        return all(_admits(item, items[0]) for item in value)
    if name in MAPPINGS:
        return is_mapping(value)
    if name == "Tensor":
        return is_numbers(value)
    return value is None if name == "None" else name not in OBJECTS


def is_numbers(value: object) -> bool:
    """A list of numbers, or of such lists: what stands for a tensor in YAML."""
    return isinstance(value, list) and all(is_numbers(item) or type(item) in (int, float) for item in value)


def items_of(annotation: ast.Subscript) -> list[ast.expr]:
    """What stands in the brackets of an annotation."""
    return annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]


def name_of(node: ast.expr) -> str:
    """`typing.Callable[[int], str]` -> 'Callable'."""
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node).rpartition(".")[2]


def _literal(node: ast.expr) -> str:
    """A literal as YAML would have it."""
    try:
        return shown(ast.literal_eval(node))
    except ValueError:  # a member of an Enum
        return ast.unparse(node)


def _described(annotation: ast.expr) -> str:
    """What can be written in YAML; an object is named only where there is nothing else."""
    members = list(members_of(annotation))
    writable = [item for item in members if name_of(item) not in OBJECTS and name_of(item) != "None"]
    optional = ["null"] if any(name_of(item) == "None" for item in members) else []
    return " or ".join([*dict.fromkeys(map(_described_member, writable or members)), *(optional if writable else [])])


def _described_member(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript) and name_of(annotation) == "Literal":
        literals = [_literal(item) for item in items_of(annotation)]
        return f"one of {', '.join(literals)}" if len(literals) > 1 else literals[0]
    text = ast.unparse(annotation)
    if name_of(annotation) in OBJECTS:
        return "a list of numbers" if name_of(annotation) == "Tensor" else "a component ({name: ...})"
    return {"None": "null", "str": "string", "dict": "a mapping", "list[str]": "a list of strings"}.get(text, text)
