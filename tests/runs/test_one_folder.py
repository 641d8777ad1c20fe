"""What becomes of one run folder: trained in again, gone back in, started twice, damaged, moved; real command lines."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import WAIT_SECONDS, Place, figures, last, same_training

import dtrain
from dtrain.checkpoint.checkpoint_files import load, read_manifest
from dtrain.tracking.journal import has_figures
from dtrain.tracking.run_folder import read_run

pytestmark = pytest.mark.timeout(600)

# 8 steps per epoch; every step is saved and validated.
EACH = {
    "trainer.max_epochs": None, "trainer.max_steps": 20, "trainer.validate_every_steps": 1, "trainer.keep_last": 50,
    "trainer.monitor": "val/loss", "trainer.mode": "min", "trainer.pictures": False,
}  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run: Path, key: str) -> list[list[tuple[int, float]]]:
    """The figures of one key by start, in the order of the journal."""
    starts: list[list[tuple[int, float]]] = []
    for line in lines(run):
        if line["kind"] == "start":
            starts.append([])
        elif line["kind"] == "metrics" and key in line["values"]:
            starts[-1].append((line["step"], line["values"][key]))
    return starts


def history(place: Place, run: Path, key: str) -> set[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.folder}/mlflow.db")
    return {(item.step, item.value) for item in client.get_metric_history(read_run(run)["run_id"], key)}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


# ---------------------------------------------------------------------------------------------------------- going back


def test_going_back_is_a_branch_whose_best_last_and_figures_are_its_own(place: Place) -> None:
    config, run = place.config("back", **EACH), place.path("back")
    place.run(config, mlflow=True)
    checkpoints = run / "checkpoints"
    first = dict(logged(run, "val/loss")[0])
    assert steps(checkpoints) == list(range(1, 21)) and min(first, key=first.__getitem__) > 10
    result = place.run(
        config, f"trainer.resume={checkpoints / 'step-00000010'}", "optimizer.lr=0.001", "trainer.max_steps=15",
        mlflow=True,
    )  # fmt: skip
    assert (
        "what followed step-00000010 no longer counts as last or best: it was moved to run-back/checkpoints/branch-1"
        in (result.stdout)
    )
    assert "changed since the last start: optimizer.lr: 0.1 -> 0.001" in result.stdout
    assert steps(checkpoints) == list(range(1, 16)) and steps(checkpoints / "branch-1") == list(range(11, 21))
    assert load(checkpoints / "branch-1" / "step-00000020").state["step"] == 20, "still readable"
    # The old figures are still there, and the new ones are logged beside them, in the journal and in MLflow.
    old, new = logged(run, "val/loss")
    assert dict(old) == first and [step for step, _ in new] == list(range(11, 16))
    assert all(value != first[step] for step, value in new)
    assert history(place, run, "val/loss") == {*old, *new}
    assert history(place, run, "lr") == {(n, 0.1) for n in range(1, 21)} | {(n, 0.001) for n in range(11, 16)}
    # What counts is the way to the last step: 1 to 10 of the first start, 11 to 15 of the second.
    way = {step: value for step, value in first.items() if step <= 10} | dict(new)
    best = min(way, key=way.__getitem__)
    assert (checkpoints / "best").resolve().name == f"step-{best:08d}"
    assert last(run).state["best"] == way[best]
    assert (checkpoints / "last").resolve().name == "step-00000015"
    # The next start continues the branch, and what it repeats is not logged again.
    place.run(config, "optimizer.lr=0.001", "trainer.max_steps=17", mlflow=True)
    assert [step for step, _ in logged(run, "val/loss")[2]] == [16, 17]
    # Back to the abandoned branch: it is whole again, and the other one is put aside.
    place.run(config, f"trainer.resume={checkpoints / 'branch-1' / 'step-00000020'}", "trainer.max_steps=21")
    assert steps(checkpoints) == list(range(1, 22)) and steps(checkpoints / "branch-2") == list(range(11, 18))
    assert not list((checkpoints / "branch-1").glob("step-*"))
    assert (checkpoints / "best").resolve().name == f"step-{min(first, key=first.__getitem__):08d}" or (
        read_manifest(checkpoints / "step-00000021")["score"] < min(first.values())
    )


def test_going_back_with_the_same_settings_gives_the_same_weights_and_rotates_its_own(
    here: Callable[..., Path],
) -> None:
    settings = {**EACH, "trainer.keep_last": 3, "trainer.keep_best": 1}
    run = here("twice", **settings)
    whole = here("whole", **settings)
    early = run / "checkpoints" / "step-00000018"
    here("twice", **settings, **{"trainer.resume": str(early)})
    same_training(run, whole)
    assert steps(run / "checkpoints") == steps(whole / "checkpoints")
    assert [[step for step, _ in start] for start in logged(run, "train/loss")] == [[*range(1, 21)], [19, 20]]


def test_the_last_checkpoint_by_its_path_is_no_branch(here: Callable[..., Path]) -> None:
    run = here("same", **EACH)
    here("same", **EACH | {"trainer.resume": str(run / "checkpoints" / "last"), "trainer.max_steps": 22})
    assert not list((run / "checkpoints").glob("branch-*"))
    assert sorted(figures(run)["train/loss"]) == list(range(1, 23)), "no step twice"


# ---------------------------------------------------------------------------------------------------- a changed config

STOPPED = {"trainer.max_epochs": 2, "trainer.checkpoint_every_steps": 1, "trainer.pictures": False}


@pytest.fixture(scope="module")
def stopped(place: Place) -> str:
    """The config of a training that was stopped after step 3 of 16."""
    place.once(
        "stopped",
        lambda: place.run(place.config("stopped", **STOPPED), do="train 3 rank 0 TERM", expect=75).rc,
    )
    return str(place.folder / "stopped.yaml")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_key_that_changes_what_is_computed_stops_the_start_with_the_ways_on(
    place: Place, stopped: str, ranks: int
) -> None:
    run = place.path("stopped")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = place.run(stopped, "optimizer.lr=0.025", "seed=7", "model.norm=true", "trainer.max_epochs=9",
                       "loaders.train.size=28", "trainer.precision=bf16", ranks=ranks, expect=2)  # fmt: skip
    found = result.stderr.splitlines()
    for line in ("optimizer.lr: 0.1 -> 0.025", "seed: 0 -> 7", "model.norm: false -> true",
                 "loaders.train.size: 29 -> 28", "trainer.precision: null -> 'bf16'"):  # fmt: skip
        assert len([one for one in found if one.endswith(line)]) == 1, result.text
    assert len(found) == 6 and "Traceback" not in result.stderr
    for way in ("trainer.resume=last", "trainer.resume=none", "another trainer.checkpoint_dir"):
        assert way in found[-1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_what_a_config_only_says_in_another_way_is_no_change(
    here: Callable[..., Path], state: str, capsys: Any
) -> None:
    """Defaults written down, another order, full names, paths in another form, keys moved."""
    settings = {"optimizer": {"name": "AdamW", "lr": 1e-3}, "loaders.num_workers": 0, "trainer.max_epochs": 1}
    run = here("form", **settings)
    if state == "stopped":
        facts = read_run(run)
        (run / "run.json").write_text(json.dumps(facts | {"state": "KILLED"}))
    loaders = {
        "val": {"seed": 1, "size": 11, "name": "toy:Points", "noise": 0.0, "batch_size": 4},
        "train": {"noise": 0.1, "size": 29, "name": "Points", "batch_size": 4, "drop_last": False}, "shuffle": True,
    }  # fmt: skip
    capsys.readouterr()
    here("form", **{
        "optimizer": {"weight_decay": 0.01, "lr": 0.001, "name": "torch.optim:AdamW"}, "loaders": loaders, "seed": 0,
        "trainer.accumulate": 1, "trainer.precision": None, "trainer.max_epochs": 1, "model.dropout": 0,
        "trainer.checkpoint_dir": f"./{run.name}", "model.gives": "tensor",
    })  # fmt: skip
    out = capsys.readouterr().out
    assert "changed since the last start" not in out
    assert ("holds a finished training" in out) is (state == "finished")


def test_keys_of_how_long_how_often_where_and_how_fast_change_freely_and_are_told(place: Place) -> None:
    config = place.config("free", **STOPPED)
    place.run(config, do="train 3 rank 0 TERM", expect=75)
    result = place.run(
        config, "trainer.max_epochs=3", "trainer.validate_every_steps=4", "trainer.keep_last=5", "run_name=other",
        "trainer.time_limit=1h", "loaders.num_workers=1", "device=auto", "mlflow.exit_timeout_seconds=9",
        "trainer.pictures=true", "loaders.test={size: 5}", "trainer.early_stop_patience=99",
    )  # fmt: skip
    told = re.findall(r"changed since the last start: (.*)", result.stdout)
    assert {line.partition(":")[0] for line in told} == {
        "trainer.max_epochs", "trainer.validate_every_steps", "trainer.keep_last", "run_name", "trainer.time_limit",
        "loaders.num_workers", "device", "mlflow.exit_timeout_seconds", "trainer.pictures", "loaders.test",
        "trainer.early_stop_patience",
    }  # fmt: skip
    assert len(told) == 11 and "trainer.max_epochs: 2 -> 3" in told
    assert sorted(figures(place.path("free"))["train/loss"]) == list(range(1, 25)), "one training, no step twice"


def test_another_batch_size_per_rank_that_makes_the_same_global_batch_is_the_same_training(place: Place) -> None:
    config = place.config("batch", **STOPPED)
    place.run(config, do="train 3 rank 0 TERM", expect=75)
    assert place.run(config, ranks=2, expect=None).rc == 0, "as ever: the key is the same"
    config = place.config("batch-2", **STOPPED)
    place.run(config, do="train 3 rank 0 TERM", expect=75)
    result = place.run(config, "loaders.batch_size=2", ranks=2)
    assert "changed since the last start: loaders.batch_size: 4 -> 2" in result.stdout


PLATEAU = {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5, "threshold": 10.0}


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # Every validation from the second on halves the rate: the first of 0.1, so that 0.05 holds when it is stopped.
        (PLATEAU, {17: 0.4 * 0.5, 32: 0.4 * 0.25}),
        ({"name": "StepLR", "step_size": 1, "gamma": 0.5}, {17: 0.4 * 0.25, 32: 0.4 * 0.125}),
        (None, {17: 0.4, 32: 0.4}),
    ],
)
def test_new_optimizer_settings_hold_with_every_scheduler(
    here: Callable[..., Path], scheduler: dict[str, Any] | None, expected: dict[int, float]
) -> None:
    settings = {"lr_scheduler": scheduler, "trainer.pictures": False}
    run = here("rates", **settings)
    here("rates", **settings, **{"trainer.max_epochs": 4, "optimizer.lr": 0.4, "optimizer.momentum": 0.5,
                                 "trainer.resume": "last"})  # fmt: skip
    rates = dict(logged(run, "lr")[1])
    assert {step: rates[step] for step in expected} == pytest.approx(expected)
    (group,) = last(run).state["optimizer"]["param_groups"]
    assert group["momentum"] == 0.5


def test_last_takes_the_new_values_which_are_logged_from_there_and_stand_in_the_tags(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    config, run = place.config("retuned", **STOPPED), place.path("retuned")
    place.run(config, do="train 3 rank 0 TERM", expect=75, mlflow=True)
    result = place.run(config, "optimizer.lr=0.025", "trainer.resume=last", mlflow=True)
    assert "changed since the last start: optimizer.lr: 0.1 -> 0.025" in result.stdout
    rates = [rate for start in logged(run, "lr") for _, rate in start]
    at = last(run).state["step"]
    assert at == 16 and rates[-1] == 0.025 and rates[0] == 0.1
    uri, run_id = f"sqlite:///{place.folder}/mlflow.db", read_run(run)["run_id"]
    assert MlflowClient(uri).get_run(run_id).data.tags["optimizer.lr"] == "0.025"
    monkeypatch.chdir(place.folder)
    by_id = dtrain.load_model(run_id, tracking_uri=uri).state_dict()
    assert all(torch.equal(by_id[name], value) for name, value in load(run / "checkpoints" / "best").weights.items())
    assert "lr: 0.025" in (run / "config.yaml").read_text()
    # From now on these are its settings.
    assert "holds a finished training" in place.run(config, "optimizer.lr=0.025").stdout
    assert "optimizer.lr: 0.025 -> 0.1" in place.run(config, expect=2).stderr, "also of a finished one"


def test_a_start_that_had_computed_nothing_may_be_mended_freely(place: Place) -> None:
    config = place.config("mended", **STOPPED)
    place.run(config, do="train 1 rank 0 raise", expect=1)
    place.run(config, "optimizer.lr=0.2", "model.norm=true")
    assert set(figures(place.path("mended"))["lr"].values()) == {0.2}


# -------------------------------------------------------------------------------------------------- two starts at once

# With a lag it takes a quarter of an hour, in which others come.
SLOW = {**STOPPED, "loaders.num_workers": 1, "trainer.max_epochs": 600}

# What a test's processes are told at their start: a disk without locks, another host.
ELSEWHERE = """
import errno, fcntl, os, socket

if os.environ.get("TOY_LOCKS"):
    def flock(*arguments):
        number = getattr(errno, os.environ["TOY_LOCKS"])
        raise OSError(number, os.strerror(number))
    fcntl.flock = flock
from dtrain.tracking import run_lock
run_lock.BEAT_SECONDS, run_lock.STALE_SECONDS = 0.2, float(os.environ.get("TOY_STALE", "10000"))
if host := os.environ.get("TOY_HOST"):
    socket.gethostname = lambda: host
    run_lock._process_table = lambda: host
"""


def elsewhere(place: Place, **variables: str) -> dict[str, str]:
    """The environment of a process on another host or disk."""
    folder = place.write("elsewhere/sitecustomize.py", ELSEWHERE).parent
    return {"PYTHONPATH": f"{folder}:{place.folder / 'stubs'}", **variables}


def begun(place: Place, name: str, **options: Any) -> Any:
    """A training that takes its time, after its first figures."""
    running = place.start(place.config(name, **SLOW), do="train all rank 0 lag", **options)
    end = time.monotonic() + WAIT_SECONDS
    while not has_figures(place.path(name)):
        assert time.monotonic() < end and running[0].process.poll() is None, running[0].output().text
        time.sleep(0.05)
    return running[0]


def refusal(place: Place, name: str, pid: int, host: str = socket.gethostname()) -> str:
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    return rf"run-{name} is being written by another training \(process {pid} on {host}, since {since}\)"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        pytest.param({"TOY_LOCKS": "ENOLCK"}, marks=pytest.mark.soak),
        {"TOY_LOCKS": "EOPNOTSUPP", "TOY_HOST": "nodeA"},
    ],
)
def test_a_second_start_is_refused_with_who_holds_the_folder_and_all_else_works_beside(
    place: Place, variables: dict[str, str]
) -> None:
    name = f"held-{len(variables)}"
    env = elsewhere(place, **variables)
    first = begun(place, name, env=env)
    config = str(place.folder / f"{name}.yaml")
    expected = refusal(place, name, first.pid, variables.get("TOY_HOST", socket.gethostname()))
    others = env | ({"TOY_HOST": "nodeB"} if "TOY_HOST" in env else {})
    second = [
        place.start(config, "trainer.resume=none", env=others), place.start(config, env=others, ranks=2),
        place.start(config, "optimizer.lr=7", env=others),
    ]  # fmt: skip
    beside = [place.start(*words, env=others) for words in (
        ["test", config, "loaders.test={size: 5}"], ["check", config],
    )]  # fmt: skip
    for running in second:
        for result in (one.result(WAIT_SECONDS) for one in running):
            assert result.rc == 2 and "Traceback" not in result.stderr, result.text
        assert re.search(expected, running[0].output().stderr), running[0].output().text
        assert len(running[0].output().stderr.splitlines()) == 1
    for running in beside:
        assert running[0].result(WAIT_SECONDS).rc == 0, running[0].output().text
    os.kill(first.pid, signal.SIGTERM)
    assert first.result(WAIT_SECONDS).rc == 75
    assert not list(place.folder.glob(f"run-{name}-*")), "moved away under the one that ran"
    done = last(place.path(name)).state["step"]
    assert sorted(figures(place.path(name))["train/loss"]) == list(range(1, done + 1))
    assert not (place.path(name) / ".training.lock").exists()


@pytest.mark.parametrize(
    ("resume", "locks"),
    [
        ("auto", "ENOLCK"),
        ("none", ""),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in (("auto", ""), ("none", "ENOLCK"))),
    ],
)
def test_of_several_starts_in_the_same_moment_one_trains(place: Place, resume: str, locks: str) -> None:
    name = f"race-{resume}-{locks}"
    config = place.config(name, **STOPPED)
    if resume == "none":
        place.run(config)
    hold = place.folder / f"{name}.hold"  # the one that trains does not end before the others have come
    hold.touch()
    env, end = elsewhere(place, TOY_LOCKS=locks, TOY_HOLD=str(hold)), time.monotonic() + WAIT_SECONDS
    started = [place.start(config, f"trainer.resume={resume}", do="train 1 rank 0 wait", env=env)[0] for _ in range(4)]
    while sum(one.process.poll() is None for one in started) > 1:
        assert time.monotonic() < end, "".join(one.output().text for one in started)
        time.sleep(0.05)
    hold.unlink()
    results = [one.result(WAIT_SECONDS) for one in started]
    assert sorted(one.rc for one in results) == [0, 2, 2, 2], "".join(one.text for one in results)
    for one in results:
        assert one.rc == 0 or re.search("is being written by another training|was written by another", one.stderr)
    assert sorted(figures(place.path(name))["train/loss"]) == list(range(1, 17))
    assert len(list(place.folder.glob(f"run-{name}-*"))) == (resume == "none"), "what was there is moved once"


@pytest.mark.parametrize("variables", [{}, {"TOY_LOCKS": "ENOLCK"}, {"TOY_HOST": "nodeA", "TOY_STALE": "2"}])
def test_the_lock_of_one_that_was_killed_is_taken_over(place: Place, variables: dict[str, str]) -> None:
    """Here without waiting for a heart to stop, of which the test has no time; from another host after that."""
    name = f"killed-{'-'.join(variables)}"
    first = begun(place, name, env=elsewhere(place, **variables))
    os.kill(first.pid, signal.SIGKILL)
    first.result(WAIT_SECONDS)
    assert (place.path(name) / ".training.lock").exists()
    others = variables | ({"TOY_HOST": "nodeB"} if "TOY_HOST" in variables else {})
    place.run(str(place.folder / f"{name}.yaml"), "trainer.max_epochs=2", env=elsewhere(place, **others))
    assert sorted(figures(place.path(name))["train/loss"]) == list(range(1, 17))


def test_a_launchers_second_start_is_refused_before_it_writes_a_log(place: Place) -> None:
    first = begun(place, "launched")
    log = (place.path("launched") / "logs" / "rank-0.log").read_bytes()
    result = place.run("launch", str(place.folder / "launched.yaml"), "--nproc-per-node", "1", expect=2)
    assert re.search(refusal(place, "launched", first.pid), result.stderr), result.text
    os.kill(first.pid, signal.SIGTERM)
    assert first.result(WAIT_SECONDS).rc == 75
    assert (place.path("launched") / "logs" / "rank-0.log").read_bytes().startswith(log)


@pytest.mark.parametrize("words", [["train"], ["check"], ["launch"]])
def test_a_run_folder_that_cannot_be_made_is_one_line_with_its_key(place: Place, words: list[str]) -> None:
    config = place.config("nowhere", **{"trainer.checkpoint_dir": "/proc/none"})
    result = place.run(*words, config, expect=2)
    (line,) = result.stderr.splitlines()
    assert "trainer.checkpoint_dir: /proc/none cannot be written: No such file or directory: /proc" in line
    if words != ["launch"]:
        assert re.match(r".*nowhere\.yaml:\d+:\d+: ", line)


# ------------------------------------------------------------------------------------------- damaged, emptied, moved


def test_where_all_checkpoints_are_damaged_nothing_begins_and_what_can_be_saved_is_named(place: Place) -> None:
    config, run = place.config("damaged", **{**STOPPED, "trainer.keep_last": 9}), place.path("damaged")
    place.run(config, do="train 3 rank 0 TERM", expect=75)
    folders = sorted((run / "checkpoints").glob("step-*"))
    for number, folder in enumerate(folders):
        file = folder / ("state.pt" if number else "manifest.json")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    weights = folders[1] / "model.safetensors"
    (folders[2] / "model.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "sender.log"}
    named = f"trainer.resume={run}/checkpoints/last"  # the link to it is as it was
    assert "damaged" in place.run(config, named, expect=2).stderr.splitlines()[-1]
    for more in ([], ["trainer.resume=last"], [f"trainer.resume={run}"], ["trainer.max_epochs=7"]):
        result = place.run(config, *more, expect=2)
        line = result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        if f"trainer.resume={run}" not in more:
            for number, folder in enumerate(folders):
                assert f"{folder.name}/{'state.pt' if number else 'manifest.json'}: damaged" in line
            assert f"trainer.pre_trained=run-damaged/checkpoints/{folders[0].name}/model.safetensors" in line
            assert f"(also run-damaged/checkpoints/{folders[1].name}/model.safetensors)" in line
            assert "trainer.resume=none begins again; it moves this folder aside and removes nothing" in line
    assert {path: path.read_bytes() for path in before} == before
    assert place.run("test", config, f"--checkpoint={weights}", "loaders.test={size: 5}").rc == 0
    place.run(config, f"trainer.pre_trained={weights.relative_to(place.folder)}", "trainer.resume=none")
    (aside,) = place.folder.glob("run-damaged-*")
    assert {aside / path.relative_to(run): content for path, content in before.items()} == {
        path: path.read_bytes() for path in aside.rglob("*") if path.is_file() and path.name != "sender.log"
    }


@pytest.mark.parametrize("content", ["", pytest.param("{", marks=pytest.mark.soak)])
def test_an_empty_run_json_makes_no_second_run(place: Place, content: str) -> None:
    from mlflow import MlflowClient

    name = f"emptied-{len(content)}"
    config, run = place.config(name, experiment=name, **STOPPED), place.path(name)
    place.run(config, do="train 3 rank 0 TERM", expect=75, mlflow=True)
    facts = read_run(run)
    (run / "run.json").write_text(content)
    place.run(config, mlflow=True)
    assert {key: read_run(run)[key] for key in ("run_id", "id", "run_name", "started", "attempt")} == {
        **{key: facts[key] for key in ("run_id", "id", "run_name", "started")}, "attempt": 2,
    }  # fmt: skip
    # What MLflow has acknowledged is lost, too: by its own id the run is found.
    (run / "run.json").write_text(content)
    (run / "mlflow.json").unlink()
    assert "holds a finished training" in place.run(config).stdout, "the journal knows that it had ended"
    place.run(config, "trainer.max_epochs=3", mlflow=True)
    client = MlflowClient(f"sqlite:///{place.folder}/mlflow.db")
    (only,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert only.info.run_id == facts["run_id"] == read_run(run)["run_id"]
    assert history(place, run, "train/loss") == set(figures(run)["train/loss"].items())


def disturbed(place: Place, name: str, disturb: Callable[[Path], Any], told: str) -> tuple[str, int]:
    """A training whose folder is disturbed once MLflow has its run, and stopped after that was told; and its steps."""
    config = place.config(name, experiment=name, **{**SLOW, "trainer.keep_last": 999})
    running, run = place.start(config, do="train all rank 0 lag", mlflow=True)[0], place.path(name)

    def wait(until: Callable[[], Any]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not until():
            assert time.monotonic() < end and running.process.poll() is None, running.output().text
            time.sleep(0.05)

    wait(lambda: (run / "checkpoints" / "step-00000003").exists() and read_run(run).get("run_id"))
    disturb(run)
    wait(lambda: told in running.output().stdout)
    os.kill(running.pid, signal.SIGTERM)
    result = running.result(WAIT_SECONDS)
    assert result.rc == 75 and result.stdout.count(told) == 1, result.text
    return result.stdout, last(run).state["step"]


def check_whole(place: Place, run: Path, name: str, done: int) -> None:
    """The run is in this folder with all that a run has, and it is one run in MLflow, which has all figures."""
    from mlflow import MlflowClient

    assert sorted(figures(run)["train/loss"]) == list(range(1, done + 1))
    assert (read_run(run)["state"], last(run).state["step"]) == ("KILLED", done)
    assert (run / "config.yaml").exists() and not (run / ".training.lock").exists()
    place.run("sync", str(run), mlflow=True)  # on a busy machine the end of the training does not wait for all of it
    client = MlflowClient(f"sqlite:///{place.folder}/mlflow.db")
    (only,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert only.info.run_id == read_run(run)["run_id"] and only.info.status == "KILLED"
    assert history(place, run, "train/loss") == set(figures(run)["train/loss"].items())


def test_a_run_folder_that_is_renamed_in_mid_run_stays_whole_under_its_new_name(place: Place) -> None:
    new = place.folder / "run-new-name"
    told = f"the run folder was renamed to {new} in mid-run: it continues there, and run-old-name is a link to it"
    _, done = disturbed(place, "old-name", lambda run: run.rename(new), told)
    assert place.path("old-name").is_symlink() and place.path("old-name").resolve() == new.resolve()
    check_whole(place, new, "old-name", done)
    assert steps(new / "checkpoints") == list(range(1, done + 1))
    assert "status: KILLED" in (new / "logs" / "rank-0.log").read_text()
    place.run(str(place.folder / "old-name.yaml"), f"trainer.checkpoint_dir={new}", f"trainer.max_steps={done + 1}")
    assert last(new).state["step"] == done + 1


def test_a_run_folder_that_is_removed_in_mid_run_is_made_again_with_what_is_known(place: Place) -> None:
    def remove(run: Path) -> None:
        while subprocess.run(["rm", "-rf", str(run)], check=False, capture_output=True).returncode:
            pass  # something was written there meanwhile

    told = (
        "the run folder run-removed was removed in mid-run: made again, with the journal and what is saved from now on"
    )
    _, done = disturbed(place, "removed", remove, told)
    check_whole(place, place.path("removed"), "removed", done)


def test_a_run_folder_whose_name_another_training_took_is_left_to_that_one(place: Place) -> None:
    new, other = place.folder / "run-taken-away", place.folder / "run-taken-by"
    running = begun(place, "taken")
    other.mkdir()
    for file in (".training.lock", "run.json"):  # as another training's
        shutil.copy(place.path("taken") / file, other)
    place.path("taken").rename(new)
    other.rename(place.path("taken"))
    result = running.result(WAIT_SECONDS)
    assert result.rc == 1
    assert (
        f"run-taken was renamed to {new} in mid-run, and cannot be kept whole: another training has begun"
        in result.stderr
    )
    assert f"continue it with trainer.checkpoint_dir={new}" in result.stderr
    assert read_run(place.path("taken"))["state"] == "RUNNING", "the other one's"
    assert read_run(new)["state"] == "FAILED"
    place.run(str(place.folder / "taken.yaml"), f"trainer.checkpoint_dir={new}", "trainer.max_epochs=2")
    assert sorted(figures(new)["train/loss"])[:16] == list(range(1, 17))


def test_scores_of_another_metric_are_not_compared_with_those_of_before(here: Callable[..., Path]) -> None:
    """Of val/loss, about 0.5 at the end, a lower one is better; of val/Right, about 0.9, a higher one."""
    settings = {**EACH, "trainer.max_steps": 8}
    run = here("scores", **settings)
    more = {"trainer.monitor": "val/Right", "trainer.mode": "max", "trainer.resume": "last"}
    here("scores", **settings | more | {"trainer.max_steps": 12})
    here("scores", **settings | more | {"trainer.resume": "auto", "trainer.max_steps": 16})
    scores = {step: score for step, score in figures(run)["val/Right"].items() if step > 8}
    best = max(scores, key=scores.__getitem__)
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert last(run).state["best"] == scores[best]
