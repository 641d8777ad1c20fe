"""A training that resumes where another way to compute a step is chosen: a CPU's on a GPU, where it is fused."""

from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import Place, last

from dtrain.training.optimizer import in_the_way_of, start_momentum

WAYS = """
import os
import torch

FUSED = os.environ.get("TOY_DEVICE") == "gpu"


class AdamW(torch.optim.AdamW):
    def __init__(self, params, lr=0.02, amsgrad=False):
        super().__init__(params, lr, amsgrad=amsgrad, fused=FUSED)


class Momentum(torch.optim.SGD):
    def __init__(self, params, lr=0.02):
        super().__init__(params, lr, momentum=0.9, nesterov=True, fused=FUSED)
"""


@pytest.mark.parametrize(
    ("optimizer", "before"),
    [({"name": "ways.AdamW", "amsgrad": True}, "cpu"), ({"name": "ways.AdamW"}, "gpu"), ({"name": "Momentum"}, "cpu")],
)
def test_a_training_resumes_with_another_way_to_compute_the_same_step(
    place: Place, optimizer: dict[str, Any], before: str
) -> None:
    """The config says nothing of it. torch has fused kernels for CPUs, too."""
    place.write("ways.py", WAYS)
    name = f"way-{optimizer['name']}-{before}"
    settings = {"modules": ["toy", "ways"], "optimizer": optimizer, "trainer.pictures": False}
    place.run(place.config(name, **settings, **{"trainer.max_epochs": 1}), env={"TOY_DEVICE": before})
    resumed = {}
    for device in ("cpu", "gpu"):
        config = place.config(f"{name}-{device}", **settings)
        place.run(config, f"trainer.resume={place.path(name)}/checkpoints/last", env={"TOY_DEVICE": device})
        resumed[device] = last(place.path(f"{name}-{device}"))
    for key, value in resumed["cpu"].weights.items():
        torch.testing.assert_close(resumed["gpu"].weights[key], value, rtol=1e-5, atol=1e-6)
    found = {device: one.state["optimizer"]["param_groups"][0]["fused"] for device, one in resumed.items()}
    assert found == {"cpu": False, "gpu": True}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "SGD"])
def test_what_a_fused_optimizer_needs_on_its_device_is_there(name: str) -> None:
    """The device `meta` stands for a GPU: an optimizer over it can be made, and loads as one of a GPU does."""
    kind, options = getattr(torch.optim, name), {"momentum": 0.9} if name == "SGD" else {}
    model = nn.Linear(2, 1)
    before = kind(model.parameters(), lr=0.1, **options)
    model(torch.ones(1, 2)).sum().backward()
    before.step()
    saved = before.state_dict()
    del saved["state"][1]  # a parameter that has not been trained yet
    after = kind(nn.Linear(2, 1, device="meta").parameters(), lr=0.1, fused=True, **options)
    after.load_state_dict(in_the_way_of(after, saved))
    start_momentum(after)
    assert [group["fused"] for group in after.param_groups] == [True]
    states = list(after.state.values())
    assert {value.device.type for state in states for value in state.values()} == {"meta"}
    assert len(states) == (2 if name == "SGD" else 1), "fused momentum begins at zero, not at what lies in memory"


def test_another_number_of_groups_is_left_for_torch_to_refuse() -> None:
    model = nn.Linear(2, 1)
    saved = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}]).state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(in_the_way_of(optimizer, saved))
