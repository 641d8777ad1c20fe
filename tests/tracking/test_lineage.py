"""Which data a run had: digests that change with the data and with nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.tracking import lineage as module
from dtrain.tracking.lineage import lineage

FACTS: dict[str, Any] = {"name": "Volumes", "class": "Volumes", "samples": 7, "arguments": {"file_paths": ["d/*.h5"]}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    for name in ("a.h5", "b.h5"):
        (tmp_path / "d" / name).write_bytes(name.encode() * 100)
    return tmp_path


def digest(folder: Path, **changes: Any) -> str:
    return lineage({"train": FACTS | changes}, folder)[0]["digest"]


def test_a_set_has_its_name_size_and_files(data: Path) -> None:
    (found,) = lineage({"val/near": FACTS}, data)
    assert (found["context"], found["name"], found["source_type"]) == ("val/near", "Volumes", "local")
    profile, source = json.loads(found["profile"]), json.loads(found["source"])
    assert (profile["samples"], profile["files"], profile["bytes"]) == (7, 2, 800)
    assert source["uri"] == str(data / "d")


@pytest.mark.parametrize("reads_whole", [True, False])
def test_the_digest_changes_with_the_data_alone(data: Path, reads_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not reads_whole:
        monkeypatch.setattr(module, "_READ_BYTES", 0)
    before = digest(data)
    assert digest(data) == before
    assert digest(data, samples=8) != before
    assert digest(data, arguments={"file_paths": ["d/a.h5"]}) != before
    assert digest(data, arguments={"root": "d"}) != before
    (data / "other.h5").write_bytes(b"1")
    assert digest(data) == before, "not one of its files"
    (data / "d" / "a.h5").write_bytes(b"A.h5" * 100)
    assert digest(data) != before, "the same size, another content"


def test_data_that_are_not_files_have_a_digest_of_what_makes_them(tmp_path: Path) -> None:
    made = {"name": "Points", "class": "toy.Points", "samples": 8, "arguments": {"seed": 1, "split": "train"}}
    (one,), (other,) = (lineage({"train": made | {"arguments": {"seed": seed}}}, tmp_path) for seed in (1, 2))
    assert one["digest"] != other["digest"] and one["source_type"] == "code"
