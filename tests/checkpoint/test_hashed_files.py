"""Files that are hashed while they are written and read: each byte once, whatever is asked for in which order."""

import hashlib
import io
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import Place, last

from dtrain.checkpoint import checkpoint_files
from dtrain.checkpoint.checkpoint_files import load, verify
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import SAFETENSORS_NAMES
from dtrain.checkpoint.hashed_files import HashedReader, HashedWriter, tensors_in, write_tensor_file


def sealed(content: bytes) -> dict[str, object]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def bytes_read() -> int:
    """What this process has asked the system to read until now."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_read_in_which_order_the_hash_is_the_files(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    content = draw.randbytes(draw.choice((0, 1, 5000, 3 << 20, (1 << 20) + 7)))
    path = tmp_path / "file"
    path.write_bytes(content)
    with HashedReader(path) as file:
        for _ in range(draw.randrange(6)):
            at, size = draw.randrange(len(content) + 1), draw.randrange(1, 1 << 20)
            assert file.seek(at) == at and file.read(size) == content[at : at + size]
            assert file.tell() == min(len(content), at + size)
        assert file.seal() == sealed(content)


def test_a_file_is_sealed_as_it_is_written(tmp_path: Path) -> None:
    with HashedWriter(tmp_path / "state.pt") as file:
        torch.save({"a": torch.arange(100_000.0)}, file)
        seal = file.seal()
    assert seal == sealed((tmp_path / "state.pt").read_bytes())
    assert torch.load(tmp_path / "state.pt")["a"].tolist() == list(range(100_000))


def test_a_tensor_file_is_what_safetensors_itself_reads_and_writes(tmp_path: Path) -> None:
    tensors = {f"{dtype}": torch.arange(3).to(dtype) for dtype in SAFETENSORS_NAMES if "float8" not in str(dtype)}
    tensors |= {f"{dtype}": torch.ones(3).to(dtype) for dtype in SAFETENSORS_NAMES if "float8" in str(dtype)}
    tensors |= {"empty": torch.ones(0, 2), "number": torch.tensor(7), "turned": torch.arange(6.0).view(2, 3).T}
    seal = write_tensor_file(tmp_path / "own", tensors, {"b": "1", "a": "2"})
    assert seal == sealed((tmp_path / "own").read_bytes())
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs")
    with HashedReader(tmp_path / "theirs") as file:
        theirs, _ = tensors_in(file)
    for name, value in load_file(tmp_path / "own").items():
        assert value.dtype == tensors[name].dtype == theirs[name].dtype and value.shape == theirs[name].shape
        own = tensors[name].reshape(-1).view(torch.uint8).tolist()
        for one in (value, theirs[name]):
            assert one.reshape(-1).view(torch.uint8).tolist() == own


def test_what_a_start_verifies_is_read_once_and_needs_no_second_reading(tmp_path: Path) -> None:
    weights = {f"w{number}": torch.randn(512, 512) for number in range(4)}
    state = {"optimizer": {"moments": [torch.randn(512, 512) for _ in range(8)]}}
    path = Checkpoints(tmp_path).save(1, weights, state, ema=weights)
    size = sum(file.stat().st_size for file in path.iterdir())
    contents: checkpoint_files.Contents = {}
    before = bytes_read()
    assert verify(path, contents) == []
    loaded = load(path, is_verified=True, contents=contents)
    assert bytes_read() - before < size + 100_000 and not contents
    for name, value in weights.items():
        assert torch.equal(loaded.weights[name], value) and torch.equal(loaded.ema[name], value)  # type: ignore[index]
    moments = loaded.state["optimizer"]["moments"]
    assert all(map(torch.equal, moments, state["optimizer"]["moments"]))
    assert len({moment.untyped_storage().data_ptr() for moment in moments}) == 8, "each can be freed by itself"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_of_a_damaged_checkpoint_nothing_is_kept(tmp_path: Path, name: str) -> None:
    path = Checkpoints(tmp_path).save(1, {"w": torch.randn(1000)}, {"m": torch.randn(1000)})
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    contents: checkpoint_files.Contents = {}
    assert verify(path, contents) == [f"{name}: damaged, its SHA-256 is not the manifest's"]
    assert contents == {}


def test_a_training_that_resumes_opens_each_file_once(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    here("read-once", **{"trainer.max_steps": 3, "trainer.ema_decay": 0.9})
    opened: list[Path] = []

    class Counted(HashedReader):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    seal = checkpoint_files._seal
    monkeypatch.setattr(checkpoint_files, "HashedReader", Counted)
    monkeypatch.setattr(checkpoint_files, "_seal", lambda path: opened.append(path) or seal(path))
    monkeypatch.setattr(checkpoint_files, "_seals", {})
    run = here("read-once", **{"trainer.max_steps": 5, "trainer.ema_decay": 0.9})
    of_resumed = sorted(path.name for path in opened if path.parent.name == "step-00000003")
    assert of_resumed == ["ema.safetensors", "model.safetensors", "state.pt"]
    assert last(run).state["step"] == 5


def test_memory_that_is_read_into_is_not_touched_after_the_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 22))
    with HashedReader(tmp_path / "file") as file:
        memory = bytearray(1 << 22)
        assert isinstance(file, io.RawIOBase) and file.readinto(memory) == 1 << 22
        memory[:] = bytes(1 << 22)  # the thread has hashed all of it by now
        assert file.seal() == sealed((tmp_path / "file").read_bytes())
