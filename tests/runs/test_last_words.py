"""What a person sees of an error: the user's own lines, then the card as the last thing, once for all ranks."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[..., object]
MINE = """\
import torch
from torch import nn
from torch.utils.data import Dataset


def decode(index):
    if index == 37:
        raise ValueError("the file is cut")
    return torch.ones(8) * index / 100


class Files(Dataset):
    def __init__(self, cut: bool = False):
        self.cut = cut
        self.paths = [f"day one/{index:02}.bin" for index in range(64)]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return decode(index) if self.cut else torch.ones(8), index % 4


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x)
"""
CONFIG = """\
modules: [mine]
device: cpu
model: {name: Net}
loaders: {name: Files, batch_size: 4, train: {}}
loss: {name: CrossEntropyLoss}
optimizer: {name: SGD, lr: 1e-3}
trainer: {max_epochs: 1, checkpoint_dir: run}
"""
WRONG = "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
STAMP = re.compile(r"^(rank \d+  )?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  )?")


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def shown(text: str) -> list[str]:
    return [STAMP.sub("", line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_bug_in_forward_ends_with_the_card_and_its_traceback_lies_in_the_log(run_cli, project: Path) -> None:
    result = run_cli(["c.yaml", "model.width=9"], timeout=200)
    assert result.rc == 1 and "Traceback" not in result.text, result.text
    lines = shown(result.stderr)
    begin = next(number for number, line in enumerate(lines) if line.startswith("rank 0 failed at step 1 (forward)"))
    assert WRONG in lines[begin] and len(lines) - begin <= 15
    number = MINE.splitlines().index("        return self.last(x)") + 1
    assert lines[begin - 4 : begin] == [
        f"{project}/mine.py:{number} in forward",
        f"    {number - 2:4}     def forward(self, x):",
        f"    {number - 1:4}         x = torch.relu(self.first(x))",
        f"  > {number:4}         return self.last(x)",
    ]
    assert "status: FAILED" in result.stdout and "failed at" not in result.stdout
    log = (project / "run/logs/rank-0.log").read_text()
    assert "torch/nn/modules/linear.py" in log and log.rstrip().endswith("run/failure.json")


@pytest.mark.slow
def test_under_a_launcher_the_ranks_say_it_once_and_torchrun_repeats_it_last(run_cli, project: Path) -> None:
    result = run_cli(["c.yaml", "model.width=9"], nproc=2, timeout=200)
    said, _, of_torchrun = result.text.partition("ChildFailedError")
    assert result.rc == 1 and said.count("failed at step 1 (forward)") == 1, result.text
    assert re.search(r"rank \d \(and \d alike\) failed at step 1", said)
    assert "torch/nn/modules" not in result.text
    last = of_torchrun.rpartition("Root Cause")[2]
    assert f"traceback : {WRONG}" in last and "mine.py:" in last
    assert "torch/nn/modules/linear.py" in (project / "run/logs/rank-1.log").read_text()


@pytest.mark.slow
def test_dtrain_launch_names_a_mistake_and_an_error_once(run_cli, project: Path) -> None:
    result = run_cli(["launch", "c.yaml", "--nproc-per-node", "2", "model.width=-3"], timeout=200)
    assert result.rc == 2 and result.text.count("Net(width=-3) raised RuntimeError") == 1, result.text
    assert "SIGTERM" not in result.text
    result = run_cli(["launch", "c.yaml", "--nproc-per-node", "2", "model.width=9"], timeout=200)
    lines = shown(result.text)
    assert result.rc == 1 and "Traceback" not in result.text and "\x1e" not in result.text, result.text
    assert sum("failed at step 1 (forward)" in line for line in lines) == 1
    assert lines[-1].startswith("dtrain launch: rank ") and WRONG in lines[-1]
    logs = [(project / f"run/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert all("torch/nn/modules/linear.py" in log and "\x1e" not in log for log in logs)


@pytest.mark.slow
def test_the_guilty_sample_and_its_line_are_named_also_from_a_worker(run_cli, project: Path) -> None:
    result = run_cli(["c.yaml", "loaders.num_workers=2", "loaders.train.cut=true"], timeout=200)
    raising = MINE.splitlines().index('        raise ValueError("the file is cut")') + 1
    assert result.rc == 1
    card = result.stderr[result.stderr.index("rank 0 failed at") :]
    assert "(waiting for data): ValueError: the file is cut (while loading sample 37 of Files, day one/37.bin)" in card
    assert f"at {project}/mine.py:{raising} in decode" in card
    assert "torch/_utils.py" not in result.text
    reason = json.loads((project / "run/run.json").read_text())["reason"]
    assert reason == "ValueError: the file is cut (while loading sample 37 of Files, day one/37.bin)"


@pytest.mark.slow
def test_check_and_the_whole_traceback(run_cli, project: Path) -> None:
    result = run_cli(["check", "c.yaml", "model.width=9", "loaders.num_workers=2"], timeout=200)
    assert result.rc == 1 and "Traceback" not in result.text and "atexit" not in result.text, result.text
    lines = shown(result.stderr)
    assert any(line.startswith(WRONG) for line in lines) and lines[-1] == "  the whole traceback: --traceback"
    result = run_cli(["check", "c.yaml", "model.width=9", "--traceback"], timeout=200)
    assert result.rc == 1 and "torch/nn/modules/linear.py" in result.stderr
    fine = run_cli(["check", "c.yaml", "loaders.num_workers=2"], timeout=200)
    assert fine.rc == 0 and "left running" not in fine.text and "Exception ignored" not in fine.text, fine.text
