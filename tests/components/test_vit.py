"""The ViT component: vit-pytorch's arguments and weights, and messages that help."""

import inspect

import pytest
import torch

from dtrain.components.models.vit import ViT

SMALL = dict(image_size=8, patch_size=2, num_classes=10, channels=1, dim=64, depth=2, heads=4, dim_head=16, mlp_dim=128)
OBLONG = dict(image_size=(12, 20), patch_size=(3, 5), num_classes=4, dim=24, depth=1, heads=2, mlp_dim=32)


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (SMALL, 68_946),
        (dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128), 179_658),
    ],
)
def test_parameter_counts_are_the_published_ones(arguments, parameters):
    assert sum(parameter.numel() for parameter in ViT(**arguments).parameters()) == parameters


def test_takes_exactly_vit_pytorchs_arguments(published_vit):
    ours, theirs = (inspect.signature(model).parameters for model in (ViT, published_vit))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize(
    "arguments",
    [
        SMALL,
        SMALL | dict(pool="mean"),
        SMALL | dict(num_classes=0),
        SMALL | dict(heads=1, dim_head=64),  # no output projection in this case
        SMALL | dict(dropout=0.1, emb_dropout=0.1),
        OBLONG,
    ],
    ids=["cls", "mean", "tokens", "one-head", "dropout", "oblong"],
)
def test_weights_and_outputs_equal_vit_pytorchs(published_vit, arguments):
    torch.manual_seed(1)
    theirs = published_vit(**arguments).eval()
    torch.manual_seed(1)
    ours = ViT(**arguments).eval()
    weights = theirs.state_dict()
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())  # same random numbers

    torch.manual_seed(2)
    theirs.load_state_dict({name: torch.randn_like(value) for name, value in weights.items()})
    ours.load_state_dict(theirs.state_dict())
    height, width = (
        (arguments["image_size"],) * 2 if isinstance(arguments["image_size"], int) else arguments["image_size"]
    )
    image = torch.randn(3, arguments.get("channels", 3), height, width, requires_grad=True)
    expected, found = theirs(image), ours(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    slope = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, image, slope)[0],
        torch.autograd.grad(expected, image, slope)[0],
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_smaller_image_uses_the_first_positions_as_vit_pytorch_does(published_vit):
    torch.manual_seed(1)
    theirs, ours = published_vit(**SMALL).eval(), ViT(**SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 1, 4, 6)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_lists_as_yaml_writes_them_are_sizes():
    model = ViT(**(OBLONG | dict(image_size=[12, 20], patch_size=[3, 5])))
    assert model(torch.zeros(2, 3, 12, 20)).shape == (2, 4)


def test_dropout_acts_in_training_only():
    model = ViT(**(SMALL | dict(dropout=0.5)))
    image = torch.randn(4, 1, 8, 8)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_parameter_gets_a_gradient(pool):
    model = ViT(**(SMALL | dict(pool=pool)))
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []  # DistributedDataParallel would wait for them


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(patch_size=3), ["height of 8 pixels", "patches of 3", "2 left over", "1, 2, 4, 8"]),
        (dict(image_size=[8, 9]), ["width of 9 pixels", "patches of 2", "1, 3, 9"]),
        (dict(image_size=[8, 8, 8]), ["image_size is [8, 8, 8]", "[height, width]"]),
        (dict(patch_size=0), ["patch_size is 0", "positive"]),
        (dict(patch_size=2.5), ["patch_size is 2.5", "whole"]),
        (dict(image_size="8"), ["image_size is '8'"]),
        (dict(pool="max"), ["'max'", "'cls'", "'mean'"]),
    ],
)
def test_a_wrong_size_says_what_is_possible(changes, parts):
    with pytest.raises(ValueError) as error:
        ViT(**(SMALL | changes))
    assert [part for part in parts if part not in str(error.value)] == []


def test_an_image_that_does_not_fit_is_refused():
    model = ViT(**SMALL)
    with pytest.raises(ValueError, match="width of 7 pixels"):
        model(torch.zeros(1, 1, 8, 7))
    with pytest.raises(ValueError, match="more patches"):
        model(torch.zeros(1, 1, 8, 10))
