"""Weights for a model that is not quite the one they are of: rules for names, and a word on all that is left."""

import pytest
import torch
from torch import nn
from whole_runs import Place

from dtrain.checkpoint.weights import renamed, take_over


def net(classes: int = 3, second: str = "head") -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 5), second: nn.Linear(5, classes)})


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return net().state_dict()


def test_weights_that_fit_are_taken_over_in_silence(weights):
    model = net()
    assert take_over(model, weights) == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_names_are_changed_by_regular_expressions_one_after_another(weights):
    model = net(second="classifier")
    assert take_over(model, weights, {"^head": "top", "^(t)op": "classifier"}) == []
    assert torch.equal(model["classifier"].weight, weights["head.weight"])


def test_what_is_left_out_begins_as_built_and_is_told(weights):
    model = net(classes=7)
    before = model["head"].weight.clone()
    lines = take_over(model, weights, leave_out=["^head[.]"])
    assert lines == ["begins as built: head.weight (7, 5)", "begins as built: head.bias (7,)"]
    assert torch.equal(model["head"].weight, before) and torch.equal(model["body"].weight, weights["body.weight"])


def test_a_part_is_taken_only_where_it_is_asked_for(weights):
    model = net(classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = r"head.weight is [(]3, 5[)] in the file, [(]7, 5[)] in the model"
    with pytest.raises(ValueError, match=shapes):
        take_over(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lines = take_over(model, weights, partial=True)
    assert len(lines) == 2 and torch.equal(model["body"].weight, weights["body.weight"])


def test_nothing_at_all_that_fits_is_an_error_also_for_a_part(weights):
    with pytest.raises(ValueError, match="has nothing that fits"):
        take_over(nn.Conv2d(1, 1, 1), weights, partial=True)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"rename": {"nobody": "x"}}, "matches none of the file's names, such as body.weight"),
        ({"rename": {"(": "x"}}, "is not a regular expression"),
        ({"rename": {"^(body|head)": "one"}}, "would be the name of several weights"),
        ({"leave_out": ["nobody"]}, "matches none of the names"),
    ],
)
def test_a_rule_that_does_nothing_or_too_much_is_told(weights, rules, text):
    with pytest.raises(ValueError, match=text):
        renamed(weights, rules.get("rename", {}), rules.get("leave_out", []))


@pytest.mark.timeout(600)
def test_fine_tuning_from_a_config(place: Place) -> None:
    place.run(place.config("teacher", **{"trainer.max_epochs": 1}))
    wish = {"path": str(place.path("teacher") / "checkpoints" / "last"), "leave_out": ["^layers.4"]}
    text = place.run(place.config("pupil", **{"trainer.pre_trained": wish, "trainer.max_epochs": 1})).text
    assert "begins as built: layers.4.weight (3, 16)" in text
    text = place.run(place.config("teacher-typo", **{"trainer.pre_trained": {**wish, "leaveout": []}}), expect=2).text
    assert "leaveout" in text and "leave_out" in text and "typo.yaml:" in text and "Traceback" not in text
    wrong = {**wish, "rename": {"^layer_": "x"}}
    text = place.run(place.config("wrong", **{"trainer.pre_trained": wrong}), expect=2).text
    assert "matches none of the file's names" in text and "Traceback" not in text
