"""trainer.strategy: fsdp: a model sharded over gloo ranks is the same training, with the same files, as by DDP."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import ACCELERATE, EXACT, Place, close, figures, last, write_config

from dtrain.checkpoint.checkpoint_files import load
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.distributed.fsdp import units

# Averages, clipping, accumulation, dropout, a buffer that acts in training; every layer is gathered by itself.
SETTINGS: dict[str, Any] = {
    **EXACT, "loaders.num_workers": 0, "loaders.batch_size": 2, "trainer.max_epochs": 2, "trainer.log_every_steps": 1,
    "trainer.pictures": False, "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step", "T_max": 20},
}  # fmt: skip
SHARED: dict[str, Any] = {**SETTINGS, "trainer.strategy": "fsdp", "trainer.fsdp": {"min_parameters": 10}}


def trained(place: Place, name: str, settings: dict[str, Any], *overrides: str, ranks: int = 2) -> Path:
    """The folder of a training; the same name resumes it."""
    place.run(place.config(name, **settings), *overrides, ranks=ranks)
    return place.path(name)


def by_ddp(place: Place) -> Path:
    return Path(place.once("by-ddp", lambda: str(trained(place, "by-ddp", SETTINGS))))


def by_fsdp(place: Place) -> Path:
    return Path(place.once("by-fsdp", lambda: str(trained(place, "by-fsdp", SHARED))))


def as_whole(run: Path, whole: Path) -> None:
    """Every figure of a training in one go is there, to 1e-5; that in parts validated at its ends as well."""
    found, expected = figures(run), figures(whole)
    close({key: {step: found[key][step] for step in steps} for key, steps in expected.items()}, expected)


def alike(one: Any, other: Any) -> None:
    """The same form, types and shapes, and the same numbers to float rounding."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            alike(one[key], other[key])
    elif isinstance(one, list | tuple):
        for first, second in zip(one, other, strict=True):
            alike(first, second)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
    else:
        assert one == other


@pytest.mark.slow
def test_every_figure_is_that_of_ddp(place: Place) -> None:
    close(figures(by_fsdp(place)), figures(by_ddp(place)))


@pytest.mark.slow
def test_a_checkpoint_is_that_of_ddp(place: Place) -> None:
    ddp, fsdp = last(by_ddp(place)), last(by_fsdp(place))
    alike(ddp.weights, fsdp.weights)
    alike(ddp.ema, fsdp.ema)
    alike(ddp.state, fsdp.state)
    files = [sorted(file.name for file in (run(place) / "checkpoints/last").iterdir()) for run in (by_ddp, by_fsdp)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [("fsdp", "ddp"), *(pytest.param(*each, marks=pytest.mark.soak) for each in (("ddp", "fsdp"), ("fsdp", "fsdp")))],
)
def test_a_training_resumes_with_the_other_strategy(place: Place, first: str, then: str) -> None:
    name = f"{first}-to-{then}"
    settings = {"fsdp": SHARED, "ddp": SETTINGS}
    trained(place, name, settings[first], "trainer.max_steps=3")
    as_whole(trained(place, name, settings[then]), by_ddp(place))


@pytest.mark.slow
def test_a_training_resumes_with_other_numbers_of_ranks(place: Place) -> None:
    still = {"model.dropout": 0.0, "loaders.batch_size": None, "loaders.global_batch_size": 12, "model.norm": False}
    trained(place, "elastic", SHARED | still, "trainer.max_steps=2", ranks=3)
    trained(place, "elastic", SHARED | still, "trainer.max_steps=4", ranks=2)
    alone = trained(place, "alone", SETTINGS | still, ranks=1)
    as_whole(trained(place, "elastic", SHARED | still, ranks=1), alone)


@pytest.mark.slow
def test_one_process_tests_what_ranks_trained(place: Place) -> None:
    told = figures(by_fsdp(place))
    done = place.run("test", place.config("by-fsdp", **SHARED))
    for name in ("loss", "Right"):
        (value,) = told[f"test/{name}"].values()
        (found,) = re.findall(rf" {name} ([\d.e+-]+)", done.stdout)
        assert float(found) == pytest.approx(value, abs=1e-4), done.text


@pytest.mark.slow
def test_a_bad_number_on_one_rank_is_seen_by_all(place: Place) -> None:
    """By a fused optimizer, which skips the step by itself."""
    fused = {"optimizer": {"name": "AdamW", "lr": 0.02, "fused": True}}
    settings = SHARED | fused | {"trainer.on_nonfinite": "skip", "trainer.max_epochs": 1}
    place.run(place.config("bad", **settings), ranks=2, do="train 3 rank 1 nan")
    found = figures(place.path("bad"))
    assert set(found["skipped_steps"].values()) == {1.0}
    assert all(torch.isfinite(value).all() for value in last(place.path("bad")).weights.values())


ACCELERATES_FILE = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "mixed_precision": "no", "num_machines": 1,
    "num_processes": 2, "machine_rank": 0, "rdzv_backend": "static", "same_network": True, "use_cpu": False,
    "main_training_function": "main", "downcast_bf16": "no",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_transformer_layer_cls_to_wrap": "Linear", "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip


@pytest.mark.slow
def test_accelerates_own_fsdp_file_is_used(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text(json.dumps(ACCELERATES_FILE))
    config = place.config("by-accelerate", **SETTINGS)
    done = place.run(config, launcher=[*ACCELERATE, "--config_file", str(file)])
    assert "sharded (fsdp)" in done.stdout, done.text
    close(figures(place.path("by-accelerate")), figures(by_ddp(place)))


@pytest.mark.parametrize(
    ("changes", "key", "possible"),
    [
        ({"trainer.sync_batchnorm": True}, "trainer.sync_batchnorm", "strategy: fsdp"),
        ({"trainer.precision": "fp16"}, "trainer.precision", "possible: bf16, fp32"),
        ({"trainer.ddp": {"static_graph": True}}, "trainer.ddp.static_graph", "possible: backend, timeout_seconds"),
        ({"trainer.strategy": "ddp"}, "trainer.fsdp", "strategy: fsdp"),
        ({"trainer.strategy": "fspd"}, "trainer.strategy", "'ddp', 'fsdp'"),
    ],
)
def test_what_does_not_go_together_is_one_message(tmp_path: Path, changes: Any, key: str, possible: str) -> None:
    path = write_config(tmp_path, "wrong", SHARED | changes)
    with pytest.raises(ConfigError) as found:
        check(load_config(path))
    (mistake,) = found.value.mistakes
    assert str(mistake).count(key) == 1
    assert possible in str(mistake)
    assert f"{path}:" in str(mistake)


class Blocks(nn.Module):
    """Two blocks, an embedding whose weights the head shares, and a part that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)]) for _ in range(2))
        self.ends = nn.Sequential(self.head, nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))


def test_what_is_gathered_at_a_time_is_called_as_a_module_and_shares_no_weights() -> None:
    model = Blocks()
    attentions = [block[1] for block in model.blocks]
    linears = [block[0] for block in model.blocks]
    assert set(units(model, None, 1)) == {*attentions, *linears, *model.ends[1]}
    assert set(units(model, None, 150)) == {*attentions, model.ends[1]}  # as a whole: each of its parts has 110
    assert units(model, None, 1000) == []
    assert set(units(model, ["MultiheadAttention"], 1)) == set(attentions)
    with pytest.raises(ConfigError, match=r"trainer\.fsdp\.layers: the model has no Block; it has Embedding, Linear"):
        units(model, ["Block"], 1)


def test_a_checkpoint_of_shards_is_read_without_them(place: Place) -> None:
    loaded = load(by_fsdp(place) / "checkpoints" / "last")
    assert {type(value) for value in loaded.weights.values()} == {torch.Tensor}
