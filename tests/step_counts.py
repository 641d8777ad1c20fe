"""Counts what one training step calls, by dtrain and by hand: no clock, so the same on any machine.

`python step_counts.py KIND` prints it as JSON, of this rank where a launcher's variables say that there are several.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import dtrain

CALLS, OPERATORS = 4, 5  # the steps that are counted; before them, all is made that is made once
OWN = str(Path(dtrain.__file__).parent) + os.sep
# Of dtrain's config, and of the loop beside it.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"loaders.num_workers": 1},
    "clipping": {"trainer.clip_grad_norm": 1.0},
    "accumulation": {"trainer.accumulate": 2},
    "averaged": {"trainer.ema_decay": 0.9},
}


class Items(Dataset[Any]):
    """A dataset class as users write it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.labels = torch.randn(320, 8, generator=generator), torch.arange(320) % 4

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.labels[index]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Counting(TorchDispatchMode):
    """Counts the functions of one step and the operators of the next: dispatching these calls functions, too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.own, self.operators = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def _note(self, frame: Any, event: str, _: Any) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if event != "call" or path == __file__:
            return
        self.calls[f"{Path(path).stem}: {name}"] += 1
        if path.startswith(OWN):
            self.own[f"{path.removeprefix(OWN)}: {name}"] += 1

    def between(self, step: int) -> None:
        """Called after each step."""
        sys.setprofile(self._note if step == CALLS - 1 else None)
        if step == OPERATORS - 1:
            self.__enter__()
        elif step == OPERATORS:
            self.__exit__(None, None, None)

    def result(self) -> dict[str, Any]:
        return {"calls": self.calls, "own": self.own, "operators": self.operators}


def by_dtrain(kind: str, folder: str) -> dict[str, Any]:
    """What a step of dtrain's calls."""
    config = {
        "loaders": {"batch_size": 8, "num_workers": 0},
        "trainer": {"max_steps": OPERATORS + 1, "log_every_steps": 100, "checkpoint_dir": folder},
        "device": "cpu",
        "mlflow": {"tracking_uri": None},
        "optimizer": {"name": "SGD", "lr": 0.1},
    }
    for key, value in KINDS[kind].items():
        section, _, name = key.partition(".")
        config[section][name] = value
    trainer = dtrain.create_trainer(config, model=model(), datasets={"train": Items()}, loss=nn.CrossEntropyLoss())
    counting, after_step = Counting(), trainer.after_step

    def after(position: int) -> None:
        after_step(position)
        trainer.vote._steps_left = 10  # ranks vote a few times a second, and not in the steps that are counted
        counting.between(trainer.step)

    trainer.after_step = after  # type: ignore[method-assign]
    trainer.fit()
    return counting.result()


def by_hand(kind: str) -> dict[str, Any]:
    """What a step of the loop that one writes by hand calls, as far as it does the same."""
    ranks, every = int(os.environ.get("WORLD_SIZE", 1)), 2 if kind == "accumulation" else 1
    dataset, net, criterion = Items(), model(), nn.CrossEntropyLoss()
    sampler = DistributedSampler(dataset) if ranks > 1 else None
    workers = 1 if kind == "workers" else 0
    loader = DataLoader(dataset, batch_size=8, shuffle=sampler is None, sampler=sampler, num_workers=workers)
    wrapped = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    counting, loss_sum = Counting(), torch.zeros(())
    for step, batches in enumerate(_grouped(loader, every), 1):
        optimizer.zero_grad()
        for number, (inputs, labels) in enumerate(batches, 1):
            with nullcontext() if number == every or ranks == 1 else wrapped.no_sync():  # type: ignore[operator]
                loss = criterion(wrapped(inputs), labels)
                (loss / every if every > 1 else loss).backward()
            loss_sum += loss.detach()
        if kind == "clipping":
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if kind == "averaged":
            averaged.update_parameters(net)
        counting.between(step)
        if step > OPERATORS:
            break
    return counting.result()


def _grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while group := [batch for _, batch in zip(range(size), iterator, strict=False)]:
        yield group


if __name__ == "__main__":
    both = {"dtrain": by_dtrain(sys.argv[1], sys.argv[2])}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    both["hand"] = by_hand(sys.argv[1])
    Path(sys.argv[2], f"counts-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(both))
