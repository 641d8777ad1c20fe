"""The clock of training, and the rank that holds the others up."""

import re

import pytest
from whole_runs import Place

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
    text = place.run(place.config(name, **changes), ranks=2, **what).text
    (line,) = re.findall(r"warning: rank (\d) is slow: ([\d.]+) s per step .* ([\d.]+) s\s+of them (.*);", text)
    assert (line[0], line[3]) == ("1", kind)
    assert float(line[1]) >= 0.2 and 0.2 <= float(line[2]) < 0.3


def test_ranks_that_take_as_long_as_one_another_are_not_called_slow() -> None:
    assert Throughput(0, 3).judge([0.1, 0.2, 0.12, 0.19, 0.1, 0.25]) == ""


def test_what_is_too_short_to_matter_or_unknown_is_not_judged() -> None:
    assert Throughput(0, 2).judge([0.0001, 0.001, 0.0001, 0.014]) == ""
    assert Throughput(0, 2).judge([0.0, 0.0, 0.1, 0.4]) == "", "rank 0 has not done enough steps"
    assert Throughput(0, 1).judge([0.1, 0.4]) == ""


def test_each_rank_and_kind_is_told_once() -> None:
    throughput = Throughput(0, 3)
    row = [0.1, 0.1, 0.1, 0.4, 0.1, 0.1]
    assert throughput.judge(row) == (
        "rank 1 is slow: 0.5 s per step until it has its loss, 0.4 s of them forward; the others take 0.2 s, "
        "2.5 times less, and wait for it"
    )
    assert throughput.judge(row) == ""
    assert throughput.judge([0.1, 0.1, 0.9, 0.1, 0.1, 0.1]).startswith("rank 1 is slow: 1 s per step")
    assert throughput.judge([0.1, 0.1, 0.1, 0.1, 0.1, 0.5]).startswith("rank 2 is slow")


def test_own_time_is_that_of_a_step_after_the_warm_up() -> None:
    throughput = Throughput(1, 2)
    for _ in range(7):
        throughput.data_came()
        throughput.forward_done()
        throughput.exchanged()
        throughput.step_done(8)
    assert throughput.own() == [0.0] * 4, "four steps after a warm-up of three are too few to judge by"
    for _ in range(2):
        throughput.data_came()
        throughput.step_done(8)
    before, own = throughput.own()[:2], throughput.own()[2:]
    assert before == [0.0, 0.0] and min(own) > 0
    assert throughput.samples_per_second > 0
