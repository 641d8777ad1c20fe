"""What a model takes and gives, read off one batch: names, types and shapes, for MLflow's signature."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def signature_of(outcome: Any) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of an `Outcome`, each tensor as {name, dtype, shape}, the batch's axis as -1.

    {} where an `evaluation_step` of one's own gives no outcome, or where not all are tensors, alone or by name.
    """
    told = outcome[2] if isinstance(outcome, tuple) and len(outcome) == 3 else None
    sides = {"inputs": _tensors(getattr(told, "inputs", None)), "outputs": _tensors(getattr(told, "output", None))}
    return sides if all(sides.values()) else {}


def _tensors(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, Tensor):
        value = {"": value}
    if isinstance(value, tuple | list):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, Mapping) or not all(isinstance(item, Tensor) and item.ndim for item in value.values()):
        return []
    return [
        {"dtype": _numpy_name(item), "shape": [-1, *item.shape[1:]]} | ({"name": str(key)} if key != "" else {})
        for key, item in value.items()
    ]


def _numpy_name(tensor: Tensor) -> str:
    """The type's name in NumPy; outputs in bfloat16 are given as float32."""
    name = str(tensor.dtype).removeprefix("torch.")
    return "float32" if name == "bfloat16" else name
