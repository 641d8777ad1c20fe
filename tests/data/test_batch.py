"""What is input, target and main output in batches and outputs of every form."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dtrain.config.errors import ConfigError
from dtrain.data.batch import (
    KEPT,
    call,
    call_form,
    inputs,
    main_output,
    parts_of_whole,
    split,
    to_device,
    whole,
    whole_form,
)

Pair = namedtuple("Pair", "image label")
Counted = namedtuple("Counted", "image label kept_samples")
PACKED = pack_sequence([torch.ones(2), torch.ones(1)])
X, Y, Z = torch.zeros(4, 2), torch.ones(4), torch.full((4,), 2.0)


def same(found: Any, expected: Any) -> bool:
    """Equal in structure, and of the same tensor objects."""
    if isinstance(expected, Tensor | PackedSequence):
        return found is expected
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return type(found) is type(expected) and all(map(same, found, expected))


@pytest.mark.parametrize(
    ("batch", "given", "target"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        (Pair(X, Y), X, Y),
        (Counted(X, Y, 3), X, Y),
        ({"left": X, "right": Z, "label": Y, "kept_samples": 3}, {"left": X, "right": Z}, Y),
        ([X, Z, Y], (X, Z), Y),
        ({"image": X, "label": Y}, X, Y),
        ({"input": X, "target": Y}, X, Y),
        ({"x": X, "y": Y, "id": Z}, X, Y),
        ({"left": X, "right": Z, "label": Y}, {"left": X, "right": Z}, Y),
        ([{"left": X}, Y], {"left": X}, Y),
        ([PACKED, Y], PACKED, Y),
        ((X, {"mask": Y}), X, {"mask": Y}),
    ],
)
def test_a_batch_is_split_into_input_and_target(batch: Any, given: Any, target: Any) -> None:
    found = split(batch)
    assert same(found[0], given)
    assert same(found[1], target)


def test_keys_of_a_dict_can_be_named() -> None:
    assert same(split({"ct": X, "dose": Y, "id": Z}, "ct", "dose"), (X, Y))
    assert same(split({"ct": X, "label": Z, "dose": Y}, target_key="dose"), ({"ct": X, "label": Z}, Y))


def test_a_list_of_keys_gives_a_dict_of_targets() -> None:
    found = split({"image": X, "label": Y, "mask": Z}, target_key=["mask", "label"])
    assert same(found, (X, {"mask": Z, "label": Y}))
    assert same(split({"left": X, "label": Y, "mask": Z}, target_key=["mask", "label"])[0], {"left": X})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": X, "label": Y, "mask": Z}, "trainer.target_key: missing: .* 'label' and 'mask' may be meant; name"),
        ({"image": X, "x": Z, "label": Y}, "trainer.input_key: missing: .* 'image' and 'x' may be meant; name one$"),
    ],
)
def test_keys_of_which_several_may_be_meant_are_asked_for(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(batch)


def test_a_prediction_needs_to_know_the_input_alone() -> None:
    assert inputs({"image": X, "label": Y, "mask": Z}) is X
    assert same(inputs({"left": X, "right": Z, "label": Y}), {"left": X, "right": Z})
    assert same(inputs({"ct": X, "dose": Y, "label": Z}, target_key=["dose", "label"]), {"ct": X})
    assert same(inputs({"left": X, "right": Z}), {"left": X, "right": Z})


@pytest.mark.parametrize(
    ("batch", "target_key", "message"),
    [
        (X, None, r"a batch is \(input, target\) or a dict, found one tensor of shape \(4, 2\)"),
        ([X], None, "found a list of 1"),
        ({"image": X, "dose": Y}, None, "no target in a batch with the keys 'image', 'dose': expected target or label"),
        ({"image": X, "label": Y}, "dose", "expected dose; name it with trainer.target_key"),
        (7, None, "found a int"),
    ],
)
def test_a_batch_without_target_says_what_it_has(batch: Any, target_key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(batch, target_key=target_key)


class Takes(nn.Module):
    """Keeps what it was called with."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.forward = forward


@pytest.mark.parametrize(
    ("forward", "given", "expected"),
    [
        (lambda x: x, X, X),
        (lambda x: x, (X, Z), (X, Z)),
        (lambda *x: x[0], PACKED, PACKED),
        (lambda x, y: (y, x), (X, Z), (Z, X)),
        (lambda x, y: (y, x), [X, Z], (Z, X)),
        (lambda x, mask=None: (x, mask), (X, Z), (X, Z)),
        (lambda x, mask=None: (x, mask), X, (X, None)),
        (lambda *images: images, (X, Z), (X, Z)),
        (lambda left, right: (right, left), {"left": X, "right": Z}, (Z, X)),
        (lambda left, **rest: rest, {"left": X, "right": Z}, {"right": Z}),
        (lambda batch: batch, {"left": X, "right": Z}, {"left": X, "right": Z}),
        (lambda batch: batch, {0: X, 1: Z}, {0: X, 1: Z}),
    ],
)
def test_a_model_is_called_as_its_signature_asks(forward: Any, given: Any, expected: Any) -> None:
    model = Takes(forward)
    found = call(model, given, call_form(model, given))
    assert found is expected if expected is None else True
    assert repr(found) == repr(expected)


def test_a_list_of_samples_is_one_argument_however_many_there_are() -> None:
    """As torchvision's detectors are called; two samples are no second argument."""
    detector = Takes(lambda images, targets=None: (images, targets))
    pair = Takes(lambda left, right: (left, right))
    assert call_form(detector, [X, Z], {2, 1}) == "one"
    assert call_form(detector, [X], {2, 1}) == "one"
    assert call_form(detector, [X, Z], {4, 1}) == "several"  # an image and its mask, of four samples
    assert call_form(detector, (X, Z), {2, 1}) == "several"
    assert call_form(pair, [X, Z], {2, 1}) == "several"


@pytest.mark.parametrize(
    ("output", "main"),
    [
        (X, X),
        ((X, Y), X),
        ([X, Y], X),
        ([[X, Y], Z], X),
        ({"out": X, "aux": Y}, X),
        ({"loss": Y, "logits": X}, X),
        ({"first": X, "second": Y}, X),
        ({"out": (X, Y)}, X),
        (Pair(X, Y), X),
    ],
)
def test_the_main_one_of_several_outputs(output: Any, main: Tensor) -> None:
    assert main_output(output) is main


def test_all_tensors_of_a_batch_move() -> None:
    batch = {"pair": (X, [Y]), "named": Pair(X, Y), "id": ["a", "b"], "packed": pack_sequence([Y[:2], Y[:1]])}
    moved = to_device(batch, torch.device("meta"))
    assert moved["pair"][0].device.type == moved["pair"][1][0].device.type == "meta"
    assert isinstance(moved["named"], Pair) and moved["named"].label.device.type == "meta"
    assert moved["id"] == ["a", "b"]
    assert isinstance(moved["packed"], PackedSequence) and moved["packed"].data.device.type == "meta"
    assert X.device.type == "cpu"


class Whole(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.forward = forward


@pytest.mark.parametrize(
    ("forward", "batch", "in_training", "otherwise"),
    [
        (lambda images, targets=None: 0, [X, Y], "several", "several"),
        (lambda x, y: 0, (X, Y), "several", "several"),
        (lambda x, mask=None: 0, (X, Y), "several", "several"),
        (lambda x, scale=1.0: 0, (X, Y), "several", None),  # outside training nothing shows whether it is a target
        (lambda x: 0, [X, Y], None, None),
        (lambda x: 0, [X], "several", "several"),
        (lambda x: 0, X, "one", "one"),
        (lambda batch: 0, [X, Y], "one", "one"),
        (lambda batch: 0, {"x": X, "y": Y}, "one", "one"),
        (lambda batch, scale=1.0: 0, [X, Y], "one", "one"),
        (lambda x, y=None: 0, {"x": X, "y": Y}, "named", "named"),
        (lambda **more: 0, {"x": X, "label": Y}, "named", "named"),
        (lambda x: 0, {"x": X, "y": Y}, None, None),
        (lambda data: 0, object(), "one", "one"),
    ],
)
def test_how_a_model_takes_a_whole_batch(forward, batch, in_training, otherwise):
    assert whole_form(Whole(forward), batch, is_training=True) == in_training
    assert whole_form(Whole(forward), batch, is_training=False) == otherwise


def test_input_and_target_of_a_whole_batch_are_told_where_they_are_clear():
    image, label = parts_of_whole({"image": X, "label": Y})
    assert image is X and label is Y
    unclear = {"input_ids": X, "start_positions": Y, "end_positions": Y}
    assert parts_of_whole(unclear) == (unclear, unclear)
    with pytest.raises(ValueError, match="no target in a batch"):
        parts_of_whole(unclear, target_key="ends")
    assert whole({"x": X, KEPT: 2}).keys() == {"x"}
