"""Does a YAML value fit a type annotation? Works on annotations as source text; knows no config and no callee."""

import ast

# What a YAML value can never be, so that such an annotation neither accepts nor excuses it. A component (a mapping with
# a `name`) is built into an object and is not looked at here.
_OBJECTS = {"Tensor", "Module", "Optimizer", "Dataset", "Generator", "ndarray", "Callable", "Metric", "LRScheduler"}
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection", "set", "Set"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "ConfigDict"}


def expectation(value: object, annotation: ast.expr | None) -> str | None:
    """What was expected instead of a YAML value, or None when the annotation admits it or cannot be understood."""
    if annotation is None or _admits(value, annotation):
        return None
    return _described(annotation)


def _admits(value: object, annotation: ast.expr) -> bool:
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            try:
                return _admits(value, ast.parse(annotation.value, mode="eval").body)
            except SyntaxError:
                return True
        return annotation.value is not None or value is None
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _admits(value, annotation.left) or _admits(value, annotation.right)
    if isinstance(annotation, ast.Subscript):
        return _admits_generic(value, _last_name(annotation.value), annotation.slice)
    name = _last_name(annotation)
    if name in _SCALARS:
        return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
    if name in _LISTS:
        return isinstance(value, list)
    if name in _MAPPINGS:
        return hasattr(value, "keys")
    if name == "Tensor":
        return is_numbers(value)
    return name not in _OBJECTS and name != "None"


def _admits_generic(value: object, name: str, inside: ast.expr) -> bool:
    items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if name == "Union":
        return any(_admits(value, item) for item in items)
    if name == "Optional":
        return value is None or _admits(value, inside)
    if name == "Literal":
        return any(isinstance(item, ast.Constant) and item.value == value for item in items)
    if name in _LISTS:
        if not isinstance(value, list):
            return False
        if name in ("tuple", "Tuple") and ast.unparse(items[-1]) != "...":
            return len(value) == len(items) and all(_admits(*pair) for pair in zip(value, items, strict=True))
        return all(_admits(item, items[0]) for item in value)
    if name in _MAPPINGS:
        return hasattr(value, "keys")
    return name not in _OBJECTS


def is_numbers(value: object) -> bool:
    """A list of numbers, or of such lists: what stands for a tensor in YAML."""
    return isinstance(value, list) and all(is_numbers(item) or type(item) in (int, float) for item in value)


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _described(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    if isinstance(annotation, ast.Subscript):
        name, inside = _last_name(annotation.value), annotation.slice
        if name == "Optional":
            return f"{_described(inside)} or null"
        if name == "Literal":
            items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            return f"one of {', '.join(ast.unparse(item) for item in items)}"
        if name == "Union" and isinstance(inside, ast.Tuple):
            return _either(inside.elts)
    if isinstance(annotation, ast.BinOp):
        return _either([annotation.left, annotation.right])
    text = ast.unparse(annotation)
    return {"None": "null", "str": "text"}.get(text, text)


def _either(items: list[ast.expr]) -> str:
    """What can be written in YAML of several types; an object is named only where there is nothing else."""
    writable = [item for item in items if _last_name(item) not in _OBJECTS] or items
    return " or ".join(_described(item) for item in writable)
