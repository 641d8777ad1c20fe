"""dtrain check's table: figures that can be computed by hand, and mistakes that a training would meet hours later."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Result
from whole_runs import Place

from dtrain.config.load import load_config
from dtrain.launch.forecast import disk_finding, loader_finding
from dtrain.launch.memory_forecast import Held, LiveStorages, Step, largest_batch, narrowed, peak_of, resized
from dtrain.launch.step_timing import Timing

PARTS = """
import torch
from torch import nn

class Half(nn.Module):  # 15 parameters are trained, 20 never
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)

class Numbers(torch.utils.data.Dataset):  # sample i of a set is four times base + i, its label (base + i) % 3
    def __init__(self, size, base=0, broken=(), nan=(), wrong=()):
        self.size, self.base, self.broken, self.nan, self.wrong = size, base, [*broken], [*nan], [*wrong]
        self.paths = [f"scan-{base + i:02}.png" for i in range(size)]  # names in a folder, none of them here

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("image file is truncated")
        value = float("nan") if index in self.nan else float(self.base + index)
        return torch.full((4,), value), torch.tensor(7 if index in self.wrong else (self.base + index) % 3)
"""


def rows(result: Result) -> list[tuple[str, str, str]]:
    """The table: status, label, text."""
    found = []
    for line in result.stdout.splitlines():
        status, _, rest = line.partition("  ")[2].partition(" ")
        if status in ("ok", "warn", "fail"):
            label, _, text = rest.strip().partition("  ")
            found.append((status, label, text.strip()))
    return found


@pytest.fixture(scope="module")
def parts(place: Place) -> Iterator[Place]:
    place.write("forecast_parts.py", PARTS)
    yield place


def config(place: Place, name: str, **changes: object) -> str:
    sections: dict[str, object] = {
        "modules": ["forecast_parts"], "model": {"name": "Half"}, "optimizer": {"name": "AdamW", "lr": 0.1},
        "loaders": {"name": "Numbers", "batch_size": 4, "train": {"size": 40}, "val": {"size": 12, "base": 30}},
        "metrics": None,
    }  # fmt: skip
    return place.config(name, **(sections | changes))


def test_what_a_training_on_two_ranks_would_cost_and_fail_of(parts: Place) -> None:
    file = config(parts, "forecast-two", mlflow__tracking_uri="http://127.0.0.1:9")
    run = parts.path("forecast-two")
    run.mkdir()
    before = json.loads(Path(file).read_text())
    (run / "config.yaml").write_text(json.dumps(before | {"optimizer": {"name": "AdamW", "lr": 0.5}}))
    (run / "run.json").write_text(json.dumps({"state": "FAILED", "world_size": 2}))
    result = parts.run("check", file, "--world-size", "2", "--memory", "1G", expect=2)
    table = rows(result)
    text = {label: f"{status}: {found}" for status, label, found in table}
    # A multiplication and an addition for each of 4 x 3 weights; backward does as many for their gradients.
    assert text["model"] == "ok: Half, 35 parameters; FLOPs per sample: 24 forward, 48 with backward"
    assert text["steps"] == "ok: 5 per epoch, 10 in all; 4 x 2 rank(s)"
    # Two moments and two step numbers of what got a gradient; these live in DDP's buckets.
    held = "weights 140 B, gradients 140 B, optimizer 128 B, activations "
    assert f"per rank (4 samples per rank, fp32, ddp): {held}" in text["memory"]
    assert "samples per rank in 1 GB" in text["largest batch"]
    assert text["labels"] == "ok: train 0 to 2, val 0 to 2; 3 classes (52 samples looked at)"
    assert text["overlap"].startswith("warn: 10 of 12 samples of val are equal to one of train, such as sample 0 (")
    assert text["last run"].startswith("ok: run-forecast-two is FAILED; differs in optimizer.lr: 0.5 -> 0.1; begins")
    assert text["mlflow"].startswith("warn: http://127.0.0.1:9: ")
    assert {"step time", "duration", "loader", "checkpoints"} <= text.keys()
    assert table[-1][:2] == ("fail", "unused parameters"), "what is wrong comes last"
    assert "2 get no gradient: never.weight, never.bias; DistributedDataParallel will stop" in table[-1][2]
    order = [("ok", "warn", "fail").index(status) for status, _, _ in table]
    assert order == sorted(order)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "run.json"], "nothing is written"


@pytest.mark.parametrize("workers", [0, 2])
def test_all_data_names_every_sample_that_is_broken(parts: Place, workers: int) -> None:
    loaders = {
        "name": "Numbers", "batch_size": 4, "num_workers": workers,
        "train": {"size": 40, "broken": [3, 37], "nan": [20]}, "val": {"size": 12, "base": 40, "wrong": [5]},
    }  # fmt: skip
    result = parts.run("check", config(parts, f"forecast-broken-{workers}", loaders=loaders), "--all-data", expect=2)
    assert [" ".join(row) for row in rows(result)] == [
        "fail labels val: sample 5 (scan-45.png) has the label 7; the model has 3 classes, 0 to 2; more classes, other "
        "labels, or the loss's ignore_index",
        "fail broken sample train: sample 3 (scan-03.png): OSError: image file is truncated",
        "fail broken sample train: sample 20 (scan-20.png): its input has values that are not finite (NaN or infinity)",
        "fail broken sample train: sample 37 (scan-37.png): OSError: image file is truncated",
        "fail samples 3 are broken of those that were read (train 40, val 12); repair them, or leave them out by a "
        "collate_fn",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world-size", "3"], "global_batch_size 4 is not divisible by 3 ranks; possible: 6"),
        (["--world-size", "0"], "argument --world-size: expected at least 1, not 0"),
        (["--memory", "80"], "argument --memory: expected a size such as 80G or 512M, not '80'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(parts: Place, words: list[str], told: str) -> None:
    loaders = {"name": "Numbers", "global_batch_size": 4, "train": {"size": 40}}
    result = parts.run("check", config(parts, "forecast-refused", loaders=loaders), *words, expect=2)
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits", []),
        ("digits", ["trainer.precision=bf16", "trainer.ema_decay=0.9", "trainer.accumulate=2", "model.depth=4",
                    "trainer.activation_checkpointing=true"]),
        ("transunet_cells", []),
    ],
)  # fmt: skip
def test_peak_memory_is_that_of_the_allocator_to_a_fifth(name: str, overrides: list[str], tmp_path: Path) -> None:
    measure = runpy.run_path(str(REPOSITORY / "scripts" / "measure_memory.py"))["compared"]
    settings = ["device=cpu", f"trainer.checkpoint_dir={tmp_path}/run", *overrides]
    found = measure(load_config(REPOSITORY / "configfiles" / f"{name}.yaml", settings))
    assert found.on_cpu == pytest.approx(found.measured, rel=0.2)


def test_storages_that_live_at_the_same_time_are_counted() -> None:
    with LiveStorages() as live:
        one = torch.zeros(1000)  # 4,000 bytes
        other = one + 1
        one.add_(1)
        view = other[:10]
        del one
        third = other * 2
        del other
    assert live.peak == 8000
    assert live.now == 8000, "a view keeps its storage"
    del view, third
    assert live.now == 0


@pytest.mark.parametrize(
    ("strategy", "fsdp", "world_size", "expected"),
    [
        # Weights 100, gradients 80, optimizer 160, activations 1000 - 100.
        ("ddp", {}, 1, 100 + 160 + 900),
        ("ddp", {}, 4, 100 + 160 + 80 + 900),
        ("fsdp", {}, 4, 25 + 40 + 50 + 900),
        ("fsdp", {"param_dtype": "bf16"}, 4, 25 + 40 + 25 + 900),
        ("fsdp", {"reshard_after_forward": False}, 4, 25 + 40 + 100 + 900),
        ("fsdp", {"replicate": 2}, 4, 50 + 80 + 50 + 900),
    ],
)
def test_the_peak_of_a_rank_follows_its_strategy(
    strategy: str, fsdp: dict[str, object], world_size: int, expected: int
) -> None:
    held = Held(weights=100, gradients=80, optimizer=160, averages=0, largest=10, gathered=50, unit=20)
    options = {"strategy": strategy, "fsdp": fsdp, "ddp": None, "accumulate": 1}
    assert peak_of(Step(8, 1000, ()), held, world_size, options).total == expected
    # Of a tiny batch the step takes most: gradients and two temporary tensors of the largest parameter.
    if strategy == "ddp" and world_size == 1:
        assert peak_of(Step(1, 101, ()), held, world_size, options).total == 100 + 160 + 80 + 20
    # Several ranks have them in DDP's buckets, or beside them: where that is asked for, or where they are added up.
    if strategy == "ddp" and world_size == 4:
        tiny, least = Step(1, 101, ()), 100 + 160 + 80 + 20
        assert peak_of(tiny, held, world_size, options).total == least
        assert peak_of(tiny, held, world_size, options | {"accumulate": 2}).total == least + 80
        apart = {"gradient_as_bucket_view": False}
        assert peak_of(tiny, held, world_size, options | {"ddp": apart}).total == least + 80
        keeps = held._replace(may_keep_gradients=True)
        assert peak_of(tiny, keeps, world_size, options).total == least + 80
        within = {"gradient_as_bucket_view": True}
        assert peak_of(tiny, keeps, world_size, options | {"ddp": within}).total == least
    # A model that is one unit: its gradients, their copy for the ranks, and no other's.
    if strategy == "fsdp" and not fsdp:
        one = held._replace(gathered=100, unit=80)
        assert peak_of(Step(1, 101, ()), one, world_size, options).total == 25 + 40 + 100 + 2 * 80


@pytest.mark.parametrize("limit", [50, 107, 3000, 1_000_000, 99_999_999])
def test_the_largest_batch_is_found_in_a_few_tries(limit: int) -> None:
    asked = []

    def peak(samples: int) -> int:
        asked.append(samples)
        return 100 + 7 * samples

    found = largest_batch(peak, 16, limit)
    true = max(0, (limit - 100) // 7)
    assert true - max(1, true // 100) <= found <= true
    assert len(asked) <= 10


def test_batches_of_other_sizes() -> None:
    batch = {"image": torch.ones(8, 3), "target": [torch.zeros(8), torch.tensor(2)]}
    larger = resized(batch, 8, 20)
    assert (larger["image"].shape, larger["target"][0].shape, larger["target"][1].shape) == ((20, 3), (20,), ())
    assert narrowed(batch, 8, 2)["image"].shape == (2, 3)
    assert resized([torch.ones(8, 3), torch.ones(5)], 8, 20) is None, "boxes of all samples in one tensor"
    assert narrowed("text", 8, 2) == "text"


def test_a_loader_that_is_too_slow_is_told_with_the_workers_that_it_needs() -> None:
    slow = Timing(data=0.03, transfer=0.0, forward=0.004, backward=0.005, optimizer=0.001, load=0.03, samples=16)
    found = loader_finding(slow, accumulate=1, workers=0, has=8)
    assert found.status == "warn"
    assert found.found.startswith("75% of a step waits for data; one process loads a batch in 30 ms (533 samples/s)")
    assert (found.cure, "3 workers keep up" in found.found) == ("loaders.num_workers=3", True)
    assert loader_finding(slow, 1, 0, 2).cure == "loaders.num_workers=2 (this machine has 2 cores per rank)"
    assert loader_finding(slow._replace(data=0.0001), 1, 3, 8).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(1000, "ok"), (450, "warn"), (399, "fail")])
def test_checkpoints_need_their_number_and_one_more(free: int, status: str) -> None:
    found = disk_finding(100, last=2, best=1, free=free, where=Path("/x"))
    assert found.status == status
    assert found.found.startswith("100 B per checkpoint, 400 B for keep_last 2, keep_best 1 and the one being written")
