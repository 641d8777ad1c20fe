"""The clock of training, and the rank that holds the others up."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Place, write_config

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.training.advice import Advisor
from dtrain.training.state import Activity
from dtrain.training.step_clock import DeviceClock, StepClock
from dtrain.training.throughput import Throughput


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        pytest.param({"do": "train all rank 1 lag"}, "forward", marks=pytest.mark.soak),
        ({"env": {"TOY_LOAD": "sample all rank 1 lag"}}, "waiting for data"),
    ],
)
def test_a_slow_rank_is_named_once_with_what_is_slow(place: Place, what: dict, kind: str) -> None:
    """0.2 s in each forward of rank 1, or in loading each of its samples."""
    name = f"slow-{kind.split()[0]}"
    changes = {"trainer.log_every_steps": 10, "trainer.max_steps": 30, "loaders.batch_size": 1, "trainer.max_epochs": 9}
    changes |= {"trainer.profile": {"steps": 3}} if kind == "waiting for data" else {}
    text = place.run(place.config(name, **changes), ranks=2, **what).text
    (line,) = re.findall(r"warning: rank (\d) is slow: ([\d.]+) s per step .* ([\d.]+) s\s+of them ([^;]*);", text)
    assert (line[0], line[3]) == ("1", kind)
    assert float(line[1]) >= 0.2 and 0.2 <= float(line[2]) < 0.3
    if kind == "waiting for data":
        check_times(place.path(name), text)
        check_trace(place, name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_waits_in_its_forward_for_the_slow_one_is_not_called_slow(place: Place, strategy: str) -> None:
    """Rank 0 does so: for the one to which it gives its buffers, or of which it gathers weights."""
    changes = {"model.norm": True, "trainer.strategy": strategy, "trainer.log_every_steps": 10, "trainer.max_steps": 11}
    changes |= {"trainer.fsdp": {"min_parameters": 10}} if strategy == "fsdp" else {}
    file = place.config(f"waits-{strategy}", **changes, **{"loaders.batch_size": 1, "trainer.max_epochs": 9})
    text = place.run(file, ranks=2, env={"TOY_LOAD": "sample all rank 1 lag"}).text
    (line,) = re.findall(r"warning: rank (\d) is slow: ([\d.]+) s per step .* ([\d.]+) s\s+of them ([^;]*);", text)
    assert (line[0], line[3]) == ("1", "waiting for data") and 0.2 <= float(line[2]) < 0.3


def test_where_ranks_meet_in_the_forward_their_waiting_for_the_slow_one_does_not_count() -> None:
    """Rank 1 has its data 0.4 s later than rank 0, and 0.1 s later than rank 2; the forward of each takes 0.1 s."""
    times = row((0.0, 0.5), (0.4, 0.1), (0.3, 0.2))
    assert Throughput(0, 3).judge(times) == "", "as it was: all took as long until they had a loss"
    text = Throughput(0, 3, meets_in_forward=True).judge(times)
    assert text.startswith("rank 1 is slow: 0.5 s per step until it has its loss, 0.4 s of them waiting for data; ")
    assert "the others take 0.25 s" in text
    assert Throughput(0, 2, meets_in_forward=True).judge(row((0.0, 0.0), (0.1, 0.4))) == ""


def check_times(run: Path, text: str) -> None:
    """Rank 1 waits for its data, and rank 0 for rank 1, in backward."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = next(line["values"] for line in lines if line["kind"] == "metrics" and line["step"] == 20)
    names = {"data_wait", "transfer", "forward", "backward", "optimizer", "logging", "checkpoint"}
    assert {key for key in times if key.startswith("time/")} == {
        f"time/{name}{which}" for name in names for which in ("_min", "", "_max")
    }
    for name in ("data_wait", "backward"):
        least, middle, most = (times[f"time/{name}{which}"] for which in ("_min", "", "_max"))
        assert least < 0.1 < 0.19 < most and middle == pytest.approx((least + most) / 2)
    assert re.search(r"hint: \d+% of epoch 1 passed outside .* waiting for data: .* loaders.num_workers \(now 0,", text)


def check_trace(place: Place, name: str) -> None:
    """Steps 12 to 14, with the phases by name; handed to MLflow's sender."""
    trace = place.path(name) / "profile" / "steps-12-14.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert [names.count(phase) for phase in ("waiting for data", "forward", "backward", "optimizer step")] == [3] * 4
    assert any(event.get("name") == "aten::addmm" for event in events)
    lines = map(json.loads, (place.path(name) / "metrics.jsonl").read_text().splitlines())
    sent = [(line["path"], line["to"]) for line in lines if line["kind"] == "artifact"]
    assert (f"profile/{trace.name}", "profile") in sent


def row(*own: tuple[float, float]) -> list[float]:
    """The row of all ranks, of which each has its own times, and here none of the seven kinds."""
    return [value for each in own for value in (*each, *[0.0] * 7)]


def test_ranks_that_take_as_long_as_one_another_are_not_called_slow() -> None:
    assert Throughput(0, 3).judge(row((0.1, 0.2), (0.12, 0.19), (0.1, 0.25))) == ""


def test_what_is_too_short_to_matter_or_unknown_is_not_judged() -> None:
    assert Throughput(0, 2).judge(row((0.0001, 0.001), (0.0001, 0.014))) == ""
    assert Throughput(0, 2).judge(row((0.0, 0.0), (0.1, 0.4))) == "", "rank 0 has not done enough steps"
    assert Throughput(0, 1).judge(row((0.1, 0.4))) == ""


def test_each_rank_and_kind_is_told_once() -> None:
    throughput = Throughput(0, 3)
    times = row((0.1, 0.1), (0.1, 0.4), (0.1, 0.1))
    assert throughput.judge(times) == (
        "rank 1 is slow: 0.5 s per step until it has its loss, 0.4 s of them forward; the others take 0.2 s, "
        "2.5 times less, and wait for it"
    )
    assert throughput.judge(times) == ""
    assert throughput.judge(row((0.1, 0.1), (0.9, 0.1), (0.1, 0.1))).startswith("rank 1 is slow: 1 s per step")
    assert throughput.judge(row((0.1, 0.1), (0.1, 0.1), (0.1, 0.5))).startswith("rank 2 is slow")


def test_a_rank_that_is_slow_again_and_again_is_told_once_more() -> None:
    throughput, slow, even = Throughput(0, 3), row((0.1, 0.1), (0.1, 0.4), (0.1, 0.1)), row(*[(0.1, 0.1)] * 3)
    other = row((0.1, 0.1), (0.1, 0.1), (0.1, 0.4))
    told = []
    for times in [slow] * 4 + [even] + [slow] * 4 + [other] + [slow] * 7:
        throughput.judge(times)
        told.append(throughput.always_slow)
    assert [point for point, rank in enumerate(told) if rank is not None] == [14] and told[14] == 1


class Clock:
    """What stands for time.perf_counter: it stands still, until it is told how long something takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def step(clock: Any, at: Any, activity: Any = None, **seconds: float) -> None:
    """One step, whose phases take so long; `at` is what the clock looks at, which an activity may have."""
    for phase, name in (
        ("waiting for data", "wait"), ("forward", "forward"), ("backward", "backward"), ("optimizer step", "step"),
    ):  # fmt: skip
        (activity or clock).enter(phase)
        at.now += seconds.get(name, 0.0)
    clock.end_step()


def test_own_time_is_that_of_a_step_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Clock(monkeypatch)
    throughput = Throughput(1, 2, StepClock())
    for number in range(8):  # the first one of a start, and three of its epoch's warm-up, are not judged
        step(throughput.clock, at, wait=8.0 if number < 3 else 0.5, forward=9.0 if number < 3 else 0.25)
    assert throughput.clock.own_seconds(5) == (0.5, 0.25)
    assert throughput.clock.own_seconds(7) == (0.0, 0.0), "too few steps to judge by"
    found = throughput.row()
    assert found[:9] == [0.0] * 9 and found[9:11] == [0.5, 0.25]


def test_every_moment_of_a_step_is_in_one_of_the_times_and_no_validation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out by hand: two steps after the first, a log, a checkpoint and a validation."""
    at, activity = Clock(monkeypatch), Activity(clock=StepClock())
    throughput = Throughput(0, 1, activity.clock)
    step(
        activity.clock, at, activity, wait=60, forward=60, backward=60, step=60
    )  # of a start, which is none of a training's
    for _ in range(2):
        step(activity.clock, at, activity, wait=2, forward=3, backward=5, step=1)
        with activity.during("logging"):
            at.now += 0.5
        with activity.during("validation"):
            at.now += 1000
            with activity.during("saving"):
                at.now += 4
            at.now += 1000
        at.now += 7  # what follows a step is the optimizer's: averages of weights for instance
    activity.enter("transfer")
    at.now += 2
    figures = throughput.figures(throughput.row())
    assert figures == {
        "time/data_wait": 2, "time/transfer": 1, "time/forward": 3, "time/backward": 5, "time/optimizer": 8,
        "time/logging": 0.5, "time/checkpoint": 4,
    }  # fmt: skip
    assert throughput.end_epoch()["checkpoint"] == 8
    assert throughput.figures(throughput.row()) == {}, "no step since"


def test_of_several_ranks_the_median_least_and_most_are_logged() -> None:
    times = [[1, 0, 3, 4, 5, 0, 0], [9, 0, 3, 4, 5, 0, 0.5], [2, 0, 3, 4, 8, 0, 0]]
    figures = Throughput(0, 3).figures([value for each in times for value in (0, 0, *each)])
    waits = [figures[f"time/data_wait{which}"] for which in ("_min", "", "_max")]
    assert waits == [1, 2, 9] and figures["time/checkpoint"] == 0 and figures["time/checkpoint_max"] == 0.5
    assert len(figures) == 21


class Stream:
    """What stands for a GPU: it has come as far as `done`, and its events know when it passes them."""

    def __init__(self) -> None:
        self.now, self.done, self.events = 0.0, -1.0, 0

    def event(self) -> Any:
        self.events += 1
        stream = self

        class Event:
            def record(self) -> None:
                self.at = stream.now

            def query(self) -> bool:
                return self.at <= stream.done

            def elapsed_time(self, other: Any) -> float:
                assert self.query() and other.query(), "torch raises where an event has not been passed"
                return 1000 * (other.at - self.at)

        return Event()


def test_a_gpus_times_are_read_once_it_has_passed_them() -> None:
    stream = Stream()
    clock = DeviceClock(stream.event)
    throughput = Throughput(0, 1, clock)
    for _ in range(4):
        step(clock, stream, wait=1, forward=2, backward=3, step=4)
    assert throughput.row()[2:] == [0.0] * 7, "it has not begun"
    stream.done = 29.9  # in its third step, of which the first does not count
    assert throughput.row()[2:] == [1, 0, 2, 3, 4, 0, 0]
    assert throughput.clock.take()[1] == 0
    stream.done = 40
    for _ in range(2000):
        step(clock, stream, wait=1, forward=2, backward=3, step=4)
        stream.done = stream.now - 25
    assert stream.events < 1000, "they are used again, also where nothing is logged"
    assert throughput.row()[2:] == pytest.approx([1, 0, 2, 3, 4, 0, 0], rel=0.01)


SETTINGS: dict[str, Any] = {
    "cores": 8, "num_workers": 0, "pin_memory": False, "log_every_steps": 1, "checkpoint_every_steps": math.inf,
    "checkpoint_every_minutes": None, "validate_every_steps": math.inf,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "cure"),
    [
        ("data_wait", {}, "waiting for data: try more loaders.num_workers (now 0, of 8 cores)"),
        ("data_wait", {"num_workers": 8}, "waiting for data: with 8 workers on 8 cores, samples that are cheaper to"),
        ("transfer", {}, "moving batches to the device: try loaders.pin_memory: true"),
        ("transfer", {"pin_memory": True}, "moving batches to the device: smaller samples would help"),
        ("logging", {}, "logging: try a larger trainer.log_every_steps (now 1)"),
        ("checkpoint", {"checkpoint_every_steps": 2}, "try a larger trainer.checkpoint_every_steps (now 2)"),
        ("checkpoint", {"checkpoint_every_minutes": 0.5}, "try a larger trainer.checkpoint_every_minutes (now 0.5)"),
        ("checkpoint", {"validate_every_steps": 3}, "try a larger trainer.validate_every_steps (now 3)"),
        ("checkpoint", {}, "saving checkpoints: one follows each epoch; trainer.steps_per_epoch makes epochs longer"),
    ],
)
def test_one_sentence_says_what_to_change_where_much_is_lost(kind: str, changes: dict[str, Any], cure: str) -> None:
    spent = {"data_wait": 0.5, "transfer": 0.5, "forward": 3.0, "backward": 3.0, "optimizer": 1.0, "logging": 0.5}
    spent |= {"checkpoint": 0.5} | {kind: 1.5}
    advisor = Advisor(**SETTINGS | changes)
    found = advisor.advice(3, spent)
    assert found.startswith("30% of epoch 3 passed outside forward, backward and optimizer, 15% ") and cure in found
    assert advisor.advice(4, spent) == "", "once"


def test_a_fifth_or_half_a_second_is_not_spoken_of() -> None:
    spent = dict.fromkeys(("data_wait", "transfer", "logging", "checkpoint"), 0.0)
    work = {"forward": 5.0, "backward": 2.0, "optimizer": 1.0}
    assert Advisor(**SETTINGS).advice(1, spent | work | {"data_wait": 2.0}) == ""
    assert Advisor(**SETTINGS).advice(1, spent | work | {"data_wait": 2.1}) != ""
    assert (
        Advisor(**SETTINGS).advice(1, spent | {"forward": 0.1, "backward": 0, "optimizer": 0, "data_wait": 0.4}) == ""
    )


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ({"steps": 0}, "trainer.profile.steps: must be at least 1, found 0"),
        ({"after": 0}, "trainer.profile.after: must be at least 1, found 0"),
        ({"wait": 3}, "trainer.profile got an unexpected argument 'wait'"),
    ],
)
def test_what_a_profile_cannot_be_is_one_message(tmp_path: Path, profile: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError) as found:
        check(load_config(write_config(tmp_path, "wrong", {"modules": ["toy"], "trainer.profile": profile})))
    assert told in str(found.value) and len(found.value.mistakes) == 1
