"""Snapshots in shared memory: whole or absent, damaged ones found, nothing in them executed."""

import json
import os
import pickle
import random
import zlib
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import equal

from dtrain.checkpoint import memory_slot, spare_memory
from dtrain.checkpoint.contents import CheckpointError, Snapshot, take_snapshot
from dtrain.checkpoint.memory_slot import DATA, HEAD, Slot, found_in, mapped, snapshot_of

FACTS = {"kind": "all", "rank": 0, "place": (3, 0, -1), "attempt": 1, "world_size": 1}


def content(step: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, one of them tied, and a state of all types that a checkpoint may hold."""
    draws = torch.Generator().manual_seed(step)
    table = torch.randn(700, 9, generator=draws)
    weights = OrderedDict(table=table, tied=table, images=torch.randn(2, 3, 4, 5, generator=draws).contiguous(
        memory_format=torch.channels_last), extra=["a", step])  # fmt: skip
    weights._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    state = {
        "step": step, "float": 0.1, "none": None, 3: (True, b"bytes", bytearray(b"more")), "set": {1, 2}, "c": 1 + 2j,
        "size": torch.Size([2]), "dtype": torch.bfloat16, "device": torch.device("cpu"), "counter": Counter("aab"),
        "numbers": [7] * 625, "half": torch.arange(5, dtype=torch.float16), "none of them": torch.empty(0, 3),
        "scalar": torch.tensor(step), "sparse": torch.eye(3).to_sparse(), "bits": torch.tensor([True, False]),
    }  # fmt: skip
    return weights, state


def keep(slot: Slot, step: int) -> None:
    weights, state = content(step)
    slot.seal({**FACTS, "place": (step, 0, -1)}, slot.take(weights, state, None, {"loss": weights}, take_snapshot))


def read(stem: Path) -> Snapshot:
    head = Path(f"{stem}{HEAD}").read_bytes()
    return snapshot_of(head, mapped(Path(f"{stem}{DATA}"), memory_slot.facts_of(head)["sizes"]))


def test_what_is_kept_is_read_back_as_it_was(tmp_path: Path) -> None:
    slot = Slot(tmp_path / "all-0-0")
    for step in (1, 2):  # the second into the memory of the first
        keep(slot, step)
    found, (weights, state) = read(tmp_path / "all-0-0"), content(2)
    assert equal(found.weights.tensors, {key: weights[key] for key in ("table", "images")})
    assert found.weights.tensors["images"].is_contiguous(memory_format=torch.channels_last)
    assert found.weights.aliases == {"tied": "table"} and found.weights.rest["extra"] == ["a", 2]
    assert found.weights.rest._metadata == weights._metadata  # type: ignore[attr-defined]
    sparse = found.state.pop("sparse"), state.pop("sparse")
    assert torch.equal(sparse[0].to_dense(), sparse[1].to_dense()) and equal(found.state, state)
    assert {key: type(value) for key, value in found.state.items()} == {key: type(state[key]) for key in state}
    assert equal(found.others["loss"].tensors["table"], weights["table"])
    (path, facts), *others = found_in(tmp_path)
    assert path == slot.head and facts["place"] == (2, 0, -1) and not others


def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """Between the copy and the seal there is none: the other slot has the one before."""
    slots = [Slot(tmp_path / f"all-0-{number}") for number in (0, 1)]
    keep(slots[0], 1)
    keep(slots[1], 2)
    slots[0].take(*content(3), None, {}, take_snapshot)  # and killed
    assert [facts["place"][0] for _, facts in found_in(tmp_path)] == [2]
    assert equal(read(tmp_path / "all-0-1").state["numbers"], content(2)[1]["numbers"])


def test_every_damage_is_found(tmp_path: Path) -> None:
    slot = Slot(tmp_path / "all-0-0")
    keep(slot, 1)
    used = sum(extent.numel() for extent in slot.extents)
    chance = random.Random(0)
    for path, size in ((slot.head, slot.head.stat().st_size), (slot.data, used)):
        whole = path.read_bytes()
        for _ in range(30):
            bit = chance.randrange(8 * size)
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            assert [*found_in(tmp_path)] == [], (path, bit)
        path.write_bytes(whole[: size // 2])
        assert [*found_in(tmp_path)] == []
        path.write_bytes(whole)
        assert len([*found_in(tmp_path)]) == 1
    pages = bytearray(slot.data.read_bytes())
    pages[:4096], pages[4096:8192] = pages[4096:8192], pages[:4096]
    slot.data.write_bytes(pages)
    assert [*found_in(tmp_path)] == []


def test_nothing_in_a_head_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    body = pickle.dumps({**FACTS, "sizes": [], "sums": []}) + pickle.dumps(Evil())
    with pytest.raises(pickle.UnpicklingError, match="mkdir is nothing that a checkpoint holds"):
        snapshot_of(zlib.crc32(body).to_bytes(4, "little") + body, [])
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="damaged"):
        snapshot_of(b"0000" + body, [])


def test_memory_that_is_full_is_an_error_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing beyond it would end the process with SIGBUS."""
    monkeypatch.setattr(memory_slot, "free_bytes", lambda folder: 5000)
    slot = Slot(tmp_path / "all-0-0")
    with pytest.raises(OSError, match="GB more are needed"):
        slot.take({"w": torch.zeros(10000)}, {}, None, {}, take_snapshot)
    assert [*found_in(tmp_path)] == []


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = os.statvfs(tmp_path)  # of this moment: others write to the disk, too
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    assert 0 < memory_slot.free_bytes(tmp_path) <= space.f_bavail * space.f_frsize


def test_memory_that_another_launchers_ranks_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a spare that is stopped beside them must; nor is anything saved while the training continues elsewhere."""
    run, memory = tmp_path / "run", tmp_path / "memory"
    run.mkdir()
    memory.mkdir()
    (run / "run.json").write_text(json.dumps({"id": "training", "attempt": 1}))
    home = spare_memory.home_of(memory, "training")
    home.mkdir()
    used = (home / "all-0-0.data").open("wb")
    assert spare_memory.save_what_is_kept(run, memory) == "" and home.is_dir()
    used.close()
    monkeypatch.setattr(spare_memory, "writer_of", lambda folder: "another node's rank")
    monkeypatch.setattr(spare_memory, "kept_in", lambda *_: pytest.fail("the others have it, too"))
    assert spare_memory.save_what_is_kept(run, memory) == "" and not home.exists()
