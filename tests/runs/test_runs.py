"""Whole trainings through the real command line, on 1, 2 and 4 gloo ranks: same results, exact resume, one run."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import (
    ACCELERATE,
    EXACT,
    TORCHRUN,
    WAIT_SECONDS,
    Place,
    close,
    equal,
    figures,
    last,
    same_training,
)

from dtrain.checkpoint.checkpoint_files import load
from dtrain.data.samplers import ShuffledShard
from dtrain.tracking.run_folder import read_run

pytestmark = pytest.mark.timeout(900)  # several command lines each, which start slowly on a busy machine

# ------------------------------------------------------------------------------ same result, however it was started

SAME = {
    "loaders.train.size": 50, "loaders.val.size": 21, "loaders.test": {"size": 13, "seed": 2},
    "loss.name": "Terms", "optimizer": {"name": "AdamW", "lr": 0.01},
    "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step", "warmup_steps": 3},
    "trainer.clip_grad_norm": 0.5,
}  # fmt: skip
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1x12": ({"loaders.batch_size": 12}, {}),
    "1x4x3": ({"loaders.batch_size": 4, "trainer.accumulate": 3, "loaders.num_workers": 2}, {}),
    "2x2x3": (
        {"loaders.batch_size": 2, "trainer.accumulate": 3, "loaders.num_workers": 2},
        {"launcher": [*TORCHRUN, "--nproc_per_node=2"]},
    ),
    "4x1x3": ({"loaders.batch_size": 1, "trainer.accumulate": 3}, {"ranks": 4, "cold": True}),
    "2 of 12": ({"loaders.batch_size": None, "loaders.global_batch_size": 12}, {"ranks": 2}),
}


@pytest.fixture(scope="module")
def ways(place: Place) -> Callable[[str], Path]:
    """One training, done in each of WAYS: ranks x batch per rank x batches accumulated."""

    def way(name: str) -> Path:
        settings, options = WAYS[name]
        file = name.replace(" ", "-")
        env = {"TOY_AUDIT": str(place.folder / f"audit-{file}.txt")}
        place.once(file, lambda: place.run(place.config(file, **SAME, **settings), env=env, **options).rc)
        return place.path(file)

    return way


@pytest.mark.parametrize("name", list(WAYS)[1:])
def test_losses_do_not_depend_on_how_the_global_batch_is_divided(name: str, ways: Callable[[str], Path]) -> None:
    expected, found = figures(ways("1x12")), figures(ways(name))
    assert len(expected["train/loss"]) == 10, "5 steps per epoch, the last of 2 samples"
    assert {"train/loss_ce", "train/loss_size", "val/loss", "val/Right", "test/loss", "lr", "grad_norm"} <= set(
        expected
    )
    close(found, expected)
    assert found["lr"] == expected["lr"], "a schedule counts optimizer steps, on any number of ranks"


def test_the_last_batch_of_an_epoch_leaves_ranks_without_samples_and_the_weights_the_same(
    ways: Callable[[str], Path],
) -> None:
    expected, found = last(ways("1x12")), last(ways("4x1x3"))
    for name, value in expected.weights.items():
        assert torch.allclose(found.weights[name], value, rtol=1e-4, atol=1e-6), name
    assert read_run(ways("4x1x3"))["world_size"] == 4


def test_only_rank_0_writes_in_the_run_folder_and_only_its_sender_imports_mlflow(
    ways: Callable[[str], Path], place: Place
) -> None:
    for name in ("4x1x3", "2x2x3"):
        ways(name)
        lines = [line.split("\t") for line in (place.folder / f"audit-{name}.txt").read_text().splitlines()]
        writers = {who for who, event, _ in lines if event != "import"}
        importers = {who for who, event, _ in lines if event == "import"}
        assert writers == {"0 rank", "0 sender"}
        assert importers == {"0 sender"}
        assert {"model.safetensors", "metrics.jsonl"} <= {Path(path).name for who, _, path in lines if who == "0 rank"}


# ------------------------------------------------------------------------------------------------------ exact resume


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> Path:
    """Two ranks, 29 samples in steps of 8: 4 steps per epoch, the last of 5 samples in two batches."""
    place.once("whole", lambda: place.run(place.config("whole", **EXACT), ranks=2, cold=True).rc)
    return place.path("whole")


@pytest.fixture(scope="module")
def sittings(place: Place) -> list[dict[str, Any]]:
    """The same training in five sittings. In the second and the third of them MLflow is missing.

    A signal is seen by all ranks one step after it came. Two calls of the model make a step.
    """
    return place.once("parts", lambda: five_sittings(place))


def five_sittings(place: Place) -> list[dict[str, Any]]:
    config = place.config("parts", experiment="parts", **EXACT)
    more = "trainer.checkpoint_every_steps=1"
    plan: list[tuple[str, list[int | None], list[str]]] = [
        ("train 5 rank 1 TERM", [75, 75], []),  # in step 3; all stop after step 4, the epoch's last
        ("train 1 rank 0 INT", [75, 75], []),  # in step 5; all stop after step 6, in mid-epoch
        ("train 5 rank 1 KILL", [1, -9], [more]),  # in step 9
        ("eval 1 rank 0 KILL", [-9, 1], [more]),  # when epoch 3 is validated, after step 12
        ("", [0, 0], []),
    ]
    found = []
    for number, (do, expected, overrides) in enumerate(plan):
        mlflow = number in (0, 3, 4)
        running = place.start(config, *overrides, ranks=2, do=do, mlflow=mlflow)
        results = [one.result(WAIT_SECONDS) for one in running]
        wait_for_sender(place)
        facts = read_run(place.path("parts"))
        found.append({"rc": [one.rc for one in results], "step": last(place.path("parts")).state["step"], **facts})
        assert found[-1]["rc"] == expected, "".join(one.text for one in results)
        if number == 0:
            found[-1]["in MLflow"] = mlflow_run(place, facts["run_id"]).info.status
    return found


def wait_for_sender(place: Place) -> None:
    """A killed rank 0 leaves the last word to its sender."""
    assert place.tagged.wait_gone(200), place.tagged.command_lines()


def mlflow_run(place: Place, run_id: str) -> Any:
    return mlflow_client(place).get_run(run_id)


def mlflow_client(place: Place) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{place.folder}/mlflow.db")


def test_each_sitting_ends_as_it_should(sittings: list[dict[str, Any]]) -> None:
    steps = [sitting["step"] for sitting in sittings]
    # Checkpoints are written beside the training: that of step 12 may be on its way yet when rank 0 is killed.
    assert steps[:3] == [4, 6, 8] and steps[3] in (11, 12) and steps[4] == 12
    assert [sitting["state"] for sitting in sittings] == ["KILLED", "KILLED", "FAILED", "FAILED", "FINISHED"]
    assert [sitting["exit_status"] for sitting in sittings[:2]] == [75, 75]
    assert "SIGTERM" in sittings[0]["reason"] or "another rank" in sittings[0]["reason"]
    assert "SIGINT" in sittings[1]["reason"]
    assert sittings[3]["reason"] == "rank 0 exited without reporting an error"
    assert sittings[4]["exit_status"] == 0 and sittings[4]["reason"] == ""


def test_a_training_in_five_sittings_ends_with_the_weights_of_one_in_one(
    sittings: list[dict[str, Any]], uninterrupted: Path, place: Place
) -> None:
    same_training(place.path("parts"), uninterrupted)


def test_a_training_in_five_sittings_has_the_figures_of_one_in_one(
    sittings: list[dict[str, Any]], uninterrupted: Path, place: Place
) -> None:
    expected = figures(uninterrupted)
    assert sorted(expected["train/loss"]) == [3, 4, 6, 8, 9, 12]
    assert sorted(expected["val/loss"]) == [4, 8, 12]
    assert figures(place.path("parts")) == expected


def test_a_training_in_five_sittings_is_one_run_in_mlflow(sittings: list[dict[str, Any]], place: Place) -> None:
    assert len({sitting["run_id"] for sitting in sittings}) == 1
    assert sittings[0]["in MLflow"] == "KILLED"
    run = mlflow_run(place, sittings[0]["run_id"])
    assert run.info.status == "FINISHED"
    client = mlflow_client(place)
    (only,) = client.search_runs([client.get_experiment_by_name("parts").experiment_id])
    assert only.info.run_id == run.info.run_id
    for key, values in figures(place.path("parts")).items():
        history = client.get_metric_history(run.info.run_id, key)
        assert {item.step: item.value for item in history} == values
        assert len(history) == len(values)


@pytest.mark.parametrize("steps", [(1, 5, 8), pytest.param(tuple(range(1, 10)), marks=pytest.mark.soak)])
def test_a_stop_at_any_step_of_an_epoch_changes_nothing(
    here: Callable[..., Path], steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, in one process: 8 steps per epoch, and one beyond."""
    settings = EXACT | {"trainer.accumulate": 1, "loaders.batch_size": 4, "trainer.max_epochs": 2}
    whole = here("whole", **settings)
    assert last(whole).state["step"] == 16
    for step in steps:
        monkeypatch.setenv("TOY_DO", f"train {step} rank 0 TERM")
        stopped = here(f"stop-{step}", expect="KILLED", **settings)
        assert last(stopped).state["step"] == step
        monkeypatch.setenv("TOY_DO", "")
        here(f"stop-{step}", **settings)
        same_training(stopped, whole)
        assert figures(stopped) == figures(whole)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_going_on_with_another_number_of_ranks_covers_the_rest_of_the_epoch(place: Place, ranks: int) -> None:
    seen = place.folder / f"seen-{ranks}"
    settings = {"loaders.train": {"size": 26}, "loaders.val": None, "metrics": None, "trainer.max_epochs": 1}
    config = place.config(f"from-2-to-{ranks}", **settings)
    counted = []
    for options in ({"ranks": 2, "do": "train 1 rank 0 USR1", "expect": 75}, {"ranks": ranks}):
        seen.mkdir()
        place.run(config, env={"TOY_SEEN": str(seen)}, **options)
        counted.append([int(line) for file in seen.iterdir() for line in file.read_text().split()])
        shutil.rmtree(seen)
    state = last(place.path(f"from-2-to-{ranks}")).state
    assert len(counted[0]) >= 16, "two steps of two times four samples, and what was loaded ahead"
    assert len(counted[1]) == 10 and state["step"] == 2 + 2, "of eight samples, as on two ranks"
    rest = set(counted[1])
    assert len(rest) == 10
    assert sorted(set(counted[0]) | rest) == list(range(26))


# --------------------------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    """Two ranks under torchrun, torchmetrics, a test, everything delivered to MLflow."""
    config = place.config(
        "done", **{
            "metrics": {"name": ["Accuracy", "F1Score"], "task": "multiclass", "num_classes": 3,
                        "F1Score": {"average": "none"}},
            "loaders.test": {"size": 5, "seed": 3}, "trainer.monitor": "val/Accuracy", "trainer.log_every_steps": 2,
            "optimizer": {"name": "AdamW", "lr": 0.02, "betas": [0.9, 0.98]}, "seed": 3,
        },
    )  # fmt: skip
    launcher = [*TORCHRUN, "--nproc_per_node=2"]
    place.once("done", lambda: place.run(config, "trainer.max_epochs=3", launcher=launcher, mlflow=True).rc)
    return place.path("done")


def test_a_finished_run_is_one_run_with_all_its_params(finished: Path, place: Place) -> None:
    facts = read_run(finished)
    assert (facts["state"], facts["world_size"], facts["exit_status"]) == ("FINISHED", 2, 0)
    run = mlflow_run(place, facts["run_id"])
    assert run.info.status == "FINISHED"
    expected = {
        "seed": "3", "model.name": "MLP", "optimizer.lr": "0.02", "optimizer.betas.1": "0.98",
        "trainer.max_epochs": "3", "metrics.name.0": "Accuracy", "metrics.F1Score.average": "none",
        "loaders.train.size": "29",
    }  # fmt: skip
    assert {key: run.data.params.get(key) for key in expected} == expected
    assert {"host", "world_size", "mlflow.runName"} <= run.data.tags.keys()
    assert run.data.tags["world_size"] == "2"


def test_a_finished_run_has_every_figure_at_its_step(finished: Path, place: Place) -> None:
    client, run_id = mlflow_client(place), read_run(finished)["run_id"]
    found = {
        key: sorted(item.step for item in client.get_metric_history(run_id, key))
        for key in mlflow_run(place, run_id).data.metrics
        if not key.startswith("time/")
    }
    # 29 samples, 8 per step: 4 steps per epoch.
    train, val, test = [2, 4, 6, 8, 10, 12], [4, 8, 12], [12]
    expected = dict.fromkeys(("train/loss", "lr", "samples_per_second"), train)
    for phase, steps in (("val", val), ("test", test)):
        expected |= dict.fromkeys(
            (f"{phase}/{name}" for name in ("loss", "Accuracy", "F1Score", "F1Score_0", "F1Score_1", "F1Score_2")),
            steps,
        )
    assert found == expected
    for key, values in figures(finished).items():
        history = {item.step: item.value for item in client.get_metric_history(run_id, key)}
        assert history == values


def test_a_finished_run_has_its_config_its_best_weights_and_the_codes_state(finished: Path, place: Place) -> None:
    client, run_id = mlflow_client(place), read_run(finished)["run_id"]

    def files(folder: str = "") -> list[str]:
        items = client.list_artifacts(run_id, folder or None)
        return [path for item in items for path in (files(item.path) if item.is_dir else [item.path])]

    found = files()
    assert "config/config.yaml" in found
    assert "config/as-written/done.yaml" in found
    assert any(path.startswith("code/") for path in found)
    (weights,) = [path for path in found if path.endswith(".safetensors")]
    fetched = Path(client.download_artifacts(run_id, weights, str(place.folder)))
    best = finished / "checkpoints" / "best" / "model.safetensors"
    assert sha256(fetched) == sha256(best)
    resolved = (finished / "config.yaml").read_text()
    assert "max_epochs: 3" in resolved
    assert json.loads((finished / "config" / "done.yaml").read_text())["trainer"]["max_epochs"] == 2


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Of each file its SHA-256: a comparison that fails shows names, not megabytes."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_the_best_checkpoint_is_the_one_with_the_best_score(finished: Path) -> None:
    scores = figures(finished)["val/Accuracy"]
    best = load(finished / "checkpoints" / "best").manifest
    assert best["score"] == pytest.approx(max(scores.values()))
    assert best["step"] == min(step for step, score in scores.items() if score == max(scores.values()))


def test_best_is_known_also_where_every_step_is_saved(here: Callable[..., Path]) -> None:
    run = here("each", **{"trainer.checkpoint_every_steps": 1, "trainer.monitor": "val/loss"})
    scores = figures(run)["val/loss"]
    assert load(run / "checkpoints" / "best").manifest["score"] == pytest.approx(min(scores.values()))


def test_an_exception_in_the_model_is_shown_and_the_failed_run_goes_on_by_its_id(place: Place) -> None:
    config = place.config("broken", **{"trainer.checkpoint_every_steps": 1})
    result = place.run(config, do="train 3 rank 0 raise", expect=1, mlflow=True)
    assert "RuntimeError: the toy is broken" in result.stderr
    facts = read_run(place.path("broken"))
    assert (facts["state"], facts["exit_status"]) == ("FAILED", 1)
    assert facts["reason"] == "RuntimeError: the toy is broken"
    run = mlflow_run(place, facts["run_id"])
    assert run.info.status == "FAILED"
    assert "train/loss" in run.data.metrics
    # The same training goes on from anywhere by its MLflow run id.
    place.run(config, f"trainer.resume={facts['run_id']}", "trainer.checkpoint_dir=by-its-id", mlflow=True)
    assert not (place.folder / "by-its-id").exists()
    assert last(place.path("broken")).state["epoch"] == 2
    assert read_run(place.path("broken"))["state"] == "FINISHED"
    assert mlflow_run(place, facts["run_id"]).info.status == "FINISHED"


# --------------------------------------------------------------------------------------------------------- launchers


def test_two_ranks_asked_for_and_one_got_is_refused(place: Place) -> None:
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    result = place.run(place.config("lonely"), launcher=launcher, expect=None)
    assert result.rc != 0
    assert "accelerate was asked for 2 processes, but started one" in result.stderr
    assert "accelerate launch --multi_gpu --num_processes 2" in result.stderr
    assert not place.path("lonely").exists()


def test_accelerate_launch_gives_two_gloo_ranks_and_the_same_training(
    place: Place, ways: Callable[[str], Path]
) -> None:
    """There it wraps the model, elsewhere torch does."""
    launcher = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    config = place.config("accelerated", **SAME, **{"loaders.batch_size": 6})
    result = place.run(config, launcher=launcher)
    assert read_run(place.path("accelerated"))["world_size"] == 2
    assert "global batch: 12 = 6 x 2 rank(s)" in result.stdout
    close(figures(place.path("accelerated")), figures(ways("1x12")))


# ----------------------------------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_finite_weights(place: Place, rank: int) -> None:
    name = f"nan-{rank}"
    config = place.config(name, **{"trainer.checkpoint_every_steps": 1})
    running = place.start(config, ranks=2, do=f"train 3 rank {rank} nan")
    results = [one.result(WAIT_SECONDS) for one in running]
    assert [one.rc for one in results] == [1, 1]
    logs = [(place.path(name) / "logs" / f"rank-{number}.log").read_text() for number in (0, 1)]
    assert all("NonFiniteError: step 3" in log for log in logs) and "NonFiniteError: step 3" in results[0].stderr
    saved = last(place.path(name))
    assert saved.state["step"] == 2
    assert all(value.isfinite().all() for value in saved.weights.values())
    assert read_run(place.path(name))["state"] == "FAILED"
    card = json.loads((place.path(name) / "failure.json").read_text())
    (samples,) = ShuffledShard(29, 0, rank, 2, 4).batches_from(0, 16, 1)  # of its third step
    assert (card["rank"], card["samples"]) == (rank, samples)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(place: Place) -> None:
    changes = {"trainer.on_nonfinite": "skip", "optimizer": {"name": "AdamW", "lr": 0.01}}
    # A running mean, and an average of it, which that step's forward spoils; rank 0's is everybody's.
    config = place.config("skip", **changes, **{"model.norm": True, "trainer.ema_decay": 0.9})
    result = place.run(config, ranks=2, do="train 3 rank 0 nan")
    assert "step 3: loss or gradient not finite" in result.stdout
    found = figures(place.path("skip"))
    assert sorted(set(range(1, 9)) - set(found["train/loss"])) == [3]
    assert found["skipped_steps"] == dict.fromkeys(range(3, 9), 1.0)
    assert all(math.isfinite(value) for value in found["val/loss"].values()) and found["val/loss"]
    saved = last(place.path("skip"))
    assert all(value.isfinite().all() for value in saved.weights.values())
    assert saved.state["step"] == 8 and saved.state["skipped"] == 1
    (steps,) = {int(item["step"]) for item in saved.state["optimizer"]["state"].values()}
    assert steps == 7


# ------------------------------------------------------------------------- settings, on one rank and in this process


def test_a_checkpoint_every_step_changes_nothing(here: Callable[..., Path]) -> None:
    plain = here("plain", **EXACT)
    saving = here("saving", **EXACT, **{"trainer.checkpoint_every_steps": 1})
    same_training(plain, saving)
    assert figures(plain) == figures(saving)


def test_two_trainings_with_one_seed_are_alike_and_with_another_are_not(here: Callable[..., Path]) -> None:
    same_training(here("one", **EXACT), here("two", **EXACT | {"loaders.num_workers": 0}))
    assert figures(here("other", **EXACT, seed=1)) != figures(here("one", **EXACT, **{"trainer.resume": "none"}))


def test_gradients_are_clipped_and_their_norm_is_logged(here: Callable[..., Path]) -> None:
    settings = {"loaders.train": {"size": 29}, "trainer.max_steps": 1}
    step = {}
    for clip in (1e-3, 1e6):
        run = here(f"clip-{clip}", **settings, **{"trainer.clip_grad_norm": clip, "optimizer.lr": 0.0})
        before = last(run).weights
        run = here(f"clip-{clip}-2", **settings, **{"trainer.clip_grad_norm": clip, "optimizer.lr": 1.0})
        moved = torch.cat([(value - before[name]).flatten() for name, value in last(run).weights.items()])
        step[clip] = float(moved.norm()), figures(run)["grad_norm"][1]
    assert step[1e-3][0] == pytest.approx(1e-3, rel=1e-2)
    assert step[1e6][0] == pytest.approx(step[1e6][1], rel=1e-4)
    assert step[1e-3][1] == step[1e6][1] > 0.1, "what is logged is the norm before clipping"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_about_as_well(here: Callable[..., Path], precision: str) -> None:
    settings = {"trainer.max_epochs": 4, "optimizer.lr": 0.3}
    full = figures(here("full", **settings))
    run = here("half", **settings, **{"trainer.precision": precision})
    half = figures(run)
    assert half["train/loss"].keys() == full["train/loss"].keys()
    assert half["val/loss"][32] == pytest.approx(full["val/loss"][32], rel=0.03)
    assert half != full
    assert {value.dtype for value in last(run).weights.values()} == {torch.float32}
    assert bool(last(run).state["scaler"]) is (precision == "fp16")


def test_fp16_resumes_with_its_scaler(here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EXACT | {"trainer.precision": "fp16", "loaders.num_workers": 0}
    whole = here("whole", **settings)
    monkeypatch.setenv("TOY_DO", "train 7 rank 0 TERM")
    here("parts", expect="KILLED", **settings)
    monkeypatch.setenv("TOY_DO", "")
    same_training(here("parts", **settings), whole)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.gives": "tuple"}, None),
        ({"model.gives": "dict"}, None),
        ({"model.name": "TwoInputs", "loaders.form": "several"}, None),
        ({"model.name": "TwoInputs", "loaders.form": "dict"}, None),
        ({"loaders.form": "keys", "trainer.target_key": "answer"}, None),
    ],
)
def test_inputs_and_outputs_of_other_forms_train_the_same(
    here: Callable[..., Path], changes: dict[str, Any], key: str | None
) -> None:
    assert figures(here("other", **changes)) == figures(here("plain"))


def test_a_loss_of_terms_is_logged_term_by_term(here: Callable[..., Path]) -> None:
    found = figures(here("terms", **{"loss.name": "Terms"}))
    for phase in ("train", "val"):
        for step, value in found[f"{phase}/loss"].items():
            parts = [found[f"{phase}/loss_{name}"][step] for name in ("ce", "size")]
            assert value == pytest.approx(sum(parts), rel=1e-6)


def test_train_loss_is_the_mean_since_its_last_point(here: Callable[..., Path]) -> None:
    each = figures(here("each"))["train/loss"]
    some = figures(here("some", **{"trainer.log_every_steps": 3}))["train/loss"]
    assert sorted(some) == [3, 6, 8, 9, 12, 15, 16], "every 3 steps, and at each epoch's end"
    assert some[3] == pytest.approx((each[1] + each[2] + each[3]) / 3)
    assert some[8] == pytest.approx((4 * each[7] + 1 * each[8]) / 5), "over samples: the epoch's last step has one"


def test_max_steps_ends_in_mid_epoch_with_everything_in_place(here: Callable[..., Path]) -> None:
    run = here("short", **{"trainer.max_epochs": None, "trainer.max_steps": 11, "loaders.test": {"size": 5}})
    found = figures(run)
    assert max(found["train/loss"]) == 11
    assert sorted(found["val/loss"]) == [8, 11]
    assert sorted(found["test/loss"]) == [11]
    assert last(run).state["step"] == 11
    assert (last(run).state["epoch"], last(run).state["position"]) == (1, 12)


def test_more_steps_go_on_in_mid_epoch(here: Callable[..., Path]) -> None:
    settings = {"trainer.max_epochs": None, "loaders.val": None, "metrics": None}
    whole = here("whole", **settings, **{"trainer.max_steps": 20})
    here("parts", **settings, **{"trainer.max_steps": 11})
    same_training(here("parts", **settings, **{"trainer.max_steps": 20}), whole)


def test_validation_every_few_steps_and_at_the_end(here: Callable[..., Path]) -> None:
    found = figures(here("often", **{"trainer.validate_every_steps": 5}))
    assert sorted(found["val/loss"]) == [5, 10, 15, 16]


def test_early_stopping_ends_after_validations_without_a_better_one(
    here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = here(
        "early", **{"trainer.early_stop_patience": 2, "trainer.max_epochs": 50, "optimizer.lr": 0.0,
                    "trainer.monitor": "val/loss"},
    )  # fmt: skip
    assert sorted(figures(run)["val/loss"]) == [8, 16, 24]
    facts = read_run(run)
    assert (facts["state"], facts["reason"]) == ("FINISHED", "no better val/loss in 2 validations")
    assert "no better val/loss" in capsys.readouterr().out


def test_a_plateau_lowers_the_rate(here: Callable[..., Path]) -> None:
    scheduler = {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5, "threshold": 10.0}
    found = figures(here("plateau", **{"lr_scheduler": scheduler, "trainer.max_epochs": 4}))
    assert [found["lr"][step] for step in (8, 16, 24, 32)] == [0.1, 0.1, 0.05, 0.025]


def test_averaged_weights_are_what_is_validated_tested_and_kept(here: Callable[..., Path]) -> None:
    run = here("average", **{"trainer.ema_decay": 0.9, "model.norm": True, "loaders.test": {"size": 11, "seed": 1}})
    saved = last(run)
    assert saved.ema is not None and not equal(saved.weights, saved.ema)
    assert saved.state["averaged"] == 16
    plain = figures(here("plain", **{"model.norm": True}))
    found = figures(run)
    assert found["train/loss"] == plain["train/loss"]
    assert found["val/loss"][16] != plain["val/loss"][16]
    best = load(run / "checkpoints" / "best").manifest["step"]
    assert found["test/loss"][16] == pytest.approx(found["val/loss"][best]), "the same data as validation's"


def test_resume_none_moves_the_old_training_aside(
    here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = here("again")
    first = figures(run)
    assert figures(here("again", **{"trainer.resume": "none"})) == first
    (aside,) = [path for path in run.parent.iterdir() if path.name.startswith("run-again-")]
    assert figures(aside) == first
    assert read_run(aside)["id"] != read_run(run)["id"]
    assert f"the old training was moved to {aside.name}" in capsys.readouterr().out


def test_a_finished_training_is_left_alone_and_goes_on_when_max_epochs_is_raised(
    here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cosine = {"lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step"}, "model.dropout": 0.2}
    run = here("more", **cosine)
    before = contents(run)
    here("more", **cosine)
    out = capsys.readouterr().out
    assert "holds a finished training; to continue it, raise trainer.max_epochs" in out
    assert "trainer.resume=none" in out
    assert contents(run) == before
    here("more", **cosine, **{"trainer.max_epochs": 4})
    found = figures(run)
    assert sorted(found["train/loss"]) == list(range(1, 33))
    planned = figures(here("planned", **cosine, **{"trainer.max_epochs": 4}))
    assert [found["lr"][step] for step in range(17, 33)] == pytest.approx([planned["lr"][s] for s in range(17, 33)])


def test_a_new_training_goes_on_from_a_checkpoint_that_is_named(here: Callable[..., Path]) -> None:
    whole = here("whole", **EXACT, **{"trainer.keep_last": 9})
    (early,) = whole.glob("checkpoints/step-00000008")
    before = sha256(early / "manifest.json")
    copy = here("copy", **EXACT, **{"trainer.resume": str(early)})
    same_training(copy, whole)
    assert sha256(early / "manifest.json") == before
    assert min(figures(copy)["train/loss"]) > 8
