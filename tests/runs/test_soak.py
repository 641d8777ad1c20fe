"""Faults at random moments of real trainings on two ranks, by the hundred."""

from pathlib import Path

import pytest
from warm import in_warm_process

PAIRS, STOPS, RANK_KILLS = 100, 30, 50

pytestmark = pytest.mark.timeout(7200)


@pytest.mark.soak  # test_launcher.py, test_runs.py and test_failures.py have one of each in every run
def test_a_few_kills_and_stops_lose_nothing(tmp_path: Path) -> None:
    reports = in_warm_process(tmp_path, 900, kills_and_resumes=1, stops=2, rank_kills=1)
    assert reports["kills_and_resumes"]["pairs"] == 1 and reports["stops"]["stops"] == 2


@pytest.mark.soak
def test_a_hundred_kills_end_bit_for_bit_as_if_nothing_had_been(tmp_path: Path) -> None:
    assert in_warm_process(tmp_path, 7000, kills_and_resumes=PAIRS)["kills_and_resumes"]["pairs"] == PAIRS


@pytest.mark.soak
def test_a_stop_at_any_moment_loses_no_step(tmp_path: Path) -> None:
    report = in_warm_process(tmp_path, 7000, stops=STOPS)["stops"]
    assert report["stops"] == STOPS and report["slowest_seconds"] < 10


@pytest.mark.soak
def test_where_one_rank_is_killed_nothing_is_left_after_ten_seconds(tmp_path: Path) -> None:
    report = in_warm_process(tmp_path, 7000, rank_kills=RANK_KILLS)["rank_kills"]
    assert report["kills"] == RANK_KILLS and report["slowest_seconds"] < 10
