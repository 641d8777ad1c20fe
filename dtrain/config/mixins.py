"""`trainer.name` as a list: classes that become one, by Python's own rules, in the order in which they are listed."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dtrain.config.annotations import Parameter
from dtrain.config.signatures import Callee, Dynamic


def joined(parts: Sequence[Callee | Dynamic], base: Callee) -> Callee | Dynamic:
    """What one class of these and the base takes: the settings of all, as each class passes on what is not its own."""
    names = " + ".join(part.name for part in parts)
    callees = [part for part in parts if isinstance(part, Callee)]
    if len(callees) < len(parts):  # of one of them only the object itself can tell
        return Dynamic(parts[0].module, names)
    parameters: dict[str, Parameter] = {}
    for callee in (*callees, base):
        for item in callee.parameters:
            parameters.setdefault(item.name, item)
    first, is_open = callees[0], any(callee.open for callee in callees)
    return Callee(first.module, names, first.file, first.line, True, tuple(parameters.values()), is_open)


def compose(classes: Sequence[type], base: type) -> type:
    """`class Name(*classes)`, and of the base where none of them is; see `mixin_mistakes` for what comes first.

    Raises:
        TypeError: No order of their methods fits.
    """
    bases = tuple(classes) if any(issubclass(item, base) for item in classes) else (*classes, base)
    return type("".join(item.__name__ for item in classes), bases, {"__module__": classes[0].__module__})


def mixin_mistakes(classes: Sequence[Any], base: type) -> Iterator[tuple[int, str]]:
    """What keeps classes from becoming one that is what it looks like: the number of one of them, and why."""
    for number, item in enumerate(classes):
        if not inspect.isclass(item):
            yield number, f"is a {type(item).__name__}; expected a class"
        elif not issubclass(item, base) and not any(_own_methods(item, base)):
            yield number, f"{item.__name__} is not a mixin: it is not a {base.__name__}, and overrides no method of it"
        elif "__init__" in vars(item) and item is not base and not _takes_further(item.__init__):
            cure = f"def __init__(self, {_given(item.__init__)}*, ..., **settings), with them to super().__init__"
            yield number, f"{item.__name__} takes no settings but its own; let it pass on those of the others: {cure}"
        else:
            for behind in classes[number + 1 :]:
                if inspect.isclass(behind) and (text := _pair_mistake(item, behind, base)):
                    yield number, text


def _pair_mistake(item: type, behind: type, base: type) -> str:
    """What is wrong with two classes in this order."""
    name, other = item.__name__, behind.__name__
    if item is behind:
        return f"{name} is listed twice"
    if issubclass(behind, item):
        return f"{name} stands before {other}, which derives from it; as in `class (A, B)`, it must stand behind it"
    if issubclass(item, base) and not issubclass(behind, base):
        return f"{other} stands behind {name}, so that its methods are never called; put it before {name}"
    for method, function in _own_methods(item, base):
        names = getattr(getattr(function, "__code__", None), "co_names", ("super",))  # of what is wrapped, nobody knows
        asks_next = {"super", base.__name__, other} & set(names)
        if not asks_next and not issubclass(item, behind) and method in dict(_own_methods(behind, base)):
            return f"{name}.{method} calls no super(), so that of {other} is never called; put {other} before {name}"
    return ""


def _own_methods(item: type, base: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The base's public methods that a class, or one that it derives from below the base, has of its own."""
    known = {name for name, value in vars(base).items() if name[0] != "_" and inspect.isfunction(value)}
    for owner in item.__mro__:
        if owner not in base.__mro__:
            yield from ((name, value) for name, value in vars(owner).items() if name in known and callable(value))


def _takes_further(function: Callable[..., Any]) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def _given(function: Callable[..., Any]) -> str:
    """`parts, ` by the name that the constructor has for it."""
    names = [*inspect.signature(function).parameters][1:2]
    return "".join(f"{name}, " for name in names)
