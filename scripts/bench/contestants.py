"""Who trains in the bench of overhead.py: a file for each, its command line, what it brings itself and what it lacks.

Each is written as its own guides write it; what it lacks is done by hand where that is usual (a bar, MLflow), else left
out, so a row may do less than dtrain's.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 32
VAL_SAMPLES = 320
BARE, FULL, TORCHMETRICS = "bare", "full", "torchmetrics"
FEATURES = ("tracking in MLflow", "bar", "metric", "checkpoint", "check for NaN")
OWN, BY_HAND, NONE = "own", "by hand", "no"


@dataclass(frozen=True)
class Peer:
    """A contestant: a program in this folder, and who does what in it."""

    name: str
    file: str
    needs: tuple[str, ...]  # modules
    has: tuple[str, ...]  # of FEATURES

    def is_here(self) -> bool:
        """Whether all that it needs is installed."""
        return all(importlib.util.find_spec(module) is not None for module in self.needs)


HAND = Peer("by hand", "by_hand.py", ("tqdm",), (BY_HAND, "tqdm", BY_HAND, BY_HAND, "loss, each step"))
DTRAIN = Peer("dtrain", "overhead.yaml", (), (OWN, OWN, OWN, OWN, "loss and gradients of all ranks, each step"))
PEERS = (
    Peer("accelerate", "peers/with_accelerate.py", ("accelerate", "tqdm"), (OWN, "tqdm", BY_HAND, OWN, NONE)),
    Peer(
        "Lightning Fabric",
        "peers/with_fabric.py",
        ("lightning_fabric", "torchmetrics", "tqdm"),
        (BY_HAND, "tqdm", "torchmetrics", OWN, NONE),
    ),
    Peer(
        "Lightning Trainer",
        "peers/with_lightning.py",
        ("pytorch_lightning", "torchmetrics"),
        (OWN, OWN, "torchmetrics", OWN, "not in each step"),
    ),
    Peer("Ignite", "peers/with_ignite.py", ("ignite",), (OWN, OWN, OWN, OWN, "loss, each step")),
    Peer("MMEngine", "peers/with_mmengine.py", ("mmengine", "cv2"), (OWN, "prints lines", BY_HAND, OWN, NONE)),
)


@dataclass(frozen=True)
class Contestant:
    """A peer with some of its features on. dtrain's cannot be turned off."""

    peer: Peer
    features: str

    @property
    def label(self) -> str:
        """What it is called in the tables."""
        if self.features == TORCHMETRICS:
            return f"{self.peer.name} + torchmetrics"
        bare = self.peer is DTRAIN or (self.peer is HAND and self.features == BARE)
        return self.peer.name if bare else f"{self.peer.name}, {self.features}"

    def command(self, ranks: int, steps: int, dataset: str) -> list[str]:
        """Its command line for so many steps."""
        samples = steps * ranks * BATCH_SIZE
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        if self.peer is not DTRAIN:
            words = [str(HERE / self.peer.file), dataset, str(samples), str(VAL_SAMPLES), self.features]
            return launcher + words
        sizes = [f"loaders.name={dataset}", f"loaders.train.samples={samples}", f"loaders.val.samples={VAL_SAMPLES}"]
        if self.features == TORCHMETRICS:
            sizes.append("metrics={name: Accuracy, task: multiclass, num_classes: 10}")
        return [*launcher, "-m", "dtrain", str(HERE / self.peer.file), "device=cpu", *sizes]

    @property
    def tracks(self) -> bool:
        """Whether its run is in MLflow afterwards."""
        return self.peer is DTRAIN or self.features == FULL


def chosen(names: Sequence[str] | None) -> tuple[list[Peer], list[str]]:
    """The peers of these names (None: all) that are installed, and the names of those that are not."""
    wanted = [peer for peer in PEERS if names is None or peer.name in names]
    return [peer for peer in wanted if peer.is_here()], [peer.name for peer in wanted if not peer.is_here()]
