"""Saving while training goes on: slow, full and broken disks, little memory, an end that does not wait."""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import EXACT, Place, figures, last, same_training

from dtrain.checkpoint.background_saver import Saver
from dtrain.checkpoint.checkpoint_files import load, verify
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError, HostMemory, take_snapshot
from dtrain.checkpoint.device_copies import DeviceCopies
from dtrain.tracking.run_folder import read_run, update_run

pytestmark = pytest.mark.timeout(600)

# Beside a config, like a user's module: what its models do in a certain training step, to the disk and to the process.
TROUBLE = '''
import os, resource, signal, threading, time
from pathlib import Path
import torch
from filelock import FileLock
from toy import MLP

FOLDER = Path("CHECKPOINTS")
LOCK = FileLock(FOLDER / ".lock")


class Eventful(MLP):
    """`at` says what happens at which of its training forwards."""

    def __init__(self, at, rank=0, **more):
        super().__init__(**more)
        self.at, self.step = {int(step): event for step, event in at.items()}, 0
        self.mine = os.environ.get("RANK", "0") == str(rank)

    def forward(self, x):
        self.step += self.training
        if self.training and self.mine:
            for event in self.at.get(self.step, "").split():
                getattr(self, event)()
        return super().forward(x)

    def fill(self):
        """Take all the space there is, once what is under way is written."""
        with LOCK, open(FOLDER / "filler", "wb") as file:
            space = os.statvfs(FOLDER)
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)

    def free(self):
        (FOLDER / "filler").unlink()

    def lock(self):
        LOCK.acquire()

    def unlock(self):
        assert not (FOLDER / "step-00000003").exists()
        LOCK.release()

    def interrupt_twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()

    def narrow(self):
        """Leave this process no more memory than it has, and a little."""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        try:
            torch.empty(1 << 30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def use_up_gpu(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Large(MLP):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Parameter(torch.zeros(5_000_000))
'''


def eventful(folder: Path, checkpoints: Path, at: dict[int, str], **more: Any) -> dict[str, Any]:
    """The changes to a config that make such things happen; each folder of checkpoints has a module of its own."""
    module = f"trouble_{checkpoints.parent.name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(TROUBLE.replace("CHECKPOINTS", str(checkpoints)))
    model = {"name": f"{module}.Eventful", "at": {str(step): event for step, event in at.items()}}
    return {"modules": ["toy", module], "model": model, "trainer.checkpoint_every_steps": 1, **more}


@pytest.fixture
def small_disk(mounted: Callable[[str], Path], tmp_path: Path) -> Callable[[Path], Path]:
    """`small_disk(run)`: a run folder whose checkpoints lie on a disk of 1 MB."""

    def make(run: Path) -> Path:
        run.mkdir()
        (run / "checkpoints").symlink_to(mounted("size=1m"))
        return run / "checkpoints"

    return make


Here = Callable[..., Path]


def test_a_disk_that_is_full_for_a_while_costs_a_warning_and_nothing_else(
    here: Here, small_disk: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = here("whole", **{"trainer.checkpoint_every_steps": 1})
    changes = eventful(tmp_path, small_disk(tmp_path / "run-full"), {3: "fill", 6: "free"})
    capsys.readouterr()
    run = here("full", **changes)
    out = capsys.readouterr().out
    warned = [step for step in range(1, 17) if f"warning: no checkpoint of step {step}: " in out]
    assert len(warned) >= 2 and set(warned) <= {2, 3, 4, 5, 6}
    assert all(out.count(f"no checkpoint of step {step}:") == 1 for step in warned)
    assert "The disk is full" in out and "No space left on device (need:" in out
    assert figures(run) == figures(whole)
    assert last(run).state["step"] == 16 and read_run(run)["state"] == "FINISHED"


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_older_ones_are_whole(
    here: Here, small_disk: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 16: .*The disk is full"):
        here("never", **eventful(tmp_path, small_disk(tmp_path / "run-never"), {12: "fill"}))
    run = tmp_path / "run-never"
    facts = read_run(run)
    assert (facts["state"], facts["exit_status"]) == ("FAILED", 1) and "The disk is full" in facts["reason"]
    assert last(run).state["step"] in (10, 11, 12)
    (run / "checkpoints" / "filler").unlink()
    here("never")  # what is missing is trained again
    assert last(run).state["step"] == 16 and read_run(run)["state"] == "FINISHED"


def test_two_ranks_agree_on_what_to_do_about_a_full_disk(
    place: Place, small_disk: Callable[[Path], Path], tmp_path: Path
) -> None:
    changes = eventful(place.folder, small_disk(tmp_path / "run-two"), {3: "fill"})
    config = place.config("two-full", **changes, **{"trainer.checkpoint_dir": str(tmp_path / "run-two")})
    results = [running.result(200) for running in place.start(config, ranks=2)]
    assert [result.rc for result in results] == [1, 1], "".join(result.text for result in results)
    assert "no checkpoint of step 8: " in read_run(tmp_path / "run-two")["reason"]
    assert "warning: no checkpoint of step 4: " in results[0].stdout


def test_a_model_for_which_the_disk_is_too_small_is_refused_before_the_first_step(
    here: Here, small_disk: Callable[[Path], Path], tmp_path: Path
) -> None:
    checkpoints = small_disk(tmp_path / "run-large")
    changes = eventful(tmp_path, checkpoints, {})
    changes["model"] = {"name": changes["model"]["name"].replace("Eventful", "Large")}
    with pytest.raises(CheckpointError, match=r"No space left on device \(need: 20\.0 MB, free: 1"):
        here("large", **changes)
    assert not figures(tmp_path / "run-large")


def test_the_loop_goes_on_while_a_checkpoint_is_written(here: Here, tmp_path: Path) -> None:
    """The writer is held up from step 3 to step 6, where the model finds nothing written."""
    whole = here("whole")
    changes = eventful(tmp_path, tmp_path / "run-held" / "checkpoints", {3: "lock", 6: "unlock"})
    run = here("held", **changes | {"trainer.checkpoint_every_steps": 3, "trainer.keep_last": 9})
    assert figures(run) == figures(whole)
    found = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert found == [3, 6, 8, 9, 12, 15, 16] and not any(verify(path) for path in run.glob("checkpoints/step-*"))


def test_the_writer_has_written_all_when_the_training_has_ended(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(folder: Path, **facts: Any) -> None:
        time.sleep(0.3)
        update_run(folder, **facts)

    monkeypatch.setattr("dtrain.checkpoint.background_saver.update_run", slow)
    run = here("written")
    ended = read_run(run)
    time.sleep(0.6)
    assert ended["save_seconds"] > 0 and read_run(run) == ended


def test_a_second_ctrl_c_waits_for_no_checkpoint(place: Place) -> None:
    run = place.path("impatient")
    changes = eventful(place.folder, run / "checkpoints", {3: "lock interrupt_twice"})
    place.run(place.config("impatient", **changes), expect=130)  # the lock is never given back
    assert read_run(run)["state"] == "KILLED" and last(run).state["step"] in (1, 2)


def test_an_error_of_the_writer_that_is_no_disks_is_not_swallowed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise ZeroDivisionError("a mistake in the writer")

    monkeypatch.setattr(Checkpoints, "write", broken)
    with pytest.raises(ZeroDivisionError, match="a mistake in the writer"):
        here("broken")


def test_too_little_memory_in_the_writer_costs_a_warning(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Checkpoints.write

    def narrow(self: Checkpoints, step: int, *given: Any) -> Path:
        if step == 8:
            raise MemoryError
        return write(self, step, *given)

    monkeypatch.setattr(Checkpoints, "write", narrow)
    assert last(here("narrow")).state["step"] == 16
    assert "warning: no checkpoint of step 8: out of memory" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before_and_no_start(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EXACT | {"trainer.checkpoint_every_steps": 1, "trainer.keep_last": 4, "loaders.num_workers": 0}
    whole = here("whole", **settings)
    steps = last(whole).state["step"]
    for step in range(3, 9, 2):
        monkeypatch.setenv("TOY_DO", "train 6 rank 0 TERM")
        stopped = here("hurt", expect="KILLED", **settings)
        newest = stopped / "checkpoints" / "last" / "model.safetensors"
        data = bytearray(newest.read_bytes())
        data[-step] ^= 1
        newest.write_bytes(data)
    monkeypatch.setenv("TOY_DO", "")
    with pytest.warns(UserWarning, match="damaged checkpoints"):
        here("hurt", **settings)
    assert last(stopped).state["step"] == steps
    same_training(stopped, whole)


def test_a_copy_does_not_change_with_the_training() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = {
        "turned": weight.t(), "row": weight[0], "number": torch.tensor(1.0), "none": torch.empty(0),
        "graph": torch.eye(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex64).conj(),
    }  # fmt: skip
    snapshot = take_snapshot({"w": weight, "tied": weight}, state, {"w": weight}, copies={})
    weight.add_(100)
    for value in (state["number"], state["graph"]._values(), state["complex"]):
        value.mul_(0)
    assert snapshot.ema is not None and snapshot.weights.aliases == {"tied": "w"}
    for part in (snapshot.weights, snapshot.ema):
        assert float(part.tensors["w"].max()) == 5
    assert float(snapshot.state["turned"].max()) == 5 and float(snapshot.state["row"].max()) == 2
    assert float(snapshot.state["number"]) == 1 and float(snapshot.state["graph"].to_dense().sum()) == 3
    assert float(snapshot.state["complex"].real.sum()) == 2


def test_the_next_copy_takes_the_memory_of_the_last() -> None:
    copies: dict[str, torch.Tensor] = {}
    weights, state = {"w": torch.zeros(3, 4), "cut": torch.zeros(2)}, {"gone": torch.zeros(5), "cast": torch.zeros(6)}
    take_snapshot(weights, state, {"w": weights["w"]}, copies)
    before = {place: copy.data_ptr() for place, copy in copies.items()}
    # Not the average: it is "w" itself.
    assert set(before) == {"weights['w']", "weights['cut']", "state['gone']", "state['cast']"}
    weights = {"w": torch.arange(12.0).view(3, 4), "cut": torch.ones(3)}
    snapshot = take_snapshot(weights, {"cast": torch.ones(6, dtype=torch.int64), "new": weights["cut"]}, None, copies)
    for name, weight in weights.items():
        assert torch.equal(snapshot.weights.tensors[name], weight)
    assert snapshot.state["cast"].dtype == torch.int64 and torch.equal(snapshot.state["new"], torch.ones(3))
    assert set(copies) == {"weights['w']", "weights['cut']", "state['cast']"}
    assert copies["weights['w']"].data_ptr() == before["weights['w']"]
    assert sum(copy.nbytes for copy in copies.values()) == snapshot.need_bytes


def test_clones_of_a_device_are_copied_as_they_were_and_what_has_no_room_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = DeviceCopies(torch.device("cpu"))  # whose side stream does all at once, when it is asked to
    large, small = torch.arange(1000.0), torch.arange(4.0)
    monkeypatch.setattr(memory._side, "free_bytes", lambda: 40.0)
    copies: dict[str, torch.Tensor] = {}
    hosts = [memory.empty_like(value) for value in (large, small, small)]
    for host, value in zip(hosts, (large, small, small), strict=True):
        memory.copy(host, value)
    assert [host is hosts[1] for host, _ in memory._clones] == [True], "half of 40 bytes is room for one small one"
    assert torch.equal(hosts[0], large) and torch.equal(hosts[2], small), "in the order of the device's work"
    small.zero_()
    memory.finish()()
    assert hosts[1].tolist() == [0, 1, 2, 3] and memory._clones == []
    snapshot = take_snapshot({"w": small}, {"s": large}, None, copies, memory=memory)
    assert snapshot.until_there is not None and copies.keys() == {"weights['w']", "state['s']"}
    snapshot.until_there()
    assert torch.equal(snapshot.weights.tensors["w"], small) and torch.equal(snapshot.state["s"], large)


def test_the_writer_waits_for_copies_that_a_device_still_makes_and_the_loop_does_not(tmp_path: Path) -> None:
    arrives = threading.Event()

    class Late(HostMemory):
        """As a GPU: what is copied is what was there at the time, and it comes later."""

        def __init__(self) -> None:
            self.clones: list[tuple[torch.Tensor, torch.Tensor]] = []

        def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
            self.clones.append((host.fill_(-1), tensor.clone()))

        def finish(self) -> Callable[[], None]:
            def come() -> None:
                assert arrives.wait(200)
                for host, clone in self.clones:
                    host.copy_(clone)

            return come

    weight, said = torch.ones(1000), []
    saver = Saver(Checkpoints(tmp_path), None, said.append, Late())
    saver.save((1, 0, 0), {"step": 1}, {"w": weight}, None, {}, None)
    weight.fill_(2)  # the next step, while nothing is there yet
    assert not [*tmp_path.glob("step-*")]
    arrives.set()
    saver.finish()
    assert load(tmp_path / "step-00000001").weights["w"].tolist() == [1] * 1000 and not said


def test_weights_in_another_layout_come_back(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    snapshot = take_snapshot({"w": weight, "turned": weight.permute(3, 2, 1, 0)}, {}, copies={})
    back = load(Checkpoints(tmp_path).write(1, snapshot)).weights
    assert torch.equal(back["w"], weight) and torch.equal(back["turned"], weight.permute(3, 2, 1, 0))


def test_a_copy_that_fails_ends_the_training_and_is_not_waited_for(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("dtrain.checkpoint.background_saver.take_snapshot", failing)
    with pytest.raises(RuntimeError, match="can't allocate"):
        here("no-copy")


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_that_is_used_up_is_told_as_such(here: Here, tmp_path: Path) -> None:
    changes = eventful(tmp_path, tmp_path / "run-narrow" / "checkpoints", {3: "narrow"})
    with pytest.raises(RuntimeError, match="allocate") as failure:
        here("narrow", **changes)
    assert "what helps: out of host memory: lower loaders.num_workers" in failure.value.__notes__[-1]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_gpu_that_is_full_on_one_rank_ends_both_with_what_helps(place: Place) -> None:
    changes = eventful(place.folder, place.path("gpu") / "checkpoints", {3: "use_up_gpu"}, **{"model.rank": 1})
    changes["model"] |= {"rank": changes.pop("model.rank")}
    started = place.start(place.config("gpu", **changes), ranks=2)
    results = [running.result(200) for running in started]
    assert [result.rc for result in results] == [1, 1]
    assert "rank 1 failed at step 3 (forward): OutOfMemoryError: CUDA out of memory" in results[0].stderr
    assert "what helps: lower loaders.batch_size and raise trainer.accumulate" in results[0].stderr
    assert last(place.path("gpu")).state["step"] == 2


def test_loader_workers_without_shared_memory_are_told_from_others(place: Place) -> None:
    place.write(
        "bulky.py",
        "import torch\n\n\nclass Bulky(torch.utils.data.Dataset):\n"
        "    def __len__(self):\n        return 8\n\n"
        "    def __getitem__(self, index):\n        return torch.zeros(1_000_000), 0\n\n\n"
        "class Thin(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Linear(2, 2)\n\n"
        "    def forward(self, x):\n        return self.layer(x[:, :2])\n",
    )
    changes = {
        "modules": ["bulky", "toy"], "model.name": "Thin", "metrics": None,
        "loaders": {"name": "Bulky", "batch_size": 2, "num_workers": 1, "train": {}},
    }  # fmt: skip
    inside = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    launcher = ["unshare", "-m", "sh", "-c", inside, "sh", sys.executable]
    if os.system("unshare -m true 2> /dev/null"):
        pytest.skip("SKIPPED, NOT TESTED HERE: a /dev/shm of one's own needs root")
    place.run(place.config("bulky", **changes), launcher=launcher, expect=1)
    failure = (place.path("bulky") / "failure.json").read_text()
    assert "too little shared memory for loader workers" in failure
