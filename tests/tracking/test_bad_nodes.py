"""The note of nodes that a training leaves out: written by several, read and cleared by a person."""

from pathlib import Path

import pytest

from dtrain.tracking.bad_nodes import bad_nodes, note_bad_node, note_failed_node


def test_a_node_is_left_out_from_its_second_failure_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert bad_nodes(run) == {}
    note_failed_node(run, "gpu1", "rank 3 killed by SIGKILL")
    assert bad_nodes(run) == {} and "gpu1  " in (run / "bad-nodes").read_text()
    note_bad_node(run, "gpu2", "hung: no\n progress")
    note_failed_node(run, "gpu1", "rank 2 killed by SIGBUS")
    found = bad_nodes(run)
    assert list(found) == ["gpu1", "gpu2"]
    assert (
        found["gpu1"][19:] == "  failed twice: rank 2 killed by SIGBUS" and found["gpu2"][19:] == "  hung: no progress"
    )
    lines = (run / "bad-nodes").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["#", "#", "gpu1", "gpu2"]


def test_a_person_takes_lines_away_and_adds_them(tmp_path: Path) -> None:
    note_bad_node(tmp_path, "gpu1", "slow: rank 3")
    note_bad_node(tmp_path, "gpu2", "slow: rank 5")
    file = tmp_path / "bad-nodes"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "gpu1" not in line) + "\ngpu7\n")
    assert list(bad_nodes(tmp_path)) == ["gpu2", "gpu7"]
    file.unlink()
    assert bad_nodes(tmp_path) == {}


def test_what_cannot_be_noted_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    note_bad_node(tmp_path / "file", "gpu1", "slow")
    assert bad_nodes(tmp_path / "file") == {}
