"""Trainings that fail or hang, for real: what is left names the rank, the samples, the place and the cure."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from whole_runs import TORCHRUN, WAIT_SECONDS, Place, figures, last, same_training

from dtrain.distributed.mailbox import Mailbox
from dtrain.launch import rank
from dtrain.tracking.run_folder import read_run
from dtrain.training.failure_card import card, first_of, unused_parameters
from dtrain.training.state import Activity
from dtrain.training.watchdog import stuck_of

pytestmark = pytest.mark.timeout(600)

TWO = {"launcher": [*TORCHRUN, "--nproc_per_node=2"]}


def failure_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "failure.json").read_text())


# ------------------------------------------------------------------------------------------------- the failure's card


def test_an_error_in_the_model_leaves_a_card_with_rank_step_samples_and_place(place: Place) -> None:
    file = place.config("card", **{"trainer.resume": "auto"})
    text = place.run(file, expect=1, do="train 3 rank 0 raise").text
    failure = failure_of(place.path("card"))
    assert (failure["rank"], failure["step"], failure["phase"]) == (0, 2, "forward")
    assert failure["error"] == "RuntimeError" and failure["message"] == "the toy is broken"
    assert failure["config"].startswith("model (") and "card.yaml:" in failure["config"]
    assert "toy.py:" in failure["where"] and len(failure["samples"]) == 4
    assert "rank 0 failed at step 3 (forward): RuntimeError: the toy is broken" in text
    assert "RuntimeError: the toy is broken" in failure["traceback"]


def test_an_error_in_a_validation_names_the_samples_of_its_batch(place: Place) -> None:
    text = place.run(place.config("validating"), ranks=2, expect=1, do="eval 2 rank 0 raise").text
    failure = failure_of(place.path("validating"))
    assert (failure["rank"], failure["phase"], failure["samples"]) == (0, "validation", [8, 9, 10])
    assert "samples 8, 9, 10" in text


def test_the_rank_that_failed_first_is_named_not_the_one_that_saw_it_go(place: Place) -> None:
    place.run(place.config("first"), expect=None, do="train 3 rank 1 raise", **TWO)
    failure = failure_of(place.path("first"))
    assert (failure["rank"], failure["error"], failure["message"]) == (1, "RuntimeError", "the toy is broken")
    assert read_run(place.path("first"))["state"] == "FAILED"


def test_a_rank_that_is_killed_is_named_by_its_silence(place: Place) -> None:
    text = place.run(place.config("silent"), expect=None, do="train 3 rank 1 KILL", **TWO).text
    failure = failure_of(place.path("silent"))
    assert failure["silent_ranks"] == [1] and "memory was full" in failure["cure"]
    assert "exited without reporting an error: rank 1" in text


def test_a_sample_that_cannot_be_loaded_is_named_with_its_section(place: Place) -> None:
    file = place.config("sample", **{"loaders.num_workers": 2})
    place.run(file, expect=1, env={"TOY_LOAD": "sample 7 rank 0 raise"})
    failure = failure_of(place.path("sample"))
    assert "while loading sample 7 of Points" in failure["message"]
    assert failure["config"].startswith("loaders (") and failure["phase"] == "waiting for data"


def test_a_loader_worker_that_is_killed_ends_the_training_with_its_cause(place: Place) -> None:
    file = place.config("worker", **{"loaders.num_workers": 2})
    place.run(file, expect=1, env={"TOY_LOAD": "sample 7 rank 0 KILL"})
    assert "lower loaders.num_workers" in failure_of(place.path("worker"))["cure"]


def test_a_new_start_begins_without_the_old_failure(place: Place) -> None:
    file = place.config("forgotten")
    place.run(file, expect=1, do="train 3 rank 0 raise")
    assert (place.path("forgotten") / "failure.json").exists()
    place.run(file)
    assert not (place.path("forgotten") / "failure.json").exists()


def note(rank: int, seconds: float, consequence: bool = False, bad_loss: bool = False) -> dict[str, Any]:
    return {"rank": rank, "time": seconds, "consequence": consequence, "bad_loss": bad_loss}


@pytest.mark.parametrize(
    ("notes", "first"),
    [
        ([note(0, 2.0), note(1, 1.0)], 1),
        ([note(0, 1.0, consequence=True), note(1, 2.0)], 1),
        ([note(0, 1.0), note(1, 2.0, bad_loss=True)], 1),
        ([note(0, 1.0, consequence=True)], 0),
    ],
)
def test_the_first_failure_is_the_one_that_is_no_consequence(notes: list[dict[str, Any]], first: int) -> None:
    assert first_of(notes)["rank"] == first


def test_ddps_own_complaint_of_unused_parameters_gets_their_names_and_the_cure(place: Place) -> None:
    place.write(
        "idle.py",
        "import torch\nfrom toy import MLP\n\n\n"
        "class Idle(MLP):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.aside = torch.nn.Linear(8, 3)\n",
    )
    place.run(place.config("idle", modules=["idle", "toy"], **{"model.name": "Idle"}), expect=1, ranks=2)
    failure = failure_of(place.path("idle"))
    assert "aside.bias, aside.weight" in failure["message"] and "layers" not in failure["message"]
    assert "trainer.ddp.find_unused_parameters=true" in failure["cure"]


def test_unused_parameters_are_named_not_numbered() -> None:
    wrapped = dict.fromkeys(["0.weight", "1.weight", "1.bias"], torch.nn.Parameter(torch.zeros(1)))
    text = "Parameter indices which did not receive grad for rank 1: 1 2\n In addition, you can set"
    assert unused_parameters(wrapped, text) == ["1.weight", "1.bias"]
    text = "3) Reused parameters. Parameter at index 0 has been marked as ready twice."
    assert unused_parameters(wrapped, text) == ["0.weight"]
    assert unused_parameters(wrapped, "something else") == []


def test_the_phase_is_what_the_loop_wrote_whatever_the_functions_are_called(place: Place) -> None:
    """An error of forward, within functions that are called as the trainer's own and as torch's."""
    place.write(
        "misleading.py",
        "import toy, torch\n\n\nclass Misleading(toy.MLP):\n"
        "    def forward(self, images):\n        return self.backward(images)\n\n"
        "    def backward(self, images):\n"
        "        return self.validate(images) if self.training else super().forward(images)\n\n"
        "    def validate(self, images):\n        raise RuntimeError('misled')\n",
    )
    place.run(place.config("misled", modules=["misleading", "toy"], **{"model.name": "Misleading"}), expect=1)
    failure = failure_of(place.path("misled"))
    assert (failure["phase"], failure["message"]) == ("forward", "misled")
    assert failure["config"].startswith("model (")


def test_an_activity_is_over_with_its_block_but_for_one_that_fails() -> None:
    activity = Activity("backward")
    with activity.during("validation"):
        with activity.during("saving"):
            assert activity.phase == "saving"
        assert activity.phase == "validation"
    assert activity.phase == "backward"
    with pytest.raises(OSError), activity.during("logging"):
        raise OSError
    assert activity.phase == "logging", "by which the failure card tells where it was"


def test_a_card_is_short(tmp_path: Path) -> None:
    given = {
        "rank": 1, "step": 4, "phase": "validation", "error": "ValueError", "message": "a\nb", "where": "x.py:3 in f",
        "config": "model (c.yaml:4:1)", "samples": list(range(20)), "memory": "1 GB", "cure": "less of RUN_FOLDER",
    }  # fmt: skip
    lines = card(given, tmp_path)
    assert lines[0] == "rank 1 failed at step 5 (validation): ValueError: a"
    assert lines[1] == "  b", "what the error says after its first line"
    assert len(lines) == 8 and f"less of {tmp_path}" in lines[6] and "7, ..." in lines[4]


# --------------------------------------------------------------------------------------------------------- the replay


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_step_that_failed_is_repeated_with_the_same_samples_and_loss(place: Place, ranks: int) -> None:
    name = f"replay-{ranks}"
    changes = {"model.dropout": 0.5, "loaders.batch_size": 4 // ranks}
    place.run(place.config(f"{name}-whole", **changes, **{"trainer.max_steps": 3}), **(TWO if ranks > 1 else {}))
    expected = figures(place.path(f"{name}-whole"))["train/loss"][3]
    place.run(place.config(name, **changes), expect=None, do="train 3 rank 0 nan", **(TWO if ranks > 1 else {}))
    text = place.run("replay", str(place.path(name))).text
    assert f"step 3 in epoch 1, as on {ranks} rank(s)" in text
    found = [float(line.split("loss ")[1].split(",")[0]) for line in text.splitlines() if ", samples " in line]
    assert len(found) == ranks
    assert sum(found) / ranks == pytest.approx(expected, rel=1e-4)
    said = "forward and backward did not fail this time; the training failed in optimizer step: NonFiniteError: "
    assert said in text


def test_the_replay_names_the_module_whose_output_is_bad_first(place: Place) -> None:
    place.run(place.config("culprit"), expect=1, do="train 3 rank 0 nan")
    text = place.run("replay", str(place.path("culprit")), do="train 1 rank 0 nan").text
    assert "first bad output: trouble (Trouble); its input was finite" in text


def test_a_folder_without_a_failed_step_is_told(place: Place, tmp_path: Path) -> None:
    assert "is not a run folder" in place.run("replay", str(tmp_path), expect=2).text


def test_a_model_that_leaves_the_program_has_failed(place: Place) -> None:
    result = place.run(place.config("leaves"), expect=1, do="train 3 rank 0 exit")
    assert "rank 0 failed at step 3 (forward): SystemExit: 3" in result.text
    facts = read_run(place.path("leaves"))
    assert (facts["state"], facts["reason"]) == ("FAILED", "SystemExit: 3")
    assert failure_of(place.path("leaves"))["samples"]


@pytest.mark.parametrize("code", [0, None, "why", 2, 75, 256])
def test_work_that_somebody_left_is_not_done(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "create_trainer", lambda config, sender: sys.exit(code))
    assert rank.train(ConfigDict()) == 1


# ----------------------------------------------------------------------------------------------------------- the hang

LIMIT = 15  # seconds, within which ranks that are well do something, however busy the machine


def test_a_sample_that_never_comes_is_named_and_ends_the_job(place: Place) -> None:
    file = place.config("hang", **{"trainer.hang_timeout_seconds": LIMIT})
    place.run(file, expect=1, env={"TOY_LOAD": "sample 7 rank 0 sleep"})
    failure = failure_of(place.path("hang"))
    assert failure["rank"] == 0 and failure["phase"] == "waiting for data" and 7 in failure["samples"]
    stacks = (place.path("hang") / "hang.txt").read_text()
    assert "trouble_at" in stacks and "rank 0 is stuck" in stacks
    assert read_run(place.path("hang"))["state"] == "FAILED"


def test_a_worker_that_hangs_says_where(place: Place) -> None:
    changes = {"trainer.hang_timeout_seconds": LIMIT, "loaders.num_workers": 2, "loaders.batch_size": 2}
    file = place.config("worker-hangs", **changes)
    place.run(file, expect=None, env={"TOY_LOAD": "sample 7 rank 1 sleep"}, **TWO)
    assert failure_of(place.path("worker-hangs"))["rank"] == 1
    text = (place.path("worker-hangs") / "hang.txt").read_text()
    told = text.split("\nrank 1, worker ")[1:]
    assert len(told) == 2
    assert sum("in trouble_at" in part and "toy.py" in part for part in told) == 1
    assert "rank 0, worker" not in text


@pytest.mark.parametrize(
    ("rank", "action", "word"),
    [
        pytest.param(1, "sleep", "forward"),
        pytest.param(1, "STOP", "does not answer", marks=pytest.mark.soak),
        (0, "STOP", "does not answer"),
    ],
)
def test_a_stuck_rank_is_named_with_the_stacks_of_all(place: Place, rank: int, action: str, word: str) -> None:
    name = f"stuck-{rank}-{action}"
    file = place.config(name, **{"trainer.hang_timeout_seconds": LIMIT})
    place.run(file, expect=None, do=f"train 3 rank {rank} {action}", **TWO)
    text = (place.path(name) / "hang.txt").read_text()
    assert f"rank {rank}" in text.splitlines()[0] and "stuck" in text.splitlines()[0]
    assert word in text and f"rank {1 - rank}, thread MainThread" in text
    assert failure_of(place.path(name))["rank"] == rank
    assert read_run(place.path(name))["state"] == "FAILED"


def test_of_ranks_that_share_a_model_the_one_that_the_others_wait_for_is_named(place: Place) -> None:
    shared = {"trainer.strategy": "fsdp", "trainer.fsdp": {"layers": ["Linear"]}}  # so rank 0 waits in its forward, too
    file = place.config("shared-hang", **shared, **{"trainer.hang_timeout_seconds": LIMIT})
    place.run(file, expect=None, do="train 3 rank 1 sleep", **TWO)
    told = (place.path("shared-hang") / "hang.txt").read_text()
    assert told.startswith(f"no progress for {LIMIT} s; rank 1 is stuck\n"), told


def test_a_slow_training_is_no_hang(place: Place) -> None:
    """It takes longer than the limit, but no step of it does."""
    file = place.config("slow", **{"trainer.hang_timeout_seconds": LIMIT, "trainer.max_steps": LIMIT + 1})
    place.run(file, do="train all rank 0 lag", env={"TOY_LAG": "1"})
    assert not (place.path("slow") / "hang.txt").exists()


@pytest.mark.parametrize(
    ("notes", "stuck"),
    [
        ({0: (4, "forward", 0), 1: (4, "waiting for data", 0)}, [1]),
        ({0: (4, "backward", 0), 1: (4, "forward", 0)}, [1]),
        ({0: (4, "waiting for ranks", 0), 1: (4, "waiting for data", 0)}, [1]),
        ({0: (4, "waiting for data", 0), 1: (3, "optimizer step", 0)}, [1]),
        ({0: (4, "validation", 7), 1: (4, "validation", 7)}, [0, 1]),
        ({0: (4, "validation", 8), 1: (4, "validation", 7), 2: (4, "validation", 8)}, [1]),
        ({0: (4, "saving", 0), 1: (4, "forward", 0)}, [0]),
    ],
)
def test_the_stuck_rank_is_the_one_furthest_behind(notes: dict[int, tuple[int, str, int]], stuck: list[int]) -> None:
    """By steps, then within one, then by the collectives that it has begun."""
    names = ("step", "phase", "collectives")
    assert stuck_of({rank: dict(zip(names, note, strict=True)) for rank, note in notes.items()}) == stuck


# -------------------------------------------------------------------------------------------------------- the mailbox


def test_the_mailbox_is_shared_by_ranks_and_survives_a_store_that_is_gone() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mailboxes = [Mailbox(rank, 2, store) for rank in (0, 1)]
    mailboxes[1].post("x", {"a": torch.ones(2)})
    assert list(mailboxes[0].notes("x")) == [1] and torch.equal(mailboxes[0].notes("x")[1]["a"], torch.ones(2))
    mailboxes[0].post("x", 3)
    assert list(mailboxes[0].notes("x", 1.0)) == [0, 1]
    assert not mailboxes[0].is_raised("flag")
    mailboxes[1].raise_flag("other")
    assert mailboxes[0].is_raised("other") and not mailboxes[0].is_raised("other"), "it is looked up once a second"

    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("the store is gone")

    lonely = Mailbox(0, 2, Gone())
    lonely.post("x", 1)
    lonely.raise_flag("x")
    assert lonely.notes("x", 0.1) == {0: 1} and not lonely.is_raised("x")


# ------------------------------------------------------------------------------------------------------ asked to stop


def test_a_stop_while_validating_is_quick_and_the_validation_is_done_by_the_next_start(place: Place) -> None:
    """On the second of two ranks alone: the first learns of it."""
    changes = {"loaders.val.size": 30, "loaders.batch_size": 2, "model.dropout": 0.5}
    place.run(place.config("val-whole", **changes), **TWO)
    file = place.config("val", **changes)
    first = place.run(file, expect=None, do="eval 2 rank 1 TERM", **TWO)
    assert first.rc == 1 and read_run(place.path("val"))["state"] == "KILLED"  # 75, of which torchrun makes 1
    assert not [key for key in figures(place.path("val")) if key.startswith("val/")]
    place.run(file, **TWO)
    same_training(place.path("val-whole"), place.path("val"))
    assert figures(place.path("val-whole")) == figures(place.path("val"))


@pytest.mark.soak
def test_a_stop_while_validating_every_few_steps_loses_nothing(place: Place) -> None:
    changes = {"trainer.validate_every_steps": 3, "model.dropout": 0.5}
    place.run(place.config("steps-whole", **changes))
    file = place.config("steps", **changes)
    place.run(file, expect=75, do="eval 5 rank 0 TERM")
    place.run(file)
    same_training(place.path("steps-whole"), place.path("steps"))
    assert figures(place.path("steps-whole")) == figures(place.path("steps"))


def asked_while_loading(place: Place, name: str, ranks: int, sample: int = 7, **changes: Any) -> None:
    """Start, wait until the last rank waits for a sample that never comes, then ask all ranks to stop."""
    options = {
        "ranks": ranks,
        "env": {"TOY_LOAD": f"sample {sample} rank {ranks - 1} sleep", "TOY_SEEN": str(place.folder / f"seen-{name}")},
    }
    Path(options["env"]["TOY_SEEN"]).mkdir()
    started = place.start(place.config(name, **changes), **options)
    end, seen = time.monotonic() + WAIT_SECONDS, list[int]()
    while sample not in seen or not (place.path(name) / "metrics.jsonl").exists():
        assert time.monotonic() < end, "".join(running.output().text for running in started)
        time.sleep(0.1)
        seen = [int(line) for file in Path(options["env"]["TOY_SEEN"]).iterdir() for line in file.read_text().split()]
    for running in started:
        os.kill(running.pid, signal.SIGTERM)
    results = [running.result(200) for running in started]
    assert [result.rc for result in results] == [75] * ranks, "".join(result.text for result in results)


@pytest.mark.parametrize(
    ("ranks", "accumulate"),
    [(2, 3), *(pytest.param(*each, marks=pytest.mark.soak) for each in ((1, 1), (1, 3), (2, 1)))],
)
def test_a_stop_while_waiting_for_data_keeps_the_last_whole_step(place: Place, ranks: int, accumulate: int) -> None:
    changes = {"model.dropout": 0.5, "trainer.accumulate": accumulate, "loaders.batch_size": 4 // ranks}
    name = f"loading-{ranks}-{accumulate}"
    place.run(place.config(f"{name}-whole", **changes), ranks=ranks)
    asked_while_loading(place, name, ranks, **changes)
    run = place.path(name)
    assert read_run(run)["state"] == "KILLED"
    place.run(place.config(name, **changes), ranks=ranks)
    same_training(place.path(f"{name}-whole"), run)


def test_a_stop_while_the_validation_waits_for_data_loses_no_step(place: Place) -> None:
    """The sample that never comes is one that the training does not have."""
    changes = {"model.dropout": 0.5, "loaders.batch_size": 2, "loaders.train.size": 16, "loaders.val.size": 31}
    place.run(place.config("waiting-whole", **changes), ranks=2)
    asked_while_loading(place, "waiting", 2, sample=27, **changes)
    run = place.path("waiting")
    assert read_run(run)["state"] == "KILLED" and last(run).state["step"] == 4
    place.run(place.config("waiting", **changes), ranks=2)
    same_training(place.path("waiting-whole"), run)
    assert figures(place.path("waiting-whole")) == figures(run)


def test_a_time_limit_ends_a_start_with_everything_saved(place: Place) -> None:
    file = place.config("limit", **{"trainer.time_limit": 30, "trainer.max_epochs": 100000, "loaders.train.size": 8})
    place.run(file, expect=75, do="train all rank 0 lag")
    facts = read_run(place.path("limit"))
    assert facts["state"] == "KILLED" and facts["reason"] == "the time limit (30)"
    steps = figures(place.path("limit"))["train/loss"]
    assert last(place.path("limit")).state["step"] == max(steps)


def test_a_batch_systems_limit_is_kept_clear_of(place: Place) -> None:
    file = place.config("slurm", **{"trainer.max_epochs": 100000, "loaders.train.size": 8})
    place.run(file, expect=75, do="train all rank 0 lag", env={"SLURM_JOB_END_TIME": str(int(time.time()) + 40)})
    assert read_run(place.path("slurm"))["reason"] == "the batch system's time limit"


def test_a_signal_before_the_first_step_ends_at_once_and_asks_for_another_start(place: Place) -> None:
    code = "import os, signal, sys; sys.path.insert(0, '.'); import dtrain.distributed.stop_request as i"
    code += "; i.end_at_once(print)"
    code += "; os.kill(os.getpid(), signal.SIGTERM)"
    done = place.start(launcher=[sys.executable, "-c", code + " #"])[0].result(200)
    assert done.rc == 75 and "signal SIGTERM before the first step" in done.stdout


SWALLOWS = """
import os, signal, time
from toy import MLP
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
except BaseException:
    pass
class Deaf(MLP):
    pass
"""


def test_ctrl_c_is_heard_while_a_library_is_imported_that_swallows_it(place: Place) -> None:
    """As torch's did, once in some forty times."""
    place.write("swallows.py", SWALLOWS)
    file = place.config("deaf-import", modules=["swallows", "toy"], **{"model.name": "Deaf"})
    assert place.run(file, expect=130).stderr == ""
    assert not place.path("deaf-import").exists()


def test_checkpoints_by_the_clock(place: Place) -> None:
    changes = {"trainer.checkpoint_every_minutes": 0, "trainer.keep_last": 100, "trainer.max_epochs": 1}
    place.run(place.config("clock", **changes, **{"loaders.train.size": 40}))
    assert len(list((place.path("clock") / "checkpoints").glob("step-*"))) >= 3


# ------------------------------------------------------------------------------------------------- ranks that drifted


def test_ranks_that_drifted_apart_are_found_and_named(place: Place) -> None:
    place.write(
        "drifting.py",
        "import os\nimport torch\nfrom toy import MLP\n\n\n"
        "class Drifting(MLP):\n"
        "    def forward(self, x):\n"
        "        if os.environ.get('RANK') == '1' and self.training:\n"
        "            with torch.no_grad():\n"
        "                self.layers[0].weight += 1e-3\n"
        "        return super().forward(x)\n",
    )
    file = place.config("drift", modules=["drifting", "toy"], **{"model.name": "Drifting"})
    place.run(file, expect=None, ranks=2)
    failure = failure_of(place.path("drift"))
    assert "layers.0.weight of rank 1 is not that of rank 0" in failure["message"]
