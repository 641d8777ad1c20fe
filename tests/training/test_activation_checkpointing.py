"""trainer.activation_checkpointing: activations are computed again, and nothing else is another than without."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import EXACT, Place, figures, last, same_training

from dtrain.training.activation_checkpointing import checkpoint_activations


class Block(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))  # its vectors move in each forward
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            Block.calls += 1
        return x + self.drop(self.norm(self.layer(x)).tanh())


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BLOCKS = "\n\n".join(["import torch\nfrom torch import nn\n", *map(inspect.getsource, (Block, Deep))])


def after_steps(model: nn.Module) -> dict[str, Any]:
    """Losses, gradients, weights and buffers of three steps, the second without a step of the optimizer between."""
    torch.manual_seed(3)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), {}
    for number in range(3):
        loss = model(torch.randn(5, 8)).square().sum()
        loss.backward()
        found |= {f"{number} {name}": item.grad.clone() for name, item in model.named_parameters()}
        if number != 1:
            optimizer.step()
            optimizer.zero_grad()
        found[f"{number} loss"] = loss.detach()
    return found | model.state_dict()


def test_the_same_bit_for_bit_with_every_forward_done_twice() -> None:
    torch.manual_seed(0)
    plain = Deep()
    again = copy.deepcopy(plain)
    assert checkpoint_activations(again, True) == ["blocks.0", "blocks.1", "blocks.2"]
    copied = copy.deepcopy(again)
    counts, found = [], []
    for model in (plain, again, copied):
        Block.calls = 0
        found.append(after_steps(model))
        counts.append(Block.calls)
    assert counts == [9, 18, 18]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert [key for key in other if not torch.equal(found[0][key], other[key])] == []
    assert again.blocks[0].norm.num_batches_tracked == 3
    Block.calls = 0
    with torch.no_grad():
        again.eval()(torch.ones(2, 8))
    assert Block.calls == 3


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        (["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks"], ["blocks.0", "blocks.1", "blocks.2"]),  # a list is not called: its elements are
        ("Block", ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.1", "*.norm"], ["blocks.0.norm", "blocks.1", "blocks.2.norm"]),
        (["head"], ["head"]),
        (False, []),
    ],
)
def test_the_outermost_modules_that_match_and_are_called(wish: Any, names: list[str]) -> None:
    assert checkpoint_activations(Deep(), wish) == names


def test_a_pattern_for_nothing_is_a_mistake_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="'Bloc' matches the name or class of no module; did you mean 'Block'"):
        checkpoint_activations(Deep(), ["head", "Bloc"])
    with pytest.raises(ValueError, match="no element of a ModuleList or Sequential has parts of its own"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)), True)


@pytest.mark.slow
def test_a_compiled_model_recomputes_by_itself() -> None:
    torch.manual_seed(0)
    plain = Deep()
    again = copy.deepcopy(plain)
    checkpoint_activations(again, ["blocks.*"])
    one, other = (after_steps(torch.compile(model, backend="aot_eager")) for model in (plain, again))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6, msg=key)


SETTINGS: dict[str, Any] = {
    **EXACT, "modules": ["toy", "blocks"], "model": {"name": "Deep"}, "loaders.num_workers": 0, "trainer.max_epochs": 2,
    "trainer.pictures": False, "loaders.train.size": 32, "trainer.log_every_steps": 1,
    "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step", "T_max": 20}, "loaders.val": None,
    "loaders.test": None, "trainer.early_stop_patience": None,
}  # fmt: skip
AGAIN = SETTINGS | {"trainer.activation_checkpointing": ["Block"]}
SHARDED = {"trainer.strategy": "fsdp", "trainer.fsdp": {"layers": ["Block"]}}


@pytest.fixture(scope="module")
def blocks(place: Place) -> Place:
    place.write("blocks.py", BLOCKS)
    return place


def trained(place: Place, name: str, settings: dict[str, Any], *overrides: str) -> Path:
    done = place.run(place.config(name, **settings), *overrides, ranks=2)
    assert ("computed again" in done.stdout) is ("trainer.activation_checkpointing" in settings), done.text
    return place.path(name)


@pytest.mark.slow
def test_two_ranks_train_and_resume_to_the_same_bits_as_without(blocks: Place) -> None:
    plain = trained(blocks, "kept-activations", SETTINGS)
    trained(blocks, "activations-again", AGAIN, "trainer.max_steps=3")  # in the middle of an epoch
    again = trained(blocks, "activations-again", AGAIN)
    same_training(plain, again)
    assert not [name for name in last(again).weights if "checkpoint" in name]
    losses = figures(again)["train/loss"]
    assert losses == figures(plain)["train/loss"]
    assert len(losses) == 8


@pytest.mark.slow
def test_sharded_ranks_get_the_same_bits_as_without(blocks: Place) -> None:
    plain = trained(blocks, "kept-activations-fsdp", SETTINGS | SHARDED)
    again = trained(blocks, "activations-again-fsdp", AGAIN | SHARDED)
    same_training(plain, again)
