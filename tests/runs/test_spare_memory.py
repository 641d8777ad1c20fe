"""Trainings that keep their newest steps in memory: killed, they resume there, and nothing of it is left at the end."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_memory
from warm import in_warm_process
from whole_runs import Place, figures, last

from dtrain.checkpoint.spare_memory import ALL, SpareMemory, home_of
from dtrain.distributed.ranks import Ranks
from dtrain.tracking.run_folder import read_run, update_run

pytestmark = pytest.mark.timeout(7200)

KEPT = {"trainer.spare_memory_every_steps": 1, "trainer.pictures": False, "loaders.train.size": 60}


def can_mount() -> bool:
    if (child := os.fork()) == 0:
        try:
            warm_memory.enter_namespace()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="SKIPPED, NOT TESTED HERE: mount namespaces need root")


def disturbed(folder: Path, **counts: int) -> dict[str, Any]:
    reports = in_warm_process(folder, 7000, warm_memory.__file__, **counts)
    for name, report in reports.items():
        assert report["kills"] == counts[name] and max(report["lost"]) <= 1, report
    return reports


@pytest.mark.slow
@needs_mounts
def test_a_lost_node_costs_a_step_at_most(tmp_path: Path) -> None:
    """And all is bit for bit as if nothing had been."""
    disturbed(tmp_path, node_losses=1)


@pytest.mark.soak
@pytest.mark.parametrize("role", ["rank_kills", "node_losses", "shard_losses"])
@needs_mounts
def test_of_sixty_disturbances_each_costs_a_step_at_most(tmp_path: Path, role: str) -> None:
    print(disturbed(tmp_path, **{role: 60}))


def kept_at_7(place: Place, name: str, **changes: Any) -> tuple[str, Path]:
    """A training whose only process was killed in its 8th step; the 7th may not have been sealed yet."""
    memory = place.folder / f"memory-{name}"
    memory.mkdir(exist_ok=True)
    file = place.config(name, **{**KEPT, "trainer.spare_memory_dir": str(memory), **changes})
    place.run(file, expect=-9, do="train 8 rank 0 KILL")
    assert not [*place.path(name).glob("checkpoints/step-*")] and [*memory.iterdir()]
    return file, memory


def test_the_next_start_resumes_also_on_more_ranks_and_gives_the_memory_back(place: Place) -> None:
    file, memory = kept_at_7(place, "more-ranks", **{"loaders.batch_size": None, "loaders.global_batch_size": 4})
    text = place.run(file, ranks=2).text
    assert re.search(r"resumes from step [67], which was kept in memory; on the disk, there is no checkpoint", text)
    place.run(place.config("one-rank", **{**KEPT, "loaders.batch_size": 4}))
    one, other = figures(place.path("one-rank")), figures(place.path("more-ranks"))
    assert one["train/loss"].keys() == other["train/loss"].keys() == {*range(1, 31)}
    assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
    assert [*memory.iterdir()] == []
    assert read_run(place.path("more-ranks"))["attempt"] == 2 and last(place.path("more-ranks")).state["step"] == 30


def test_what_another_training_has_kept_is_never_taken(place: Place) -> None:
    """Neither does a start that begins again, nor one whose last start was another way on from an older step."""
    file, memory = kept_at_7(place, "fresh")
    (old,) = memory.iterdir()
    copy = shutil.copytree(old, memory / "copy")
    text = place.run(file, "trainer.resume=none", "trainer.max_steps=3").text
    assert "kept in memory" not in text and not old.exists()
    identity = json.loads((place.path("fresh") / "run.json").read_text())["id"]
    copy.rename(memory / f"dtrain-{os.getuid()}-{identity}")  # as if it were this training's, of its first start
    place.run(file, "trainer.max_steps=4", "trainer.spare_memory_every_steps=null")
    text = place.run(file, "trainer.max_steps=5").text
    assert "kept in memory" not in text and last(place.path("fresh")).state["step"] == 5 and [*memory.iterdir()] == []


def test_where_the_launcher_gives_up_what_was_kept_becomes_a_checkpoint(place: Place) -> None:
    memory = place.folder / "memory-launcher"
    memory.mkdir()
    file = place.config("launcher-keeps", **{**KEPT, "trainer.spare_memory_dir": str(memory)})
    (running,) = place.start("launch", file, "--nproc-per-node", "2", do="train 6 rank 1 KILL")
    result = running.result(200)
    assert result.rc == 1 and "was kept in memory, and is now a checkpoint in" in result.stderr, result.text
    (path,) = place.path("launcher-keeps").glob("checkpoints/step-*")
    step = last(place.path("launcher-keeps")).state["step"]
    assert path.name == f"step-{step:08d}" and step in (4, 5) and [*memory.iterdir()] == []


def test_memory_that_is_too_small_or_not_there_is_a_mistake_before_the_first_step(place: Place) -> None:
    for changes, message in (
        ({"trainer.spare_memory_dir": "/nowhere"}, "trainer.spare_memory_dir: there is no folder /nowhere on this"),
        ({"trainer.spare_memory_every_steps": 0}, "trainer.spare_memory_every_steps: must be at least 1, found 0"),
    ):
        result = place.run(place.config("no-memory", **{**KEPT, **changes}), expect=2)
        assert message in result.stderr and "no-memory.yaml:" in result.stderr and "Traceback" not in result.text


@pytest.mark.parametrize("what", ["a link", "a file", "another user's"])
def test_what_stands_where_the_steps_are_to_lie_ends_no_training(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    spare = SpareMemory(ranks, 1, tmp_path, said.append)
    home, other = home_of(tmp_path, "training"), tmp_path / "other"
    other.mkdir()
    (other / "kept.head").write_text("of another program")
    if what == "a link":
        home.symlink_to(other)
    elif what == "a file":
        home.write_text("in the way")
    else:
        home.mkdir()
        (home / "file").write_text("theirs")
        monkeypatch.setattr("shutil.rmtree", lambda path: [*(path / "not permitted").iterdir()])
        monkeypatch.setattr("os.getuid", lambda: home.stat().st_uid + 1)
        monkeypatch.setattr("dtrain.checkpoint.spare_memory.home_of", lambda *_: home)
    spare.open("training", 1)
    spare.take(ALL, {"step": 1}, {"w": torch.ones(2)}, None, {})
    spare.seal((1, 0, 0), tmp_path / "journal")
    spare.close(is_saved=True)
    assert (other / "kept.head").read_text() == "of another program"
    if what == "another user's":
        assert said == [f"warning: {ranks.host} keeps nothing in memory from now on: {home} cannot be made a folder of "
                        "this user's"]  # fmt: skip
        assert [path.name for path in home.iterdir()] == ["file"]
    else:
        assert said == [] and not os.path.lexists(home)


@pytest.mark.parametrize("ending", [".head", ".data"])
def test_a_bit_that_changed_in_memory_is_named_and_the_step_before_is_taken(tmp_path: Path, ending: str) -> None:
    said: list[str] = []
    run, memory = tmp_path / "run", tmp_path / "memory"
    run.mkdir()
    memory.mkdir()
    update_run(run, id="training", attempt=1)
    spare = SpareMemory(Ranks(0, 0, 1, torch.device("cpu")), 1, memory, said.append)
    spare.open("training", 1)
    for step in (1, 2):
        spare.take(ALL, {"step": step}, {"w": torch.full((600,), float(step))}, None, {})
        spare.seal((step, 0, 0), tmp_path / "journal")
        spare.wait()
    kept = spare.look(run)
    assert kept is not None and kept.place == (2, 0, 0) and said == []
    file = home_of(memory, "training") / f"all-0-1{ending}"  # the second of the two that take turns
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    kept = spare.look(run)
    assert kept is not None and kept.place == (1, 0, 0)
    head = file.with_suffix(".head")
    assert said == [f"warning: {head} is damaged: it differs from its checksum, and is not used"]
    spare.close(is_saved=True)


def test_where_nothing_was_kept_no_folder_stays(tmp_path: Path) -> None:
    spare = SpareMemory(Ranks(0, 0, 1, torch.device("cpu")), 1, tmp_path, print)
    spare.open("training", 1)
    assert [*tmp_path.iterdir()] == [home_of(tmp_path, "training")]
    spare.close(is_saved=False)
    assert [*tmp_path.iterdir()] == []


def test_memory_that_does_not_suffice_is_said(place: Place, mounted: Any) -> None:
    """Before the first step what is known then; later the training continues without."""
    small = mounted("size=8k")
    (alone,) = [SpareMemory(Ranks(0, 0, 1, torch.device("cpu")), 1, small, print)]
    assert alone.check(4000) == ""
    assert re.match(rf"{small} of \S+ has 8.19e-06 GB free, and at least 8.2e-06 GB are needed", alone.check(4100))
    result = place.run(place.config("full-memory", **KEPT, **{"trainer.spare_memory_dir": str(small)}))
    assert result.text.count("keeps nothing in memory from now on: ") == 1, result.text
    assert [*small.iterdir()] == []
