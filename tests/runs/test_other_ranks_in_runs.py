"""A training whose number of ranks changes on the way: each optimizer step is that of an undisturbed training."""

import json
from typing import Any

from whole_runs import Place, close, figures

# No dropout and no running statistics, which differ with the number of ranks; the loss is a mean over samples.
HELD: dict[str, Any] = {
    "loss.name": "Terms", "loaders.batch_size": 2, "loaders.train": {"size": 53, "noise": 0.1},
    "optimizer": {"name": "AdamW", "lr": 0.02}, "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step"},
    "trainer.max_epochs": 2, "trainer.ema_decay": 0.8, "trainer.clip_grad_norm": 1.0, "trainer.log_every_steps": 1,
}  # fmt: skip


def test_a_training_that_is_started_again_with_other_ranks_takes_the_same_steps(place: Place) -> None:
    place.once("on-4", lambda: place.run(place.config("on-4", **HELD), ranks=4).rc)
    config = place.config("by-hand", **HELD)
    for ranks, do, expect in ((4, "train 3 rank 0 USR1", 75), (3, "train 5 rank 1 TERM", 75), (1, "", 0)):
        result = place.run(config, ranks=ranks, do=do, expect=expect)
    assert "global batch" in result.stdout and "as on the 4 that it began with" in result.stdout
    close(figures(place.path("by-hand")), figures(place.path("on-4")))
    facts = json.loads((place.path("by-hand") / "run.json").read_text())
    assert (facts["world_size"], facts["batch_ranks"]) == (1, 4)
