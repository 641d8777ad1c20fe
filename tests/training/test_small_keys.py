"""Limits of batches, overfitting, anomaly detection, the norm without clipping, channels_last, and torch's switches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import Place, close, equal, figures, last, write_config

from dtrain.config import versions
from dtrain.config.check import check, notes
from dtrain.config.difference import changes
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.data.batch import in_channels_last
from dtrain.dataloader import limited
from dtrain.training.memory_format import follow_weights, to_channels_last

PARTS = """
import torch
from torch import nn


class Images(torch.utils.data.Dataset):
    def __init__(self, size=16):
        self.x = torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.x[index].sum() > 0)


class Conv(nn.Module):
    def __init__(self, last=False):
        super().__init__()
        self.conv, self.head, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), last

    def forward(self, x):
        for tensor in (x, self.conv.weight):  # in training, validation and test, also of the averages
            assert tensor.is_contiguous(memory_format=torch.channels_last) == self.last, tensor.stride()
        return self.head(self.conv(x).relu().mean((2, 3)))


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return hidden + (hidden * 0).sqrt()  # finite, but not its gradient
"""


@pytest.fixture(scope="module")
def small(place: Place) -> Place:
    place.write("small_parts.py", PARTS)
    return place


def seen(place: Place, folder: str) -> list[set[int]]:
    files = sorted((place.folder / folder).iterdir())
    return [set(map(int, file.read_text().split())) for file in files]


@pytest.mark.slow
def test_limits_are_of_the_epochs_order_and_equal_on_any_number_of_ranks(small: Place) -> None:
    """29 samples in batches of 4: 0.3 is 2 of 7 whole batches, 2 of 3 validation batches hold 8 of 11 samples."""
    settings = {
        "loaders.batch_size": None, "loaders.global_batch_size": 4, "loaders.train": {"size": 29},
        "trainer.pictures": False, "loaders.train.drop_last": True, "trainer.max_epochs": 3,
        "trainer.limit_batches": {"train": 0.3, "val": 2},
    }  # fmt: skip
    for ranks in (1, 2):
        done = small.run(small.config(f"limits-{ranks}", **settings), ranks=ranks)
        assert "data: train 29, val 11 samples, of which are used train 8, val 8" in done.stdout
    one, two = (figures(small.path(f"limits-{ranks}")) for ranks in (1, 2))
    assert list(one["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(one["val/loss"]) == [2, 4, 6]
    assert {value * 8 % 1 for value in one["val/Right"].values()} == {0.0}
    assert "left_out_samples" not in one and "val/left_out_samples" not in one
    close(one, two)
    small.run(small.config("limits-1", **settings | {"trainer.limit_batches": None, "trainer.max_epochs": 5}))
    assert list(figures(small.path("limits-1"))["train/loss"]) == list(range(1, 21))  # two epochs of 7: it may change


@pytest.mark.slow
def test_overfitting_trains_and_validates_on_the_same_first_batches(small: Place) -> None:
    settings = {
        "loaders.train": {"size": 29}, "trainer.overfit_batches": 2, "trainer.max_epochs": 40,
        "trainer.pictures": False,
        "model": {"name": "MLP"}, "optimizer": {"name": "AdamW", "lr": 0.02}, "loaders.batch_size": 4,
    }  # fmt: skip
    (small.folder / "seen-overfit").mkdir()
    env = {"TOY_SEEN": str(small.folder / "seen-overfit")}
    small.run(small.config("overfit", **settings), "trainer.max_epochs=17", env=env)
    small.run(small.config("overfit", **settings), env=env)  # resumed
    assert seen(small, "seen-overfit") == [set(range(8)), set(range(8))]
    found = figures(small.path("overfit"))
    assert max(found["train/loss"]) == 80
    assert found["val/Right"][80] == 1.0
    assert found["val/loss"][80] < 0.1 < found["val/loss"][2]


def test_a_share_is_at_least_one_batch_and_at_most_all() -> None:
    assert [limited(29, 4, limit) for limit in (1, 7, 8, 99, 0.01, 0.5, 1.0)] == [4, 28, 29, 29, 4, 16, 29]


@pytest.mark.slow
def test_a_backward_that_makes_nan_names_its_line_of_forward(small: Place) -> None:
    config = small.config(
        "anomaly", modules=["toy", "small_parts"], model={"name": "Root"}, **{"trainer.anomaly": True}
    )
    done = small.run(config, expect=1)
    line = PARTS.splitlines().index("        return hidden + (hidden * 0).sqrt()  # finite, but not its gradient") + 1
    where = f"{small.folder}/small_parts.py:{line} in forward: return hidden + (hidden * 0).sqrt()"
    assert f"backward of {where}" in done.stdout + done.stderr
    note = json.loads((small.path("anomaly") / "failure.json").read_text())
    assert note["forward"].startswith(where)
    assert "returned nan values" in note["message"]
    assert "adding an epsilon" in note["cure"]


@pytest.mark.slow
def test_the_norm_is_logged_without_clipping(small: Place) -> None:
    settings = {"trainer.log_grad_norm": True, "trainer.checkpoint_every_steps": 1, "trainer.keep_last": 3}
    small.run(small.config("norm-alone", **settings | {"trainer.max_steps": 3}))
    run = small.path("norm-alone")
    before, after = (last_of(run, step) for step in (2, 3))
    steps = torch.cat([(before[name] - after[name]).flatten().double() for name in before])
    assert figures(run)["grad_norm"][3] == pytest.approx(
        float(steps.norm()) / 0.1, rel=1e-4
    )  # SGD's step is lr * gradient


def last_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


CONV: dict[str, Any] = {
    "modules": ["toy", "small_parts"], "model": {"name": "Conv"}, "loaders": {
        "name": "Images", "batch_size": 2, "train": {}, "val": {"size": 6}, "test": {"size": 6}},
    "optimizer": {"name": "AdamW", "lr": 0.02}, "trainer.pictures": False, "trainer.ema_decay": 0.5,
}  # fmt: skip


@pytest.mark.slow
def test_channels_last_is_kept_by_ranks_averages_and_checkpoints(small: Place) -> None:
    """The model itself asserts the format of its input and weights, in each call."""
    small.run(small.config("channels-first", **CONV), ranks=2)
    settings = CONV | {"model": {"name": "Conv", "last": True}, "trainer.channels_last": True}
    small.run(small.config("channels-last", **settings), ranks=2)
    close(figures(small.path("channels-last")), figures(small.path("channels-first")))
    small.run(small.config("channels-resumed", **settings), "trainer.max_steps=3", ranks=2)
    small.run(small.config("channels-resumed", **settings), ranks=2)
    one, other = last(small.path("channels-last")), last(small.path("channels-resumed"))
    assert equal(one.weights, other.weights)
    assert equal(one.ema, other.ema)
    assert equal(one.state["optimizer"], other.state["optimizer"])


def test_each_tensor_has_the_format_of_its_axes() -> None:
    model = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(3, 4, 3), torch.nn.Linear(3, 4)])
    values = [item.detach().clone() for item in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters())
    sum(item.square().sum() for item in model.parameters()).backward()
    optimizer.step()
    kept = {id(item): optimizer.state[item]["exp_avg"].clone() for item in model.parameters()}
    to_channels_last(model)
    follow_weights(optimizer)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    for item in model.parameters():
        assert optimizer.state[item]["exp_avg"].stride() == item.stride()
        assert torch.equal(optimizer.state[item]["exp_avg"], kept[id(item)])
    assert len(values) == 6
    image, volume, table = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3)
    changed = in_channels_last({"a": [image, volume], "b": (table, "text")})
    assert changed["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert changed["a"][1].is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(changed["a"][1], volume)
    assert changed["b"][0] is table


@pytest.mark.slow
def test_torchs_switches_are_set(here: Any) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        here(
            "switches", **{"trainer.matmul_precision": "high", "trainer.cudnn_benchmark": True, "trainer.max_steps": 1}
        )
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"trainer.limit_batches": 0}, "trainer.limit_batches: must be a number of batches from 1 on, or a share"),
        ({"trainer.limit_batches": 1.5}, "found float 1.5"),
        ({"trainer.limit_batches": {"val": 0}}, "loaders.val=null leaves the validation out"),
        ({"trainer.limit_batches": {"vla": 1}}, "trainer.limit_batches.vla: is not a phase; did you mean 'val'?"),
        ({"trainer.limit_batches": 2, "trainer.overfit_batches": 2}, "cannot be combined with 'limit_batches'"),
        ({"trainer.cudnn_benchmark": True, "trainer.deterministic": True}, "cannot be combined with 'deterministic'"),
        ({"trainer.matmul_precision": "hihg"}, "'highest', 'high', 'medium'"),
        (
            {"config_version": 2},
            "config_version: this dtrain knows configs up to version 1, and this one is of version 2",
        ),
    ],
)
def test_what_cannot_be_is_one_message(tmp_path: Path, wrong: Any, told: str) -> None:
    path = write_config(tmp_path, "wrong", wrong)
    with pytest.raises(ConfigError) as found:
        check(load_config(path))
    (mistake,) = found.value.mistakes
    assert told in str(mistake)
    assert f"{path}:" in str(mistake)


def test_an_older_config_is_told_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CONFIG_VERSION", 3)
    monkeypatch.setattr(versions, "CHANGED", {2: "seeds are even", 3: "rates are odd"})
    for version, told in ((1, ["seeds are even", "rates are odd"]), (2, ["rates are odd"]), (3, []), (None, [])):
        config = load_config(write_config(tmp_path, "old", {"config_version": version}))
        check(config)
        lines = [line.partition(", ")[2] for line in notes(config) if line.startswith("config_version")]
        assert lines == told


def test_what_may_change_when_a_training_resumes(tmp_path: Path) -> None:
    before = load_config(write_config(tmp_path, "before", {"trainer.strategy": "fsdp"}))
    free = {
        "config_version": 1, "trainer.limit_batches": 3, "trainer.anomaly": True, "trainer.log_grad_norm": True,
        "trainer.channels_last": True, "trainer.activation_checkpointing": True, "trainer.cudnn_benchmark": True,
        "trainer.fsdp": {"cpu_offload": True, "replicate": 2},
    }  # fmt: skip
    computed = {
        "trainer.overfit_batches": 1, "trainer.swa": {"start_epoch": 1}, "trainer.matmul_precision": "high",
        "trainer.fsdp.param_dtype": "bf16", "trainer.fsdp.reduce_dtype": "bf16",
    }  # fmt: skip
    after = load_config(write_config(tmp_path, "after", {"trainer.strategy": "fsdp"} | free | computed))
    found = {".".join(map(str, change.path)): change.is_free for change in changes(before, after, 2, 2)}
    del found["trainer.checkpoint_dir"]
    assert {key for key, is_free in found.items() if not is_free} == set(computed)
    assert {key.split(".")[1] if "." in key else key for key, is_free in found.items() if is_free} == {
        "config_version", "limit_batches", "anomaly", "log_grad_norm", "channels_last", "activation_checkpointing",
        "cudnn_benchmark", "fsdp",
    }  # fmt: skip
