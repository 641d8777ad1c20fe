"""What a user might write beside a config: seeded data, small models, a loss of terms, a metric. Knows no dtrain.

For the tests, TOY_DO makes the model do something at a certain call: "train 5 rank 1 TERM" sends SIGTERM to rank 1's
process in its fifth training forward, "eval 1 rank 0 KILL" kills rank 0 in its first evaluation forward, "raise"
raises, "exit" leaves with 3 and "vanish" with 0 and no word, "nan" spoils the output, "sleep" never returns, "lag"
takes 0.2 s or TOY_LAG, "wait" takes as long as the file TOY_HOLD is there; "train all" means each call. TOY_LOAD does
the same where a sample is loaded, "sample 3 rank 0 sleep" or "sample all", at each time. TOY_SEEN names a folder where
each process notes the samples that it loads.
"""

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points of three classes; in training with noise, drawn for each sample anew."""

    def __init__(self, size: int, seed: int = 0, noise: float = 0.0, form: str = "pair") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 8, generator=generator)
        self.y = (self.x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
        self.noise, self.form = noise, form
        self.random = noise > 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> object:
        note_seen(index)
        trouble_at(index)
        x, y = self.x[index] + self.noise * torch.randn(8) if self.noise else self.x[index], self.y[index]
        if self.form == "several":
            return x[:4], x[4:], y
        if self.form == "dict":
            return {"left": x[:4], "right": x[4:], "label": y, "id": f"point {index}"}
        if self.form == "keys":
            return {"image": x, "answer": y}
        return x, y


def note_seen(index: int) -> None:
    if "TOY_SEEN" in os.environ:
        with (Path(os.environ["TOY_SEEN"]) / str(os.getpid())).open("a") as file:
            file.write(f"{index}\n")


def trouble_at(index: int) -> None:
    _, number, _, rank, action = (os.environ.get("TOY_LOAD") or "sample -1 rank 0 nothing").split()
    if number in ("all", str(index)) and os.environ.get("RANK", "0") == rank:
        act(action)


def act(action: str) -> None:
    if action == "raise":
        raise RuntimeError("the toy is broken")
    if action == "exit":
        sys.exit(3)
    if action == "vanish":
        os._exit(0)
    if action == "lag":
        time.sleep(float(os.environ.get("TOY_LAG", "0.2")))
        return
    if action == "wait":
        while Path(os.environ["TOY_HOLD"]).exists():
            time.sleep(0.05)
        return
    if action == "sleep":
        print("asleep", flush=True)
        while True:
            time.sleep(0.1)
    if action == "KILL":
        print("last words " + "z" * 6000, flush=True)
    os.kill(os.getpid(), signal.Signals[f"SIG{action}"])


class Trouble(nn.Module):
    """Passes on what it gets, and does what TOY_DO asks for, once."""

    def __init__(self) -> None:
        super().__init__()
        phase, number, _, rank, self.action = (os.environ.get("TOY_DO") or "never 0 rank 0 nothing").split()
        self.due = (phase, number) if os.environ.get("RANK", "0") == rank else None
        self.calls: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        phase = "train" if self.training else "eval"
        self.calls[phase] += 1
        if self.due not in ((phase, str(self.calls[phase])), (phase, "all")):
            return x
        if self.action == "nan":
            return x * float("nan")
        act(self.action)
        return x


class Centre(nn.Module):
    """Takes off a running mean, a buffer that training changes and uses; unlike BatchNorm it can do with one sample."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().float().mean(0), 0.1)
        return x - self.mean.clone()


class MLP(nn.Module):
    """8 numbers to 3 classes. `gives` is the form of its output."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, gives: str = "tensor") -> None:
        super().__init__()
        middle = Centre(16) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(8, 16), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.trouble, self.gives = Trouble(), gives

    def forward(self, x: Tensor) -> object:
        logits = self.layers(self.trouble(x))
        return {"tensor": logits, "tuple": (logits, x), "dict": {"out": logits, "aux": x}}[self.gives]


class TwoInputs(MLP):
    """The same of two halves."""

    def forward(self, left: Tensor, right: Tensor, id: object = None) -> object:
        return super().forward(torch.cat([left, right], 1))


class Terms(nn.Module):
    """Cross entropy and the logits' size, as two terms."""

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(output, target), "size": 0.01 * output.square().mean()}


class Right:
    """The share of right answers, without any library."""

    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right, self.all = 0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.right += int((output.argmax(1) == target).sum())
        self.all += len(target)

    def compute(self) -> float:
        return self.right / self.all
