"""What an argument takes (annotation, default, range) as JSON Schema."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.config.annotations import (
    LISTS,
    MAPPINGS,
    OBJECTS,
    TUPLES,
    Parameter,
    items_of,
    members_of,
    name_of,
    takes_mapping,
    takes_mappings,
    takes_objects,
)
from dtrain.config.errors import is_mapping

Schema = dict[str, Any]
ANYTHING: Schema = {"$ref": "#/$defs/value"}  # in which components may lie, at any depth
COMPONENT: Schema = {"$ref": "#/$defs/component"}
REFERENCE: Schema = {"type": "string", "pattern": r"\$\{"}  # `${NAME}`, `${section.key}`
NUMBERS: Schema = {"$ref": "#/$defs/numbers"}
_SCALARS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "null"}


def property_of(
    parameter: Parameter, said: str = "", limits: tuple[float, float] | None = None, mapping: Schema | None = None
) -> Schema:
    """The schema of one argument; `mapping` says what a mapping among its values holds."""
    result = of_annotation(parameter, mapping)
    if limits:
        result |= {key: value for key, value in zip(("minimum", "maximum"), limits, strict=True) if abs(value) < 1e308}
    if said:
        result["description"] = said
    default = _literal(parameter.default)
    return result if default is ... else result | {"default": default}


def of_annotation(parameter: Parameter, mapping: Schema | None = None) -> Schema:
    """What its annotation admits, without what the schema's reader need not know."""
    if parameter.annotation is None:
        return {**ANYTHING}
    alternatives = [*_alternatives(parameter.annotation, mapping)]
    if parameter.default == "None":
        alternatives.append({"type": "null"})
    if takes_objects(parameter.annotation):  # the name of one
        alternatives += [{"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, COMPONENT]}}]
    return any_of([*alternatives, REFERENCE])


def any_of(alternatives: list[Schema]) -> Schema:
    """One of several schemas, in the shortest form."""
    if any(item == ANYTHING for item in alternatives):
        return {**ANYTHING}
    distinct = [item for number, item in enumerate(alternatives) if item not in alternatives[:number]]
    types = [item["type"] for item in distinct if {*item} == {"type"}]
    if "number" in types:
        types = [name for name in types if name != "integer"]
    if "string" in types:
        distinct = [item for item in distinct if item != REFERENCE]
    rest = [item for item in distinct if {*item} != {"type"}]
    plain: list[Schema] = [{"type": types[0] if len(types) == 1 else types}] if types else []
    both = plain + rest
    return {**both[0]} if len(both) == 1 else {"anyOf": both}


def _alternatives(annotation: ast.expr, mapping: Schema | None) -> Iterator[Schema]:
    is_mapping_alone, are_mappings = takes_mapping(annotation), takes_mappings(annotation)
    for member in members_of(annotation):
        name = name_of(member)
        items = items_of(member) if isinstance(member, ast.Subscript) else []
        if name == "Literal" and items:
            yield {"enum": [_literal(ast.unparse(item), ast.unparse(item)) for item in items]}
        elif name in _SCALARS:
            yield {"type": _SCALARS[name]}
        elif name == "Tensor":
            yield from (NUMBERS, COMPONENT)
        elif name in OBJECTS:
            yield COMPONENT
        elif name in LISTS:
            yield from _lists(name, items, mapping or ({"type": "object"} if are_mappings else None))
        elif name in MAPPINGS:
            yield mapping or ({"type": "object"} if is_mapping_alone else _mapping(items))
        else:
            yield ANYTHING


def _lists(name: str, items: list[ast.expr], mapping: Schema | None) -> Iterator[Schema]:
    if not items:
        yield {"type": "array", "items": ANYTHING}
    elif name in TUPLES and ast.unparse(items[-1]) != "...":
        each = [any_of([*_alternatives(item, mapping), REFERENCE]) for item in items]
        yield {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    else:
        yield {"type": "array", "items": any_of([*_alternatives(items[0], mapping), COMPONENT, REFERENCE])}
    yield COMPONENT


def _mapping(items: list[ast.expr]) -> Schema:
    return {"type": "object", "additionalProperties": ANYTHING} if items else {"type": "object"}


def _literal(text: str | None, otherwise: Any = ...) -> Any:
    """The value that a source text stands for, if JSON knows such a one."""
    try:
        value = ast.literal_eval(text or "...")
        return _as_json(value)
    except (ValueError, SyntaxError):
        return otherwise


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if is_mapping(value) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(value)


def definitions() -> Mapping[str, Schema]:
    """What the schemas made here refer to, but for `component`."""
    value = {
        "if": {
            "type": "object",
            "required": ["name"],
            "not": {"properties": {"_data_": {"const": True}}, "required": ["_data_"]},
        },
        "then": COMPONENT,
        "else": {"items": ANYTHING, "additionalProperties": ANYTHING},
    }
    numbers = {"type": "array", "items": {"anyOf": [{"type": "number"}, NUMBERS]}}
    return {"value": value, "numbers": numbers}
