"""Ranks that keep their newest state in memory, killed at random moments, as `warm.py` does it with checkpoints.

A node's memory is a folder here. Of two nodes, each rank has one in a mount namespace of its own, under the same name.
"""

import ctypes
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from warm import ALL_OF_IT, TOGETHER_SECONDS, Ranks, differences, import_all, left_behind
from whole_runs import figures, write_config

from dtrain.config.check import check
from dtrain.config.load import load_config

CHANGES = {
    **ALL_OF_IT, "trainer.pictures": False, "trainer.log_every_steps": 1, "loaders.train.size": 61,
    "trainer.max_epochs": 2, "loaders.num_workers": 0,
}  # fmt: skip
SHARDED = {**CHANGES, "trainer.strategy": "fsdp", "trainer.fsdp.min_parameters": 10, "loss.name": "CrossEntropyLoss"}
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


class Nodes(Ranks):
    """Ranks whose nodes' memory lies in `memory` of their folder; with `nodes`, each rank is one, and sees its own."""

    def __init__(self, folder: Path, name: str, changes: dict[str, Any], nodes: bool = False, ranks: int = 2) -> None:
        self.memory, self.nodes = folder / "memory" / name, nodes
        memory = {"trainer.spare_memory_every_steps": 1, "trainer.spare_memory_dir": str(self.memory)}
        self.memory.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            self.of_node(rank).mkdir(exist_ok=True)
        super().__init__(write_config(folder, name, {**changes, **memory}), ranks)

    def of_node(self, rank: int) -> Path:
        return self.memory.with_name(f"{self.memory.name}-of-{rank}")

    def begin_rank(self) -> None:
        if self.nodes:
            own = self.of_node(int(os.environ["RANK"]))
            enter_namespace()
            _mount(str(own), str(self.memory), MS_BIND)

    @property
    def steps_done(self) -> int:
        return max(figures(self.folder).get("train/loss", {0: 0.0})) if self.has_begun else 0

    @property
    def resumed_from(self) -> int:
        """The step from which the last start resumed."""
        lines = re.findall(r"resumes from: \S+/step-(\d+)", Path(f"{self.config}.log").read_text())
        return int(lines[-1]) if lines else 0


def enter_namespace() -> None:
    """Have mounts of this process's own; OSError where that is not allowed."""
    if _libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", MS_REC | MS_PRIVATE)


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), f"mount {source} {target}")


def _disturbed(whole: Nodes, seconds: float, chance: random.Random, count: int, **options: Any) -> dict[str, Any]:
    """Kill one of two ranks or both, wipe a node's memory where there are two, start again, and compare."""
    failures, lost, from_memory, number = [], [], 0, 0
    changes, folder, nodes = options["changes"], whole.folder.parent, options["nodes"]
    while len(lost) < count:
        number += 1
        name = f"{options['name']}-{number}"
        training = Nodes(folder, name, changes, nodes)
        training.wait(TOGETHER_SECONDS, lambda training=training: training.has_begun)
        time.sleep(chance.uniform(0, seconds))
        victims = [0, 1] if nodes else chance.choice([[0], [1], [0, 1]])
        training.send(signal.SIGKILL, *[rank for rank in training.look() if rank in victims])
        if -signal.SIGKILL in training.end() and training.steps_done:
            done = training.steps_done
            if nodes:  # the machine is gone
                gone = chance.choice([0, 1])
                shutil.rmtree(training.of_node(gone))
            again = Nodes(folder, name, changes, nodes)
            status = again.end()
            lost.append(done - again.resumed_from)
            from_memory += "which was kept in memory" in Path(f"{again.config}.log").read_text()
            where = f"{number}: {victims} at step {done}, resumed from {again.resumed_from}"
            failures += [] if status == [0, 0] else [f"{where}: ended with {status}: {again.log}"]
            failures += [f"{where}: {found} differ" for found in [differences(again.folder, whole.folder)] if found]
            left = [str(path) for path in training.memory.parent.glob(f"{name}*/*")]
            failures += [f"{where}: left in memory: {left}"] if left else []
        shutil.rmtree(training.folder, ignore_errors=True)
    failures += [] if max(lost) <= 1 else [f"lost {max(lost)} steps: {lost}"]
    return {"kills": count, "lost": lost, "from_memory": from_memory, "failures": failures, "left": left_behind(10)}


def _whole(folder: Path, name: str, changes: dict[str, Any]) -> tuple[Ranks, float]:
    """A training that keeps nothing in memory and is not disturbed, and how long it took after its start."""
    training = Ranks(write_config(folder, name, changes), 2)
    assert training.wait(TOGETHER_SECONDS, lambda: training.has_begun), training.log
    begun = time.monotonic()
    assert training.end() == [0, 0], training.log
    return training, time.monotonic() - begun


def rank_kills(folder: Path, chance: random.Random, count: int) -> dict[str, Any]:
    whole, seconds = _whole(folder, "whole", CHANGES)
    return _disturbed(whole, seconds, chance, count, name="kill", changes=CHANGES, nodes=False)


def node_losses(folder: Path, chance: random.Random, count: int) -> dict[str, Any]:
    whole, seconds = _whole(folder, "whole-nodes", CHANGES)
    return _disturbed(whole, seconds, chance, count, name="node", changes=CHANGES, nodes=True)


def shard_losses(folder: Path, chance: random.Random, count: int) -> dict[str, Any]:
    whole, seconds = _whole(folder, "whole-shards", SHARDED)
    return _disturbed(whole, seconds, chance, count, name="shard", changes=SHARDED, nodes=True)


if __name__ == "__main__":
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    import_all()
    folder, seed, *wishes = sys.argv[1:]
    check(load_config(write_config(Path(folder), "first", CHANGES)))
    gc.collect()
    gc.freeze()
    roles = [(role, int(count)) for role, count in map(str.split, wishes)]
    print(json.dumps({role: globals()[role](Path(folder), random.Random(int(seed)), count) for role, count in roles}))
