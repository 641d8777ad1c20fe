"""Which output and which target belong together: by key, never by order."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dtrain.data.heads import main_pair, output_of

A, B, C, D = (torch.full((4,), float(number)) for number in range(4))
Heads = namedtuple("Heads", "mask label")
SAMPLES = [{"boxes": A, "scores": B}, {"boxes": C, "scores": D}]


@dataclass
class Record:
    mask: Any
    label: Any


@pytest.mark.parametrize(
    ("output", "target", "keys", "expected"),
    [
        (A, B, {}, (A, B)),
        ((A, C), B, {}, (A, B)),
        ([A, C], (B, D), {}, (A, B)),
        ([(A, C), D], B, {}, (A, B)),
        ({"out": A, "aux": C}, B, {}, (A, B)),
        ({"loss": C, "logits": A}, B, {}, (A, B)),
        ({"pred": A}, {"truth": B}, {}, (A, B)),
        ({"features": C, "mask": A}, {"mask": B, "weight": D}, {}, (A, B)),
        ({"aux": C, "out": A}, {"out": B, "aux": D}, {}, (A, B)),
        ({"features": C, "mask": (A, D)}, {"weight": D, "mask": B}, {}, (A, B)),
        (A, {"weight": D, "label": B}, {}, (A, B)),
        (Heads(A, C), B, {}, (A, B)),
        (Heads(C, A), {"label": B, "weight": D}, {}, (A, B)),
        (Heads(A, C), {"target": B, "weight": D}, {}, (A, B)),
        ({"mask": C, "label": A}, {"label": B, "mask": D}, {"output_key": "label"}, (A, B)),
        ({"mask": C, "label": A}, {"label": B, "mask": D}, {"target_key": "label"}, (A, B)),
        ({"mask": C, "label": A}, {"truth": B, "mask": D}, {"output_key": "label", "target_key": "truth"}, (A, B)),
        ({"mask": C, "label": A}, B, {"output_key": "label"}, (A, B)),
        ({"mask": C, "label": (A, D)}, B, {"output_key": "label"}, (A, B)),
        ((C, A), (D, B), {"output_key": 1, "target_key": 1}, (A, B)),
        (Heads(C, A), (D, B), {"output_key": "label", "target_key": -1}, (A, B)),
        (Record(C, A), B, {"output_key": "label"}, (A, B)),
        ({"mask": A, "label": C}, {"label": D, "mask": B}, {"output_key": ["mask", "label"]},
         ({"mask": A, "label": C}, {"mask": B, "label": D})),
        (SAMPLES, SAMPLES, {}, (SAMPLES, SAMPLES)),
        (SAMPLES, tuple(SAMPLES), {}, (SAMPLES, tuple(SAMPLES))),
        ({"found": SAMPLES}, SAMPLES, {}, (SAMPLES, SAMPLES)),
        (["a text", "another"], [["one", "two"], ["three"]], {}, (["a text", "another"], [["one", "two"], ["three"]])),
        ([0.5, 0.25], [1, 0], {}, ([0.5, 0.25], [1, 0])),
        ([A, C[:2]], [B[:3], D], {"samples": 2}, ([A, C[:2]], [B[:3], D])),
        ([A, A.sum()], B, {"samples": 2}, ([A, A.sum()], B)),
        ([A, C], B, {"samples": 4}, (A, B)),  # deep supervision
        ([A[:2], C[:2]], B, {"samples": 2}, (A[:2], B)),
        ([A[:2], C[:2]], [B[:2], D[:2]], {"samples": 2}, ([A[:2], C[:2]], [B[:2], D[:2]])),  # one for each sample
        ((A, C[:2]), (B[:3], D), {"samples": 2}, ((A, C[:2]), (B[:3], D))),  # of torchvision's tuple(zip(*batch))
        ((C[:2], A[:2]), (D[:2], B[:2]), {"samples": 2}, (C[:2], D[:2])),  # as models return them
        ((C, A), (D, B), {"output_key": 1}, (A, B)),
        ((C, A), (D, B), {"target_key": 1}, (A, B)),
        (Heads(C, A), Heads(D, B), {"output_key": "label"}, (A, B)),
        (Record(C, A), Heads(D, B), {"output_key": "label"}, (A, B)),
        ({"mask": C, "label": A}, Heads(D, B), {"target_key": "label"}, (A, B)),
    ],
)  # fmt: skip
def test_what_belongs_together(output: Any, target: Any, keys: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert same(main_pair(output, target, **keys), expected)


def same(found: Any, expected: Any) -> bool:
    """Equal in structure, and of equal tensors."""
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_what_is_predicted() -> None:
    for output, key in (
        (A, None), ((A, B), None), ([(A, C), B], None), ({"aux": B, "out": (A, C)}, None), ({"only": A}, None),
        ({"mask": B, "label": A}, "label"), ((B, A), 1), ((B, {"out": A, "aux": C}), 1), (Heads(B, A), "label"),
    ):  # fmt: skip
        assert same(output_of(output, key), A)
    with pytest.raises(ValueError, match="the output has the keys 'mask', 'label', and none of them is the main one"):
        output_of({"mask": A, "label": B}, None)
    with pytest.raises(ValueError, match="output_key: the output has no 'x'; possible: 'mask'"):
        output_of({"mask": A}, "x")


@pytest.mark.parametrize(
    ("output", "target", "keys", "message"),
    [
        ({"mask": A, "label": B}, {"label": C, "mask": D}, {}, "have several keys in common .'mask', 'label'.; name"),
        ({"features": A, "pred": B}, C, {}, "the output has the keys 'features', 'pred', and none of them is the main"),
        (A, {"label": C, "mask": D}, {}, "the target has the keys 'label', 'mask', and none"),
        ({"mask": A}, B, {"output_key": "msk"}, "output_key: the output has no 'msk'; possible: 'mask'"),
        ((A, B), C, {"output_key": 2}, "the output has no 2; it is a tuple of 2: 0, 1"),
        (Heads(A, B), (C, D), {"output_key": "label"}, "target_key: missing: .* 'label', and it is a tuple"),
        (A, B, {"target_key": "label"}, "target_key: the target has no 'label'; it is one Tensor, without keys"),
        (Heads(A, B), C, {"output_key": "x"}, "the output has no 'x'; it is a Heads of 2: 'mask', 'label'"),
    ],
)  # fmt: skip
def test_what_keys_do_not_decide_is_refused_with_the_keys_there_are(
    output: Any, target: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main_pair(output, target, **keys)
