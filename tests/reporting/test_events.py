"""What --json and --quiet leave on stdout, of whole trainings through the real command line."""

import json
from typing import Any

import pytest
from conftest import Result
from whole_runs import Place

pytestmark = pytest.mark.slow


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def trained_folder(result: Result) -> str:
    return str(events_of(result.stdout)[0]["run_folder"])


CHANGES = {"trainer.max_epochs": 2, "trainer.log_every_steps": 2, "loaders.test": {"size": 4, "seed": 2}}


@pytest.fixture(scope="module")
def trained(place: Place) -> Result:
    """Two epochs of three steps, each validated; a print of the model's code is not an event."""

    def make() -> tuple[int, str, str]:
        done = place.run(place.config("events", **CHANGES), "--json")
        return done.rc, done.stdout, done.stderr

    return Result(*place.once("events", make))


@pytest.fixture
def file(place: Place, trained: Result) -> str:
    """The config of that training."""
    return place.config("events", **CHANGES)


def test_stdout_holds_events_alone_in_their_order(trained: Result) -> None:
    events = events_of(trained.stdout)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert set(kinds) == {"start", "figures", "validation", "checkpoint", "test", "end"}
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert "epoch 1/2" in trained.stderr, "what a log has is on stderr"


def test_events_have_what_the_journal_has(trained: Result, place: Place) -> None:
    events = events_of(trained.stdout)
    lines = [json.loads(line) for line in (place.path("events") / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["values"]) for line in lines if line["kind"] == "metrics"]
    told = [(event["step"], event["figures"]) for event in events if "figures" in event]
    assert [step for step, _ in told] == [step for step, _ in logged]
    for (_, figures), (_, values) in zip(told, logged, strict=True):
        assert values.items() <= figures.items() or figures.items() <= values.items()


def test_the_end_says_how_it_went(trained: Result, place: Place) -> None:
    start, *_, end = events_of(trained.stdout)
    validations = [event for event in events_of(trained.stdout) if event["event"] == "validation"]
    assert (end["status"], end["exit_status"], end["reason"]) == ("FINISHED", 0, "")
    assert start["run_folder"] == end["run_folder"] and end["steps"] == validations[-1]["step"]
    best = [event["figures"][end["monitor"]] for event in validations if event["best"]][-1]
    assert end["best"] == {end["monitor"]: best}
    assert end["test"].keys() == {
        key for event in events_of(trained.stdout) if event["event"] == "test" for key in event["figures"]
    }
    saved = [event for event in events_of(trained.stdout) if event["event"] == "checkpoint"]
    assert all((place.folder / event["path"]).is_dir() for event in saved[-1:])


def test_a_mistake_ends_with_its_status_and_reason(place: Place, file: str) -> None:
    result = place.run(file, "optimizer.lrr=1", "--json", expect=2)
    (end,) = events_of(result.stdout)
    assert (end["event"], end["status"], end["exit_status"]) == ("end", "FAILED", 2)
    assert "did you mean 'lr'?" in end["reason"] and end["reason"] in result.stderr


def test_a_finished_and_a_failing_training_end_with_their_reason_and_quietly(
    place: Place, trained: Result, file: str
) -> None:
    """--quiet beside --json leaves stderr to errors."""
    result = place.run(file, "--json", "-q")
    (end,) = events_of(result.stdout)
    assert (end["status"], end["exit_status"], end["run_folder"]) == ("FINISHED", 0, trained_folder(trained))
    assert "holds a finished training" in end["reason"] and result.stderr == ""
    result = place.run(place.config("events-fail"), "--json", "-q", env={"TOY_LOAD": "sample 3 rank 0 raise"}, expect=1)
    end = events_of(result.stdout)[-1]
    assert (end["event"], end["status"], end["exit_status"]) == ("end", "FAILED", 1)
    assert (
        end["reason"] == "RuntimeError: the toy is broken (while loading sample 3 of Points)"
        and "failed at step" in result.stderr
    )
    assert "Traceback" not in result.stderr and "epoch" not in result.stderr, result.stderr


def test_quiet_prints_the_result_alone(place: Place, trained: Result, file: str) -> None:
    result = place.run("test", file, "-q")
    figures = events_of(trained.stdout)[-1]["test"]
    (line,) = result.stdout.splitlines()
    assert line.startswith("test  step ") and f"loss {figures['test/loss']:.4f}" in line
    assert result.stderr == ""
    result = place.run(place.config("events-quiet", **{"trainer.max_epochs": 1}), "--quiet")
    names = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert names[:2] == ["status", "steps"] and "epoch" not in result.stdout
    assert "epoch 1/1" in (place.path("events-quiet") / "logs/rank-0.log").read_text(), "the log has everything"
