"""trainer.strategy: fsdp: a model sharded over gloo ranks is the same training, with the same files, as by DDP."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import ACCELERATE, EXACT, Place, close, figures, last, write_config

from dtrain.checkpoint.checkpoint_files import load
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.distributed.fsdp import FSDP, joined, units

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
    folder = by_fsdp(place) / "checkpoints" / "last"
    shards = [f"{part}/shard-0000{rank}-of-00002.safetensors" for part in ("ema", "model", "state") for rank in (1, 2)]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == [*shards[:4], "state.pt", *shards[4:]]


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


@pytest.mark.parametrize(("shape", "cure"), [((), r"give it the shape \(1,\)"), ((0, 4), "make it a buffer")])
def test_a_parameter_that_cannot_be_divided_is_named(shape: tuple[int, ...], cure: str) -> None:
    """torch itself fails at its first backward, in a function of its own."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_parameter("odd", nn.Parameter(torch.zeros(shape)))
    nobody: Any = None
    with pytest.raises(ConfigError, match=rf"trainer\.strategy: fsdp cannot divide 0\.odd.*{cure}"):
        FSDP.divide(nobody, model)


def test_a_checkpoint_of_shards_is_read_without_them(place: Place) -> None:
    loaded = load(by_fsdp(place) / "checkpoints" / "last")
    assert {type(value) for value in loaded.weights.values()} == {torch.Tensor}


def test_what_ranks_have_of_a_sharded_tree_is_joined_to_the_whole_of_it() -> None:
    whole = torch.arange(21.0).view(7, 3)
    rows = [whole[:3], whole[3:6], whole[6:], whole[:0]]  # as torch.chunk divides 7 among 4, the last one empty
    trees = []
    for number, part in enumerate(rows):
        shard = {"dtrain.shard": part, "shape": [7, 3], "offset": [min(7, 3 * number), 0]}
        trees.append({"w": shard, "tied": shard, "state": [(number, shard)], "buffer": torch.full((2,), number)})
    found = joined(trees)
    assert torch.equal(found["w"], whole) and found["tied"] is found["w"] and found["state"][0][1] is found["w"]
    assert found["state"][0][0] == 0 and found["buffer"].tolist() == [0, 0], "what is not sharded is the first one's"


class Thread:
    """A rank among threads: each collective is one number or batch of all, between two barriers."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[Any]) -> None:
        self.rank, self.world_size, self._barrier, self._said = rank, barrier.parties, barrier, said

    def _all(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        self._barrier.wait(200)
        found = list(self._said)
        self._barrier.wait(200)
        return found

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.numel() <= 4, "what ranks say before each batch must not grow with their number"
        return torch.stack(self._all(tensor)).amax(0)

    def broadcast(self, value: Any, source: int) -> Any:
        return self._all(value)[source]


def test_a_rank_without_samples_gets_the_batch_of_the_first_rank_that_has_some() -> None:
    """Ranks of 0, 3, 1 and 2 batches; a batch of 0 samples, as rank 3's second one, counts as none."""
    batches: list[list[tuple[Any, int]]] = [[], [("b0", 2), ("b1", 2), ("b2", 2)], [("c0", 2)], [("d0", 1), (None, 0)]]
    barrier, said = threading.Barrier(4), [None] * 4

    def rounds(rank: int, stops_at: int) -> list[Any]:
        seen: list[Any] = []
        fsdp: Any = SimpleNamespace(_ranks=Thread(rank, barrier, said))
        for batch, samples, stops in FSDP.rounds(fsdp, batches[rank], lambda: rank == 2 and len(seen) == stops_at):
            seen.append((batch, samples, stops))
        return seen

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rounds, range(4), [9] * 4))
        assert found[0] == [("b0", 0, False), ("b1", 0, False), ("b2", 0, False)]
        assert found[1] == [("b0", 2, False), ("b1", 2, False), ("b2", 2, False)]
        assert found[2] == [("c0", 2, False), ("b1", 0, False), ("b2", 0, False)]
        assert found[3] == [("d0", 1, False), ("b1", 0, False), ("b2", 0, False)]
        stopped = list(pool.map(rounds, range(4), [1] * 4))
    assert [[stops for _, _, stops in rank] for rank in stopped] == [[False, True, False]] * 4
