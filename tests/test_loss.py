"""Losses of every form: torch's own, a user's class or function, one number or a dict of terms."""

import dataclasses
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.loss import Criterion, ModelLoss, get_loss_criterion

# What a user's module holds. `modules: [test_loss]` finds it here.


class Terms(nn.Module):
    """A dict of terms."""

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(output, target), "size": output.square().mean()}


class AllOutputs:
    """A plain object that looks at all of a model's outputs."""

    def __call__(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + F.cross_entropy(output[1], target)


class Weighted:
    """A plain object with a tensor of its own."""

    def __init__(self, weight: list[float]) -> None:
        self.weight = torch.tensor(weight)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, weight=self.weight)


def scaled(output: Tensor, target: Tensor, factor: float = 1.0, weight: Tensor | None = None) -> Tensor:
    return factor * F.cross_entropy(output, target, weight=weight)


def nothing(output: Tensor, target: Tensor) -> float:
    return 1.0


def empty(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {}


def half_a_dict(output: Tensor, target: Tensor) -> dict[str, Any]:
    return {"ce": F.cross_entropy(output, target), "rows": F.cross_entropy(output, target, reduction="none")}


def criterion(**loss: Any) -> Criterion:
    sections = {"model": {"name": "Identity"}, "optimizer": {"name": "SGD", "lr": 0.1}, "trainer": {"max_epochs": 1}}
    loaders = {"name": "TensorDataset", "train": {}}
    return get_loss_criterion(from_mapping({**sections, "loaders": loaders, "modules": ["test_loss"], "loss": loss}))


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2])


def test_torchs_losses_by_name(logits: Tensor, labels: Tensor) -> None:
    value, terms = criterion(name="CrossEntropyLoss", label_smoothing=0.1)(logits, labels)
    assert torch.equal(value, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert terms == {}


def test_class_weights_are_a_list_of_numbers(logits: Tensor, labels: Tensor) -> None:
    value, _ = criterion(name="CrossEntropyLoss", weight=[1.0, 2.0, 0.5])(logits, labels)
    assert torch.equal(value, F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0, 0.5])))


def test_a_function_by_name_with_and_without_arguments(logits: Tensor, labels: Tensor) -> None:
    plain = F.cross_entropy(logits, labels)
    assert torch.equal(criterion(name="scaled")(logits, labels)[0], plain)
    assert torch.equal(criterion(name="scaled", factor=3.0)(logits, labels)[0], 3 * plain)
    assert torch.equal(criterion(name="torch.nn.functional:cross_entropy")(logits, labels)[0], plain)


def test_a_dict_of_terms_is_summed_and_handed_on(logits: Tensor, labels: Tensor) -> None:
    value, terms = criterion(name="Terms")(logits, labels)
    assert list(terms) == ["ce", "size"]
    assert torch.equal(value, terms["ce"] + terms["size"])
    value.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda main, other: (main, other),
        lambda main, other: [main, other],
        lambda main, other: {"out": main, "aux": other},
        lambda main, other: {"aux": other, "logits": main},
        lambda main, other: {"only": main},
        lambda main, other: {"out": (main, other)},
    ],
)
def test_torchs_losses_get_the_main_output(wrap: Any, logits: Tensor, labels: Tensor) -> None:
    output = wrap(logits, torch.zeros(6, 3))
    for name in ("CrossEntropyLoss", "torch.nn.functional:cross_entropy"):
        assert torch.equal(criterion(name=name)(output, labels)[0], F.cross_entropy(logits, labels))
        smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1)
        assert torch.equal(criterion(name=name, label_smoothing=0.1)(output, labels)[0], smoothed)


def test_torchs_losses_compare_what_has_the_same_key_or_refuse(logits: Tensor, labels: Tensor) -> None:
    """The order of keys says nothing: an output that comes first may be another head's."""
    loss = criterion(name="CrossEntropyLoss")
    expected = F.cross_entropy(logits, labels)
    value, _ = loss({"mask": logits * 0, "label": logits}, {"label": labels})
    assert torch.equal(value, expected)
    with pytest.raises(
        ValueError, match=r"CrossEntropyLoss compares one output with one target, but .*'mask', 'label'"
    ):
        loss({"mask": logits * 0, "label": logits}, labels)


def test_other_losses_get_all_outputs(logits: Tensor, labels: Tensor) -> None:
    other = torch.zeros(6, 3)
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(other, labels)
    assert torch.equal(criterion(name="AllOutputs")((logits, other), labels)[0], expected)


def test_one_number_in_a_tensor_of_any_shape_will_do() -> None:
    loss = Criterion(lambda output, target: output.sum().reshape(1, 1))
    value, _ = loss(torch.ones(3), None)
    assert value.shape == ()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "CrossEntropyLoss", "reduction": "none"}, r"CrossEntropyLoss returned a tensor of shape \(6,\)"),
        ({"name": "nothing"}, "the loss nothing returned float; expected one number as a tensor"),
        ({"name": "empty"}, "the loss empty returned an empty dict"),
        ({"name": "half_a_dict"}, r"half_a_dict returned a tensor of shape \(6,\) for 'rows'"),
    ],
)
def test_what_is_not_one_number_is_an_error_that_names_the_loss(
    loss: dict[str, Any], message: str, logits: Tensor, labels: Tensor
) -> None:
    with pytest.raises(TypeError, match=message):
        criterion(**loss)(logits, labels)


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 0.5]},
        {"name": "scaled", "weight": [1.0, 2.0, 0.5]},
        {"name": "Weighted", "weight": [1.0, 2.0, 0.5]},
    ],
)
def test_a_losss_own_tensors_move_with_it(loss: dict[str, Any], labels: Tensor) -> None:
    moved = criterion(**loss).to(torch.device("meta"))
    value, _ = moved(torch.empty(6, 3, device="meta"), labels.to("meta"))
    assert value.device.type == "meta"


def test_a_wrong_argument_is_a_mistake_in_the_config() -> None:
    with pytest.raises(ConfigError, match="CrossEntropyLoss got an unexpected argument 'weigth'"):
        criterion(name="CrossEntropyLoss", weigth=[1.0])


@dataclasses.dataclass
class Output:
    loss: Any
    logits: Tensor


ONE, TWO, LOGITS = torch.tensor(1.0), torch.tensor(2.0), torch.zeros(2, 3)
BOXES = [{"boxes": torch.zeros(0, 4)}]


@pytest.mark.parametrize(
    ("result", "loss", "terms", "output"),
    [
        (ONE, 1.0, {}, None),
        ({"loss_box_reg": ONE, "loss_classifier": TWO}, 3.0, {"box_reg": 1.0, "classifier": 2.0}, None),
        ({"loss_a": ONE, "a": TWO}, 3.0, {"loss_a": 1.0, "a": 2.0}, None),  # one name would be two figures
        ({"loss": ONE, "logits": LOGITS, "hidden": None}, 1.0, {}, {"logits": LOGITS}),
        ({"loss": TWO, "loss_ce": ONE, "accuracy": ONE}, 2.0, {"ce": 1.0}, {"accuracy": ONE}),
        ({"loss": {"ce": ONE, "dice": TWO}, "out": LOGITS}, 3.0, {"ce": 1.0, "dice": 2.0}, {"out": LOGITS}),
        (Output(TWO, LOGITS), 2.0, {}, {"logits": LOGITS}),
        (types.SimpleNamespace(loss=torch.ones(1), logits=LOGITS), 1.0, {}, {"logits": LOGITS}),
        ((LOGITS, ONE), 1.0, {}, LOGITS),
        ((ONE, LOGITS, LOGITS), 1.0, {}, [LOGITS, LOGITS]),
        ({"loss": None, "logits": LOGITS}, None, {}, {"logits": LOGITS}),
        (LOGITS, None, {}, LOGITS),
        (BOXES, None, {}, BOXES),
        ((ONE, TWO), None, {}, (ONE, TWO)),  # which of them?
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_loss_that_a_model_returns_is_found(result: Any, loss: Any, terms: Any, output: Any) -> None:
    found = ModelLoss().read(result)
    assert (None if found.loss is None else float(found.loss)) == loss
    assert {name: float(value) for name, value in found.terms.items()} == terms
    if isinstance(output, dict):
        assert list(found.output) == list(output)
        assert all(found.output[name] is value for name, value in output.items())
    elif isinstance(output, Tensor) or output is None or output is result:
        assert found.output is output
    else:
        assert len(found.output) == len(output)


def test_a_loss_of_a_model_that_is_not_one_number_is_told() -> None:
    with pytest.raises(TypeError, match=r"the loss of the model returned a tensor of shape \(2, 3\)"):
        ModelLoss().read({"loss": LOGITS})
