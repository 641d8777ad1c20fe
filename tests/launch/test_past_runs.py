"""dtrain runs, diff and report, on journals that are written by hand, and what MLflow has of a run."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TAG, Tagged
from stores import GONE_PID, deliver, runs_in, write_run

from dtrain import cli
from dtrain.launch.compare_figures import compare_figures
from dtrain.launch.reproduce import Plan, judge
from dtrain.reporting.curves import thinned, ticks
from dtrain.tracking.run_record import RunRecord

Run = Callable[..., tuple[int, str, str]]
CHROMIUM = shutil.which("chromium")
DIFF = (
    "diff --git a/net.py b/net.py\n--- a/net.py\n+++ b/net.py\n@@ -1,2 +1,3 @@\n-old = 1\n+new = 1\n+more = 2\n rest\n"
)
CONFIG = """\
experiment: shapes
model: {name: Linear, in_features: 8, out_features: 3}
loss: {name: CrossEntropyLoss}
optimizer: {name: SGD, lr: %s}
trainer: {max_epochs: 3, checkpoint_dir: %s}
"""


def write_folder(
    folder: Path,
    values: Sequence[float] = (0.25, 0.75, 0.5),
    *,
    rate: float = 0.1,
    started: float = 1_700_000_000.0,
    more: Sequence[dict[str, Any]] = (),
    patch: str = "",
    **facts: Any,
) -> Path:
    """A run folder with a validation every 10 steps, whose metric and loss are `values` and 1 less each."""
    known = {
        "state": "FINISHED", "reason": "", "experiment": "shapes", "run_name": folder.name, "started": started,
        "attempt_started": started, "ended": started + 90, "host": socket.gethostname(), "pid": GONE_PID, "attempt": 1,
        "world_size": 2, "max_epochs": 3, "steps": 30, "steps_per_epoch": 10, "monitor": "val/Right", "mode": "max",
        "samples": {"train": 40, "val": 12}, **facts,
    }  # fmt: skip
    lines: list[dict[str, Any]] = [{"kind": "start", "time": started, "attempt": 1, "from_step": None, "facts": known}]
    for number, value in enumerate(values, 1):
        moment = started + 30 * number
        figures = {"val/Right": value, "val/loss": 1 - value, "train/loss": 2 - value, "time/forward": 0.003}
        lines.append({"kind": "metrics", "time": moment, "step": 10 * number, "values": figures})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, *more)))
    (folder / "run.json").write_text(json.dumps(known))
    (folder / "config.yaml").write_text(CONFIG % (rate, folder.name))
    (folder / "code").mkdir()
    (folder / "code" / "commit.txt").write_text("a" * 40 + "\n")
    (folder / "code" / "status.txt").write_text("?? notes.py\n" if patch else "")
    (folder / "code" / "diff.patch").write_text(patch)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)` in a folder of its own: exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_runs_are_listed_newest_first_with_how_far_they_are(run: Run, tmp_path: Path) -> None:
    now = time.time()
    write_folder(tmp_path / "runs" / "old")
    write_folder(tmp_path / "runs" / "sweep" / "lr=1", started=now - 500, state="KILLED", reason="SIGTERM")
    living = {"state": "RUNNING", "ended": None, "pid": os.getpid()}
    write_folder(tmp_path / "runs" / "now", [0.25, 0.5], started=now + 5, **living)
    write_folder(tmp_path / "runs" / "gone", [0.25], started=now - 300, state="RUNNING", ended=None)
    write_folder(tmp_path / "runs" / "old" / "checkpoints" / "no-run-of-its-own")
    status, out, _ = run("runs", "--json")
    found = json.loads(out)
    assert status == 0
    assert [each["name"] for each in found] == ["runs/now", "runs/gone", "runs/sweep/lr=1", "runs/old"]
    now_running, gone, killed, old = found
    assert (now_running["state"], now_running["step"], now_running["steps"], now_running["epoch"]) == (
        "RUNNING",
        20,
        30,
        2,
    )
    assert now_running["left_seconds"] == pytest.approx(30)  # ten steps took 30 s
    assert (gone["state"], gone["reason"]) == ("FAILED", "its process is gone, and left no word")
    assert (killed["state"], killed["reason"], killed["seconds"]) == ("KILLED", "SIGTERM", 90)
    assert old["best"] == {"step": 20, "value": 0.75} and old["figures"]["val/loss"] == 0.5

    status, out, _ = run("runs", "--limit", "3")
    lines = out.splitlines()
    assert lines[0].split() == ["run", "started", "status", "progress", "best", "time"]
    running = re.split(r"\s{2,}", lines[1])
    assert running[2:5] == ["RUNNING", "epoch 2/3", "Right 0.5000"] and running[-1] == "30 s left"
    assert re.split(r"\s{2,}", lines[3])[2:] == ["KILLED", "epoch 3/3", "Right 0.7500", "1 min 30 s", "SIGTERM"]
    assert lines[4:] == ["and 1 older ones: --limit 4"]
    assert run("runs", "runs/sweep")[1].splitlines()[1].startswith("runs/sweep/lr=1 ")
    assert run("runs", "rusn")[::2] == (2, "dtrain runs: rusn is not a folder; did you mean 'runs'?\n")
    (tmp_path / "empty").mkdir()
    assert run("runs", "empty")[1].startswith(f"no runs in and under {tmp_path}/empty; ")


def test_a_list_is_no_wider_than_the_terminal() -> None:
    from dtrain.launch.runs import Row, table

    facts = {"state": "FAILED", "reason": "a long reason " * 9, "started": 1.0, "ended": 9.0, "monitor": "val/Dice"}
    row = Row("runs/a-name-that-is-longer-than-it-should-be/lr=1e-3", facts, 7, (5, 0.5), {})
    for width in (80, 120):
        lines = table([row], width)
        assert max(map(len, lines)) <= width and "lr=1e-3" in lines[1] and "Dice 0.5000" in lines[1]
    assert "  a long " in lines[1]
    assert row.name in table([row], None)[1] and facts["reason"].strip() in table([row], None)[1]


def test_what_a_branch_left_behind_no_longer_counts(run: Run, tmp_path: Path) -> None:
    facts = {"state": "FINISHED"}
    start = {"kind": "start", "time": 1_700_000_100, "attempt": 2, "from_step": 10, "facts": facts}
    again = {"kind": "metrics", "time": 1_700_000_120, "step": 20, "values": {"val/Right": 0.5}}
    write_folder(tmp_path / "one", [0.25, 0.4, 0.75], more=[start, again])  # of which step 30 no longer counts
    assert json.loads(run("runs", "one", "--json")[1])[0]["best"] == {"step": 20, "value": 0.5}


def test_a_diff_names_only_what_differs(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    status, out, _ = run("diff", "one", "same")
    assert status == 0 and out.splitlines()[:2] == [
        "A  one: FINISHED, epoch 3/3, 1 min 30 s", "B  same: FINISHED, epoch 3/3, 1 min 30 s",
    ]  # fmt: skip
    assert [line for line in out.splitlines()[2:] if line] == [
        "config: the same", "code: the same (aaaaaaaaaa, no changes)", "environment: not recorded", "data: the same",
        "figures: equal, all 9 of them",
    ]  # fmt: skip

    other = write_folder(
        tmp_path / "other", [0.25, 0.8, 0.9], rate=0.2, patch=DIFF, samples={"train": 50, "val": 12}, world_size=4
    )
    (other / "environment").mkdir()
    packages = {"torch": "2.13.0", "numpy": "2.1"}
    (other / "environment" / "environment.json").write_text(json.dumps({"python": "3.11.7", "packages": packages}))
    status, out, _ = run("diff", "one", "other", "--json")
    found = json.loads(out)
    by_key = {
        name: {row["key"]: (row["one"], row["other"]) for row in found[name]}
        for name in found
        if name not in "ab" and name != "first_difference"
    }
    assert by_key["config"] == {
        "optimizer.lr": ("0.1", "0.2"),
        "trainer.checkpoint_dir": ("'one'", "'other'"),
    }
    assert by_key["code"] == {"net.py": ("", "+2 -1"), "notes.py": ("", "untracked")}
    assert by_key["environment"] == {
        "ranks": ("2", "4"),
        "python": ("", "3.11.7"),
        "torch": ("", "2.13.0"),
        "numpy": ("", "2.1"),
    }
    assert by_key["data"] == {"train.samples": ("40", "50")}
    assert by_key["figures"]["best val/Right"] == ("0.7500 (step 20)", "0.9000 (step 30)")
    assert by_key["figures"]["val/loss"] == ("0.5000", "0.1000") and "time/forward" not in by_key["figures"]
    assert found["first_difference"] == {"step": 20, "figure": "val/Right"}
    text = run("diff", "one", "other")[1]
    assert "figures, first at step 20 (val/Right)" in text and re.search(r"best val/Right .* \+0\.15", text)

    assert run("diff", "one", "noe")[::2] == (
        2, "dtrain diff: 'noe' is neither a run folder nor the id of a run in MLflow; did you mean 'one'?\n",
    )  # fmt: skip
    (tmp_path / "project" / "runs").mkdir(parents=True)
    shutil.copytree(tmp_path / "one", tmp_path / "project" / "runs" / "inner")
    message = "dtrain diff: project is not a run folder: it has no run.json; in it there are project/runs/inner\n"
    assert run("diff", "project", "one")[::2] == (2, message)


def test_how_far_two_runs_are_apart() -> None:
    one = {"train/loss": {1: 1.0, 2: 2.0, 3: math.nan}, "samples_per_second": {1: 5.0}}
    same = {"train/loss": {1: 1.0, 2: 2.0, 3: math.nan}, "samples_per_second": {1: 7.0}}
    assert compare_figures(one, same).is_equal and compare_figures(one, same).points == 3
    other = {"train/loss": {1: 1.0, 2: 2.5, 4: 1.0}, "val/loss": {1: 1.0}}
    found = compare_figures(one, other)
    assert (found.points, found.equal, found.first, found.largest) == (2, 1, (2, "train/loss"), 0.2)
    assert found.missing == {"train/loss": (1, 1), "val/loss": (0, 1)} and not found.is_equal
    assert compare_figures({"a": {1: 1.0}}, {"a": {1: math.nan}}).largest == math.inf
    assert not compare_figures({}, {}).is_equal


def test_ticks_are_round_and_no_peak_is_thinned_away() -> None:
    assert ticks(0.13, 0.97) == pytest.approx([0.5]) or len(ticks(0.13, 0.97)) >= 3
    assert ticks(1e-4, 2.0, is_log=True) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    points = [(float(step), 100.0 if step == 7_777 else math.sin(step)) for step in range(100_000)]
    kept = thinned(points)
    assert (7777.0, 100.0) in kept and len(kept) <= 402 and kept[0] == points[0] and kept[-1] == points[-1]


class Page(html.parser.HTMLParser):
    """What a page shows: its text, the curves of each chart, and all addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.charts: dict[str, list[tuple[str, str]]] = {}
        self.addresses: list[str] = []
        self.told: list[str] = []
        self._chart = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.addresses += [given[key] for key in ("src", "href", "xlink:href", "srcset", "action") if key in given]
        if tag == "svg":
            self._chart = given.get("data-title", "")
        if tag == "path" and self._chart:
            self.charts.setdefault(self._chart, []).append((given["class"], given["d"]))
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data: str) -> None:
        self.told.append(data)


@pytest.fixture
def two_runs(tmp_path: Path) -> Iterator[Path]:
    """Runs of 3 validations; the second has another rate, a reason with markup in it, and a picture."""
    from PIL import Image

    write_folder(tmp_path / "one")
    picture = {"kind": "image", "time": 0, "path": "pictures/worst.png", "key": "val/worst", "step": 30}
    second = write_folder(
        tmp_path / "two",
        [0.5, 0.625, 0.875],
        rate=0.2,
        state="FAILED",
        reason="a <b>tag</b> & more",
        more=[picture],
        patch=DIFF,
    )
    (second / "pictures").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(second / "pictures" / "worst.png")
    yield tmp_path


def test_a_report_holds_all_in_one_page(run: Run, two_runs: Path) -> None:
    status, out, _ = run("report", "one", "two")
    assert status == 0 and out.startswith("report.html: 2 run(s)")
    text = (two_runs / "report.html").read_text()
    page = Page(text)
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert not re.search(r"(https?:)?//\w|@import|url\(", text.partition("<body>")[0])
    right = page.charts["Right"]
    assert [kind for kind, _ in right] == ["curve val c0", "curve val c1"]
    heights = [[float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)] for _, path in right]
    # Common axes: equal values lie equally high, larger ones higher, and in proportion.
    assert heights[0][2] == heights[1][0] and heights[1][2] < heights[0][1] < heights[0][0]
    scale = (heights[0][0] - heights[0][1]) / (0.75 - 0.25)
    assert heights[0][0] - heights[1][2] == pytest.approx(scale * (0.875 - 0.25), abs=0.3)
    assert [kind for kind, _ in page.charts["loss"]] == [
        "curve val c0",
        "curve train c0",
        "curve val c1",
        "curve train c1",
    ]
    told = " ".join(page.told)
    for wanted in ("FAILED (a <b>tag</b> & more)", "optimizer.lr", "val/Right 0.8750 (step 30)", "forward 100 %",
                   "one val/Right: 0.7500 at step 20 (best)", "aaaaaaaaaaaa", "in_features: 8"):  # fmt: skip
        assert wanted in told, wanted

    status, out, _ = run("report", "one")
    assert out.startswith("one/report.html: 1 run(s)") and (two_runs / "one" / "report.html").is_file()
    assert run("report", "one", "--output", "one/config.yaml/x.html")[::2][0] == 2


def test_curves_leave_a_gap_where_a_figure_is_not_finite() -> None:
    from dtrain.reporting.curves import Curve, chart

    drawn = chart("loss", [Curve("a <run>", 0, {1: 1.0, 2: 2.0, 3: math.nan, 4: 1.5, 5: math.inf, 6: 1.0})])
    path = re.search(r'class="curve val c0" d="([^"]*)"', drawn)
    assert path is not None and re.findall("[ML]", path[1]) == ["M", "L", "M", "M"]
    assert "a &lt;run&gt;" in drawn and chart("none", [Curve("a", 0, {1: math.nan})]) == ""


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="SKIPPED, NOT TESTED HERE: chromium is not installed (apt-get install chromium)"
)
def test_a_browser_shows_the_curves_and_the_figures(run: Run, two_runs: Path) -> None:
    run("report", "one", "two")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={two_runs / 'browser'}"]  # fmt: skip
    shot = f"--screenshot={two_runs / 'page.png'}"
    for width, options in ((390, ["--dump-dom"]), (1280, [shot])):
        page = f"file://{two_runs / 'report.html'}"
        done = subprocess.run(
            [*command, f"--window-size={width},1600", *options, page], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        if width == 390:
            dom = Page(done.stdout)
    assert len(dom.charts["Right"]) == 2 and len(dom.charts["loss"]) == 4
    assert "val/Right 0.8750 (step 30)" in " ".join(dom.told)
    from PIL import Image

    with Image.open(two_runs / "page.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or ()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 0, 0)} <= colours  # both runs, and the picture


@pytest.mark.usefixtures("client_settings", "quiet_journal")
def test_mlflow_alone_knows_enough_of_a_run(run: Run, tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "somewhere" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG % (0.1, "run"))
    tags = {"dtrain.steps": "6", "dtrain.steps_per_epoch": "3", "dtrain.monitor": "val/Right", "dtrain.mode": "max"}
    write_run(
        folder, [1, 2, 3], {"trainer.max_epochs": 2}, "known-to-mlflow", tags=tags, world_size=2,
        artifacts=[("config.yaml", "config")], figures=lambda step: {"val/Right": [0, 0.5, 0.75, 0.25][step]},
    )  # fmt: skip
    assert deliver(folder, uri) == 0
    run_id = runs_in(uri, "known-to-mlflow")[0].info.run_id
    listed = json.loads(run("runs", "--tracking-uri", uri, "--json")[1])
    known = next(each for each in listed if each["run_id"] == run_id)
    assert (known["state"], known["step"], known["steps"], known["best"]) == (
        "FINISHED",
        3,
        6,
        {"step": 2, "value": 0.75},
    )
    shutil.copytree(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    status, out, _ = run("diff", run_id, "kept", "--tracking-uri", uri, "--json")
    found = json.loads(out)
    assert status == 0 and found["config"] == found["figures"] == [] and found["first_difference"] is None
    assert run("report", run_id, "--tracking-uri", uri, "--output", "page.html")[0] == 0
    assert len(Page((tmp_path / "page.html").read_text()).charts["Right"]) == 1
    wrong = run_id[::-1]
    status, _, err = run("diff", wrong, "kept", "--tracking-uri", uri)
    assert status == 2 and err.startswith(f"dtrain diff: MLflow run {wrong} in {uri}: ")
    assert run("runs", "--tracking-uri", "sqlite:///none.db")[2].startswith("dtrain runs: there is no MLflow store ")


NET = "from torch.nn import Linear\n\n\ndef Net():\n    return Linear(4, 2{})\n"
DATA = """\
from pathlib import Path

import torch


class Rows:
    def __init__(self, file):
        seed = int(Path(file).read_text())
        self.x = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.x[index].sum() > 0)
"""
PROJECT = {
    "modules": ["rerun_net", "rerun_data"],
    "device": "cpu",
    "model": {"name": "Net"},
    "loaders": {"name": "Rows", "file": "data/seed.txt", "batch_size": 4, "train": {}, "val": {}},
    "loss": {"name": "CrossEntropyLoss"},
    "optimizer": {"name": "SGD", "lr": 0.1},
    "trainer": {"max_epochs": 2, "checkpoint_dir": "runs/first", "log_every_steps": 1, "pictures": False},
    "mlflow": {"system_metrics": False},
}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_run_is_reproduced_from_its_own_code_and_the_checkout_stays_as_it_is(
    tmp_path: Path, clean_env: dict[str, str], tagged: Tagged
) -> None:
    project = tmp_path / "repository" / "project"
    (project / "data").mkdir(parents=True)
    (project / "rerun_net.py").write_text(NET.format(""))
    (project / ".gitignore").write_text("runs\ndata\n*.db*\n.*\n__pycache__\n*.yaml\n")
    git(tmp_path, "init", "-q", str(project.parent))
    git(project, "add", "rerun_net.py")
    git(project, "commit", "-qm", "one")
    (project / "rerun_net.py").write_text(NET.format(", bias=False"))  # not committed: in the stored diff
    (project / "rerun_data.py").write_text(DATA)  # which git does not know
    (project / "data" / "seed.txt").write_text("3")
    (project / "c.yaml").write_text(json.dumps(PROJECT))
    assert clean_env[TAG] == tagged.tag
    (tmp_path / "stubs" / "mlflow").mkdir(parents=True)
    (tmp_path / "stubs" / "mlflow" / "__init__.py").write_text("raise ImportError('kept out of this test')\n")
    path = os.pathsep.join([str(tmp_path / "stubs"), clean_env.get("PYTHONPATH", "")])

    def dtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
        import sys

        command = [sys.executable, "-m", "dtrain", *arguments]
        env = {**clean_env, "PYTHONPATH": path}
        return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=240)

    done = dtrain("c.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    (project / "rerun_net.py").write_text("raise RuntimeError('not the code of the run')\n")
    (project / "rerun_data.py").unlink()
    before = git(project, "status", "--porcelain", "--ignored"), git(project, "rev-parse", "HEAD")

    plan = dtrain("reproduce", "runs/first", "--dry-run")
    assert plan.returncode == 0 and "with the stored diff of 2 file(s)" in plan.stdout, plan.stderr
    assert not (project / "runs" / "first-reproduced").exists()
    done = dtrain("reproduce", "runs/first")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "reproduced: equal: all 14 figures, bit for bit" in done.stdout  # of 6 steps loss and rate, 2 validations
    assert "data: linked from" in done.stdout
    assert (git(project, "status", "--porcelain", "--ignored"), git(project, "rev-parse", "HEAD")) == before
    assert not (project.parent / ".git" / "worktrees").exists()
    assert json.loads((project / "runs/first-reproduced/reproduction.json").read_text())["verdict"] == "equal"

    (project / "runs" / "first" / "code" / "commit.txt").write_text("0" * 40)
    done = dtrain("reproduce", "runs/first", "--output", "runs/none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--repository PATH|URL" in done.stderr


@pytest.mark.parametrize(
    ("values", "status", "verdict"),
    [((0.25, 0.75, 0.5), 0, "equal"), ((0.25, 0.75, 0.5000001), 0, "close"), ((0.25, 0.7, 0.5), 1, "apart"),
     ((0.25, 0.75), 1, "apart")],
)  # fmt: skip
def test_how_a_repetition_is_judged(
    tmp_path: Path, values: Sequence[float], status: int, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(RunRecord("first", write_folder(tmp_path / "first")), tmp_path / "again")
    write_folder(plan.run_folder, values)
    assert judge(plan, 1e-5) == status
    assert json.loads((plan.folder / "reproduction.json").read_text())["verdict"] == verdict
    told = capsys.readouterr().out
    assert {"equal": "reproduced: equal: all 9 figures", "close": "reproduced to 1e-05: ",
            "apart": "not reproduced: "}[verdict] in told  # fmt: skip


def test_of_a_run_that_was_stopped_what_it_has_is_judged(tmp_path: Path) -> None:
    plan = Plan(RunRecord("first", write_folder(tmp_path / "first", [0.25], state="KILLED")), tmp_path / "again")
    write_folder(plan.run_folder, [0.25, 0.75, 0.5])
    assert judge(plan, 0) == 0


def test_a_secret_that_was_masked_is_asked_for(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one")
    (folder / "config.yaml").write_text((CONFIG % (0.1, "one")) + "loaders: {name: Rows, api_key: '***'}\n")
    message = "dtrain reproduce: loaders.api_key was masked: secrets are stored nowhere; give them as KEY=VALUE\n"
    (folder / "code" / "commit.txt").write_text("no git commit\n")
    assert run("reproduce", "one", "--dry-run")[::2] == (2, message)
    status, out, _ = run("reproduce", "one", "--dry-run", "loaders.api_key=k1")
    assert status == 0 and "the code of" in out and out.rstrip().endswith("loaders.api_key=k1")
