"""Trainings from Python objects, as in a notebook: what takes a section's place, is recorded, compared and returned."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dtrain
from dtrain.config.difference import changes
from dtrain.config.live_objects import with_objects
from dtrain.config.load import from_mapping, load_config, to_yaml


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Points(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, size: int, seed: int = 0) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Noting(Points):
    """Notes which samples it was asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return super().__getitem__(index)


def right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


right.higher_is_better = True  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without MLflow, whose journal holds the same."""
    stub = tmp_path / "stubs" / "mlflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('kept out of this test')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stub.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)


def made(steps: int, folder: str = "run", model: nn.Module | None = None, **changes: Any) -> dtrain.Trainer:
    """A trainer of objects alone, but for the least that a config says."""
    torch.manual_seed(0)
    objects = {
        "model": model or Net(),
        "datasets": {"train": Points(20), "val": Points(10, 1), "test": Points(7, 2)},
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        "metrics": [right],
    }
    config = {
        "device": "cpu",
        "loaders": changes.pop("batch", {"batch_size": 4}),
        "mlflow": {"exit_timeout_seconds": 0},
    }
    config["trainer"] = {"max_steps": steps, "checkpoint_dir": folder, "validate_every_steps": 4, "pictures": False}
    return dtrain.create_trainer(config, **{**objects, **changes})


def weights_of(trainer: dtrain.Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


@pytest.mark.slow
def test_what_a_plain_loop_gives_and_a_resume_in_the_middle(tmp_path: Path) -> None:
    train = Noting(20)
    sets = {"train": train, "val": Points(10, 1), "test": Points(7, 2)}
    result = made(12, "whole", datasets=sets).fit()
    batches = [train.seen[start : start + 4] for start in range(0, 48, 4)]

    torch.manual_seed(0)
    net, data, val = Net(), Points(20), Points(10, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    scores = {}
    for step, indices in enumerate(batches, 1):
        optimizer.zero_grad()
        F.cross_entropy(net(data.x[indices]), data.y[indices]).backward()
        optimizer.step()
        if step % 4 == 0:
            with torch.no_grad():
                scores[step] = (net(val.x).argmax(1) == val.y).float().mean().item()
    expected = max(scores.values())
    assert result.best["val/right"] == pytest.approx(expected)
    assert result.last["val/right"] == pytest.approx(scores[12])
    chosen = next(step for step in scores if scores[step] == expected)
    assert result.best_checkpoint == Path(f"whole/checkpoints/step-{chosen:08d}")
    assert torch.allclose(net.layers[0].weight, trainer_weights(result, 12)["layers.0.weight"], atol=1e-6)

    assert made(6, "cut", datasets=sets).fit().steps == 6
    resumed = made(12, "cut", datasets=sets).fit()
    assert resumed.steps == 12
    assert resumed.last == result.last and resumed.best == result.best and resumed.test == result.test
    assert {"test/loss", "test/right"} == set(resumed.test)
    first, second = (trainer_weights(each, 12) for each in (result, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def trainer_weights(result: Any, step: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(result.run_folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.slow
def test_a_result_is_the_status_with_what_was_reached() -> None:
    result = made(4).fit()
    assert result == "FINISHED" and result and result.status == "FINISHED" and f"{result}" == "FINISHED"
    assert (result.steps, result.epochs, result.run_folder) == (4, 0, Path("run"))
    assert repr(result).startswith("FINISHED after 4 steps, 0 epoch(s)\n  best  val/loss ")
    assert str(result.best_checkpoint) in repr(result)
    nothing_to_do = made(4).fit()
    assert nothing_to_do == "FINISHED" and nothing_to_do.last == result.last and nothing_to_do.test == result.test
    with pytest.raises(dtrain.ConfigError, match=r"optimizer\._object_\.code: "):
        made(8, optimizer=lambda params: torch.optim.SGD(params, lr=0.25, momentum=0.9))
    with pytest.raises(dtrain.ConfigError, match=r"loaders\.train\._object_\.length: 20 -> 24"):
        made(8, datasets={"train": Points(24), "val": Points(10, 1), "test": Points(7, 2)})


@pytest.mark.slow
def test_another_training_in_this_process_finds_the_memory_free() -> None:
    trainer = made(4, "first")
    trainer.fit()
    seen = weakref.ref(trainer.module)
    del trainer
    gc.collect()
    assert seen() is None


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["params", "model", "named_parameters"])
def test_an_optimizer_is_given_what_it_asks_for(argument: str) -> None:
    seen: list[Any] = []
    space = {"seen": seen, "torch": torch}
    exec(
        f"def make({argument}): seen.append({argument}); return torch.optim.SGD(list(net.parameters()), lr=0.1)", space
    )
    space["net"] = net = Net()
    trainer = made(1, model=net, optimizer=space["make"])
    assert trainer.module is net and trainer.optimizer.param_groups[0]["params"][0] is net.layers[0].weight
    kinds = {"params": list, "model": Net, "named_parameters": list}
    assert isinstance(seen[0], kinds[argument])
    if argument == "named_parameters":
        assert [name for name, _ in seen[0]] == [name for name, _ in net.named_parameters()]


SCRIPT = """
import json, sys
from test_notebook import made, SPLIT, Points
result = made(8, "two", datasets={"train": Points(20), "val": Points(10, 1)}, batch=SPLIT).fit()
print(json.dumps({"figures": result.last, "best": str(result.best_checkpoint), "status": result}))
"""
SPLIT = {"global_batch_size": 4}


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    one = made(8, "one", datasets={"train": Points(20), "val": Points(10, 1)}, batch=SPLIT).fit()
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "script.py"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2 and lines[0] == lines[1], done.stdout + done.stderr
    assert lines[0]["status"] == one and lines[0]["figures"] == pytest.approx(one.last, abs=1e-5)


class Interrupting(Points):
    """Sends SIGINT, as the stop button of a notebook does, when it has loaded so many samples."""

    def __init__(self, size: int, after: int) -> None:
        super().__init__(size)
        self.left = after

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


@pytest.mark.slow
def test_the_stop_button_saves_and_returns() -> None:
    before = signal.getsignal(signal.SIGINT)
    stopped = made(12, datasets={"train": Interrupting(20, after=22)}, metrics=None).fit()
    assert stopped == "KILLED" and "SIGINT" in stopped.reason
    assert 4 <= stopped.steps < 12
    assert stopped.best_checkpoint == Path(f"run/checkpoints/step-{stopped.steps:08d}")
    assert signal.getsignal(signal.SIGINT) is before
    assert made(12, datasets={"train": Interrupting(20, after=-1)}, metrics=None).fit().steps == 12


def config_of(**objects: Any) -> Any:
    return with_objects(from_mapping(objects.pop("config", {})), objects)


def test_loaders_keys_stay_and_the_rest_is_replaced() -> None:
    written = {"loaders": {"name": "Digits", "batch_size": 8, "train": {"split": "train", "num_workers": 2}, "val": {}}}
    config = config_of(config={**written, "model": {"name": "ViT"}}, model=Net(), datasets={"train": Points(3)})
    assert config.loaders.train.num_workers == 2 and "split" not in config.loaders.train
    assert config.loaders.val.to_dict() == {} and config.loaders.name == "Digits"
    assert config.model.name == f"{__name__}.Net" and config.model._object_.repr.startswith("Net(\n")
    assert config._notes == [
        "model: the object given in Python takes the place of ViT",
        "loaders.train: the object given in Python takes the place of Digits",
    ]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"model": Net}, "model: expected an object, found the class Net; make one: Net(...)"),
    "optimizer": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)},
        "optimizer: expected a function, such as lambda params: torch.optim.AdamW(params, lr=1e-3); found a SGD",
    ),
    "phase": ({"datasets": {"trian": Points(2)}}, "datasets: 'trian' is not a phase; did you mean 'train'?"),
    "loader": ({"datasets": {"val": DataLoader(Points(2))}}, "datasets['val']: expected a dataset, found a DataLoader"),
    "datasets": ({"datasets": Points(2)}, "datasets: expected a dict such as {'train': ..., 'val': ...}"),
    "key": (
        {"config": {"loaders": {"batch_sise": 4}}, "datasets": {"train": Points(2)}},
        "loaders: unexpected key 'batch_sise' beside a dataset given in Python; did you mean 'batch_size'?",
    ),
}


@pytest.mark.parametrize("objects, text", MISTAKES.values(), ids=list(MISTAKES))
def test_what_is_not_what_its_argument_takes(objects: dict[str, Any], text: str) -> None:
    with pytest.raises(dtrain.ConfigError) as error:
        config_of(**objects)
    assert text in str(error.value)


SGD = "def given(p): return torch.optim.SGD(p, lr=RATE)"


def _in_a_cell(text: str, number: int) -> Callable[..., Any]:
    """A function as a notebook's cell makes it: of no file."""
    space: dict[str, Any] = {"torch": torch, "__name__": "__main__"}
    exec(compile("\n" * number + text, f"<cell {number}>", "exec"), space)
    return space["given"]


@pytest.mark.parametrize(
    "before, after, is_same",
    [
        ("given = lambda p: torch.optim.SGD(p, lr=0.1)", "given = lambda p: torch.optim.SGD(p, lr=0.1)", True),
        ("given = lambda p: torch.optim.SGD(p, lr=0.1)", "given = lambda p: torch.optim.SGD(p, lr=0.2)", False),
        (f"RATE = 0.1\n{SGD}", f"\nRATE = 0.1\n{SGD}", True),
        (f"RATE = 0.1\n{SGD}", f"RATE = 0.2\n{SGD}", False),
        ("def given(p): return p in {'a', 'b'}", "def given(p): return p in {'b', 'a'}", True),
    ],
)  # fmt: skip
def test_a_function_of_a_cell_is_compared_by_what_it_does(before: str, after: str, is_same: bool) -> None:
    old, new = (config_of(optimizer=_in_a_cell(text, number)) for number, text in enumerate((before, after)))
    assert (changes(old, new, 1, 1) == []) is is_same


def test_a_changed_part_of_a_model_is_seen(tmp_path: Path) -> None:
    old, same, other = (config_of(model=Net(dropout)) for dropout in (0.0, 0.0, 0.5))
    (tmp_path / "config.yaml").write_text(to_yaml(old))
    saved = load_config(tmp_path / "config.yaml")
    assert changes(saved, same, 1, 1) == []
    assert [str(each).partition(": ")[0] for each in changes(saved, other, 1, 1)] == ["model._object_.repr"]


def test_the_recorded_config_alone_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from dtrain.cli import main

    config = config_of(model=Net(), datasets={"test": TensorDataset(torch.ones(2))}, metrics=[right])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main(["test", "config.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in lines[:3]] == [
        "loaders.test: torch.utils.data.dataset.TensorDataset is an object that was given to create_trainer in Python",
        f"model: {__name__}.Net is an object that was given to create_trainer in Python",
        f"metrics.right: {__name__}.right is an object that was given to create_trainer in Python",
    ]
    assert "make the same call of dtrain.create_trainer again" in lines[-1]


CELLS = [
    """
import torch, dtrain
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.layer = nn.Linear(4, 2)
    def forward(self, x): return self.layer(x)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, index): return torch.full((4,), float(index)), index % 2
""",
    """
def make(steps):
    return dtrain.create_trainer(
        {"device": "cpu", "loaders": {"num_workers": 2, "batch_size": 4}, "trainer": {"max_steps": steps},
         "mlflow": {"exit_timeout_seconds": 0}},
        model=Net(), datasets={"train": Data(), "val": Data()}, loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01))
make(4).fit()
""",
    "result = make(8).fit(); result",
    """
import threading, os, pathlib, signal, time
def figures():
    return pathlib.Path("runs/default/metrics.jsonl").read_text().count('"metrics"')
def stop(before):
    while figures() < before + 2:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, args=(figures(),)).start()
make(10**7).fit().status
""",
]


@pytest.mark.slow
def test_in_a_kernel(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    nbclient.NotebookClient(notebook, timeout=200, kernel_name=kernel(tmp_path)).execute(cwd=str(tmp_path))
    outputs = [[item for item in cell.outputs if item.output_type == "execute_result"] for cell in notebook.cells]
    texts = [item[0].data["text/plain"] if item else "" for item in outputs]
    assert texts[1].startswith("FINISHED after 4 steps, 1 epoch(s)\n  best  val/loss ")
    assert texts[2].startswith("FINISHED after 8 steps, 2 epoch(s)")
    assert texts[3] == "'KILLED'"
    shown = "".join(item.text for item in notebook.cells[1].outputs if item.output_type == "stream")
    assert "val  step 4  loss " in shown and "\r" not in shown and "\x1b" not in shown
    assert json.loads(Path("runs/default/run.json").read_text())["state"] == "KILLED"


def kernel(folder: Path) -> str:
    """A kernel of this very Python."""
    place = folder / "kernels" / "here"
    place.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    os.environ["JUPYTER_PATH"] = str(folder)
    return "here"
