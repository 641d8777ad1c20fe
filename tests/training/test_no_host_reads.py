"""Between log steps the host reads nothing from the device. The device `meta` stands for a GPU: it has no numbers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import write_config

from dtrain.config.load import load_config
from dtrain.distributed import process_group
from dtrain.trainer import Trainer, create_trainer

FUSED = {"name": "AdamW", "lr": 1e-3, "fused": True}


Here = Callable[..., Path]  # which `here` gives; its folder and its modules are all that is needed


def trained_on_meta(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> Trainer:
    """Five steps with a device of which nothing can be read."""
    settings = {"optimizer": FUSED, "trainer.log_every_steps": 1000, "trainer.max_steps": 5, **changes}
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(process_group, "choose_device", lambda *_: (torch.device("meta"), []))
    trainer = create_trainer(load_config(write_config(Path(), name, settings)))
    trainer.finite_step.begin(trainer.trainables.all, trainer.trainables.loss_objects)
    trainer.train_epoch()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer.clip_grad_norm": 0.1},
        {"trainer.log_grad_norm": True, "trainer.ema_decay": 0.9},
        {"trainer.on_nonfinite": "skip"},
        {"trainer.accumulate": 2, "loaders.batch_size": 2},
    ],
    ids=["plain", "clip", "norm-ema", "skip", "accumulate"],
)
def test_a_step_reads_nothing(here: Here, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    trainer = trained_on_meta(monkeypatch, "unread", **changes)
    assert trainer.step == 5 and trainer.state.sums["loss"].is_meta


def test_a_read_would_be_seen(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        trained_on_meta(monkeypatch, "read", optimizer={"name": "RMSprop", "lr": 1e-3})
