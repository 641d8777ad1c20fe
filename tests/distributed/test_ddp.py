"""The ranks' wrapper: where gradients live, and that its forward is torch's, also where no profiler is told of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from whole_runs import said_by_ranks

SCRIPT = """
import json, sys
import torch
from dtrain.distributed.process_group import set_up

folder, options = sys.argv[1], json.loads(sys.argv[2])
may_keep = options.pop("may_keep", False)
ranks = set_up("cpu", options)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
wrapped = ranks.strategy.wrap(model)
if may_keep:
    wrapped = ranks.strategy.with_gradients_apart(wrapped, model)
generator = torch.Generator().manual_seed(1)
batches = torch.randn(3, 3, 2, 5, 3, generator=generator)  # step, batch of it, rank, sample, channel
found = {"apart": [], "close": []}
kept, values = [], []
for step in batches:
    expected = [0 for _ in model.parameters()]
    for number, batch in enumerate(step):  # by hand: each rank's share of the mean, one after the other
        for share in batch:
            gradients = torch.autograd.grad(model(share).square().mean() / 2, [*model.parameters()])
            expected = [one + other for one, other in zip(expected, gradients)]
        if number < len(step) - 1:
            with ranks.strategy.no_sync(wrapped):
                wrapped(batch[ranks.rank]).square().mean().backward()
        else:
            wrapped(batch[ranks.rank]).square().mean().backward()
    got = [item.grad for item in model.parameters()]
    found["apart"].append(len({item.untyped_storage().data_ptr() for item in got}))
    found["close"].append(all(torch.allclose(one, other) for one, other in zip(got, expected)))
    kept += got
    values += [item.clone() for item in got]
    for item in model.parameters():
        item.grad = None
found["kept"] = all(map(torch.equal, kept, values))

inputs, entered = torch.ones(1, 3), []
label = torch.autograd.profiler.record_function
enter = label.__enter__
label.__enter__ = lambda self: (entered.append(self.name), enter(self))[1]
outputs = [wrapped(inputs).tolist()]
found["labels without a profiler"] = list(entered)
with torch.profiler.profile() as profile:
    outputs.append(wrapped(inputs).tolist())
found["labels"] = entered
found["seen"] = [event.name for event in profile.events() if event.name.startswith("Distributed")]
found["same"] = outputs == [model(inputs).tolist()] * 2
open(f"{folder}/{ranks.rank}.json", "w").write(json.dumps(found))
ranks.mailbox.post("done", True)
ranks.mailbox.notes("done", 200)
"""


def seen(folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two ranks has found with these options of `trainer.ddp`."""
    return said_by_ranks(2, SCRIPT, folder, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "storages"),
    [
        ({}, 1),
        ({"gradient_as_bucket_view": False}, 4),
        ({"may_keep": True}, 4),
    ],
)
def test_gradients_are_the_mean_over_the_ranks_and_live_in_the_bucket_unless_told_otherwise(
    tmp_path: Path, options: dict[str, Any], storages: int
) -> None:
    for found in seen(tmp_path, options):
        assert found["close"] == [True] * 3
        assert found["apart"] == [storages] * 3
        assert found["kept"] == (storages > 1), "whether what was kept of a step outlives the next one"
        assert found["labels without a profiler"] == []
        assert found["labels"] == found["seen"] == ["DistributedDataParallel.forward"]
        assert found["same"]


AGAIN = """
import json, sys
import torch
from dtrain.distributed.process_group import set_up

folder, options = sys.argv[1], json.loads(sys.argv[2])
ranks = set_up("cpu", options)
torch.manual_seed(0)
sizes = [8, 24, 24, 24, 3]
model = torch.nn.Sequential(*[torch.nn.Linear(*each) for each in zip(sizes, sizes[1:])])
wrapped = ranks.strategy.wrap(model)
batch = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))[ranks.rank]
found = []
for _ in range(3):  # nothing is changed between them
    model.zero_grad()
    wrapped(batch).square().mean().backward()
    found.append([item.grad.flatten().tolist() for item in model.parameters()])
open(f"{folder}/{ranks.rank}.json", "w").write(json.dumps([each == found[0] for each in found]))
ranks.mailbox.post("done", True)
ranks.mailbox.notes("done", 200)
"""


def test_the_first_step_of_a_start_sums_gradients_in_the_order_of_all_others(tmp_path: Path) -> None:
    """Bit for bit: else a training on three ranks or more that was interrupted would differ from one that was not."""
    assert said_by_ranks(3, AGAIN, tmp_path, {}) == [[True] * 3] * 3


def test_the_wrappers_forward_is_still_made_of_the_parts_that_are_called_here() -> None:
    code = DistributedDataParallel.forward.__code__
    private = {name for name in code.co_names if name.startswith("_")}
    # Without delay_all_reduce_named_params, which dtrain has not, nothing depends on the last one.
    assert private == {"_pre_forward", "_run_ddp_forward", "_post_forward", "_delay_all_reduce_all_params"}, (
        f"torch {torch.__version__}"
    )
