"""The order of samples, what each rank gets of it from any position, exact evaluation, and each sample's randomness."""

import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.data import rng
from dtrain.data.loader_workers import end_workers, obey_parent_alone, stacks_of_workers
from dtrain.data.samplers import permuted
from dtrain.dataloader import MicroBatch, TrainLoader, get_train_loaders


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    """What a test held on to would be ended by the garbage collector of a later one."""
    yield
    end_workers()


# What a user's module holds. `modules: [test_dataloader]` finds it here.


class Numbers(Dataset[int]):
    """Item i is the number i: no random numbers are needed."""

    random = False

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """An item draws from all three generators, as augmentations do."""

    random = True

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([index, *draws], dtype=torch.float64)


class Broken(Numbers):
    """Sample 7 cannot be read."""

    def __init__(self, size: int = 10, error: str = "ValueError") -> None:
        super().__init__(size)
        self.error = {"ValueError": ValueError("the file is cut"), "KeyError": KeyError("image")}[error]

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise self.error
        return index


class WhoLoads(Numbers):
    """An item is the number of the worker process that loaded it."""

    def __getitem__(self, index: int) -> int:
        worker = get_worker_info()
        return -1 if worker is None else worker.id


class DiesWith(Numbers):
    """An item is the signal that the kernel sends the loading process when its parent dies."""

    def __getitem__(self, index: int) -> int:
        asked = ctypes.c_int(-1)
        ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
        return asked.value


class Stuck(Numbers):
    """Sample 3 takes for ever."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            time.sleep(3600)
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


class Jittered(TensorDataset):
    """A class derived from TensorDataset that transforms its items."""

    def __init__(self) -> None:
        super().__init__(torch.arange(12.0))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return (super().__getitem__(index)[0] + torch.rand(()),)


def mixup(samples: list[torch.Tensor]) -> torch.Tensor:
    """A collate function that draws."""
    share = torch.rand(())
    return torch.stack(samples) * share + torch.stack(samples[::-1]) * (1 - share)


def loader(  # noqa: PLR0913
    size: int = 10,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 4,
    accumulate: int = 1,
    drop_last: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    dataset: Any = None,
    **options: Any,
) -> TrainLoader:
    """A TrainLoader as get_train_loaders makes it."""
    settings = {
        "num_workers": 0,
        "persistent_workers": True,
        "collate_fn": None,
        "prefetch_factor": None,
        "timeout": 0,
        "multiprocessing_context": None,
        "pin_memory": False,
    }
    more = {"accumulate": accumulate, "shuffle": shuffle, "drop_last": drop_last}
    dataset = Numbers(size) if dataset is None else dataset
    return TrainLoader(dataset, seed, rank, world_size, batch_size, **settings | options | more)


def epoch_of_all(world_size: int, epoch: int = 0, start: int = 0, **settings: Any) -> list[list[MicroBatch]]:
    """An epoch's batches of every rank."""
    return [
        list(loader(rank=rank, world_size=world_size, **settings).epoch(epoch, start)) for rank in range(world_size)
    ]


def counted(micro: MicroBatch) -> list[int]:
    """The samples of a batch that count: none of a rank's dummy batch."""
    return [int(item) for item in micro.batch[: micro.samples]]


def of_config(**loaders: Any) -> Any:
    """A config with these loaders."""
    sections = {"model": {"name": "Identity"}, "loss": {"name": "MSELoss"}, "optimizer": {"name": "SGD", "lr": 0.1}}
    return from_mapping(sections | {"modules": ["test_dataloader"], "loaders": loaders, "trainer": {"max_epochs": 1}})


def test_without_shuffle_the_order_is_the_datasets() -> None:
    batches = [counted(micro) for micro in loader(10, shuffle=False).epoch(3)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# What each rank gets


SPLITS = list(product((1, 2, 3, 4), (1, 3), (1, 2), (False, True)))  # ranks, batch size, accumulate, drop_last


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate", "drop_last"), SPLITS)
def test_the_ranks_together_see_each_sample_once_from_any_position(
    world_size: int, batch_size: int, accumulate: int, drop_last: bool
) -> None:
    for size in (*range(1, 14), 23, 24, 25, 37, 40):
        order = permuted(np.arange(size), size, 0, 1).tolist()
        for start in sorted({0, 1, size // 3, size // 2, size - 1, size}):
            ranks = epoch_of_all(
                world_size, 1, start, size=size, batch_size=batch_size, accumulate=accumulate, drop_last=drop_last
            )
            whole = (size - start) // (batch_size * world_size) * batch_size * world_size
            expected = order[start : start + whole] if drop_last else order[start:]
            assert sorted(index for rank in ranks for micro in rank for index in counted(micro)) == sorted(expected)
            assert len({len(rank) for rank in ranks}) == 1, "every rank has as many batches as the others"


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate", "drop_last"), SPLITS)
def test_the_weights_of_a_step_give_the_mean_over_its_samples(
    world_size: int, batch_size: int, accumulate: int, drop_last: bool
) -> None:
    for size, start in product((1, 2, 7, 12, 25, 40), (0, 1, 5)):
        ranks = epoch_of_all(
            world_size, 0, start, size=size, batch_size=batch_size, accumulate=accumulate, drop_last=drop_last
        ) if start < size else []  # fmt: skip
        for group in groups(ranks):
            assert sum(micro.weight for rank in group for micro in rank) == pytest.approx(world_size)
            values = [counted(micro) for rank in group for micro in rank]
            mean = np.mean([value for batch in values for value in batch])
            # What DDP makes of it: each rank's sum of weighted batch means, averaged over the ranks.
            weighted = sum(
                micro.weight * float(torch.as_tensor(micro.batch, dtype=torch.float64).mean())
                for rank in group
                for micro in rank
            )
            assert weighted / world_size == pytest.approx(mean)


def groups(ranks: list[list[MicroBatch]]) -> Iterator[list[list[MicroBatch]]]:
    """The batches of each optimizer step, by rank; the same steps on all of them."""
    ends = [[index for index, micro in enumerate(rank, 1) if micro.closes] for rank in ranks]
    assert all(end == ends[0] for end in ends)
    for low, high in pairwise([0, *(ends[0] if ends else [])]):
        yield [rank[low:high] for rank in ranks]


def test_a_rank_without_samples_has_a_dummy_batch_that_does_not_count() -> None:
    ranks = epoch_of_all(4, size=10, batch_size=2)
    last = [rank[-1] for rank in ranks]
    assert [micro.samples for micro in last] == [1, 1, 0, 0]
    assert [micro.weight for micro in last] == [2.0, 2.0, 0.0, 0.0]
    assert all(len(micro.batch) == 1 for micro in last)
    assert all(micro.closes and micro.position == 10 for micro in last)


def test_every_batch_says_how_far_the_epoch_is_once_its_step_is_done() -> None:
    micros = list(loader(26, batch_size=4, accumulate=3).epoch(0))
    assert [(micro.position, micro.closes) for micro in micros] == [
        (12, False), (12, False), (12, True), (24, False), (24, False), (24, True), (26, True),
    ]  # fmt: skip
    assert loader(26, batch_size=4, accumulate=3).steps() == 3
    assert loader(26, batch_size=4, accumulate=3).steps(start=12) == 2
    assert loader(26, batch_size=4, accumulate=3).global_batch == 12


@pytest.mark.parametrize("drop_last", [False, True])
def test_resuming_at_a_step_gives_the_batches_that_would_have_come(drop_last: bool) -> None:
    for world_size, accumulate in ((1, 1), (2, 3), (3, 2)):
        settings = {"size": 61, "batch_size": 2, "accumulate": accumulate, "drop_last": drop_last}
        whole = epoch_of_all(world_size, 4, **settings)
        for stop in sorted({micro.position for micro in whole[0]}):
            rest = epoch_of_all(world_size, 4, stop, **settings)
            for rank, later in zip(whole, rest, strict=True):
                expected = [micro for micro in rank if micro.position > stop]
                assert [values_of(micro) for micro in later] == [values_of(micro) for micro in expected]


def values_of(micro: MicroBatch) -> tuple[Any, ...]:
    return [int(item) for item in micro.batch], micro.weight, micro.samples, micro.closes, micro.position


def test_the_same_global_batch_holds_the_same_samples_on_any_number_of_ranks() -> None:
    together = []
    for world_size in (1, 2, 4):
        ranks = epoch_of_all(world_size, 2, size=30, batch_size=8 // world_size)
        together.append([sorted(chain(*map(counted, step))) for step in zip(*ranks, strict=True)])
    assert together[0] == together[1] == together[2]


def test_drop_last_of_a_set_smaller_than_a_batch_of_all_ranks_is_refused() -> None:
    config = of_config(name="Numbers", batch_size=4, drop_last=True, train={"size": 7})
    with pytest.raises(ConfigError, match="drop_last leaves no batch: 7 samples, and a batch of all ranks has 8"):
        get_train_loaders(config, 0, 2, 0)
    assert get_train_loaders(config, 0, 1, 0).train.steps() == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shared", "own", "per_rank"),
    [
        ({"batch_size": 4}, {}, 4),
        ({"batch_size": 4}, {"global_batch_size": 6}, 3),
        ({"global_batch_size": 8}, {"batch_size": 3}, 3),
        ({"batch_size": 4, "global_batch_size": None}, {"global_batch_size": 6}, 3),
    ],
)
def test_a_phases_own_batch_size_wins_however_it_is_given(shared: dict, own: dict, per_rank: int) -> None:
    config = of_config(name="Numbers", **shared, train={"size": 40, **own}, val={"size": 40})
    train = get_train_loaders(config, 0, 2, 0).train
    assert train is not None and train.shard.batch_size == per_rank


# Evaluation


def test_evaluation_is_neither_shuffled_nor_cut_by_what_training_wants() -> None:
    config = of_config(name="Numbers", batch_size=4, drop_last=True, shuffle=True, train={"size": 9}, val={"size": 9})
    loaders = get_train_loaders(config, 0, 1, 0)
    assert [batch.tolist() for batch in loaders.val or ()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert loaders.test is None and loaders.predict is None


# A sample's randomness


def draws(batches: list[torch.Tensor]) -> dict[int, tuple[float, ...]]:
    """What each sample drew, by index."""
    rows = torch.cat(batches).tolist()
    return {int(row[0]): tuple(row[1:]) for row in rows}


def draws_of_epoch(epoch: int, world_size: int = 1, start: int = 0, **settings: Any) -> dict[int, tuple[float, ...]]:
    ranks = epoch_of_all(world_size, epoch, start, dataset=Noisy(12), batch_size=4 // world_size, **settings)
    return draws([micro.batch[: micro.samples] for rank in ranks for micro in rank])


def test_augmentation_follows_from_seed_epoch_and_index_alone() -> None:
    expected = draws_of_epoch(3)
    assert len(set(expected.values())) == len(expected) == 12
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert draws_of_epoch(3) == expected
    assert draws_of_epoch(3, num_workers=2) == expected
    assert draws_of_epoch(3, world_size=2, num_workers=1, persistent_workers=False) == expected
    assert draws_of_epoch(3, world_size=4) == expected
    assert draws_of_epoch(3, start=8) == {index: expected[index] for index in draws_of_epoch(3, start=8)}
    assert not set(draws_of_epoch(4).values()) & set(expected.values())
    assert not set(draws_of_epoch(3, seed=1).values()) & set(expected.values())


def test_workers_that_live_on_learn_of_the_new_epoch() -> None:
    expected = {epoch: draws_of_epoch(epoch) for epoch in range(3)}
    kept = loader(batch_size=4, dataset=Noisy(12), num_workers=2)
    assert kept.loader.persistent_workers
    for epoch in (0, 1, 2, 1):
        assert draws([micro.batch for micro in kept.epoch(epoch)]) == expected[epoch]


def test_workers_that_live_on_start_afresh_after_an_epoch_that_was_left_early() -> None:
    kept = loader(batch_size=2, dataset=Noisy(12), num_workers=2)
    for _ in zip(kept.epoch(0), range(2), strict=False):
        pass
    assert draws([micro.batch for micro in kept.epoch(1)]) == draws_of_epoch(1)


def test_the_models_generators_are_left_alone_by_the_data() -> None:
    rng.seed_all(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for workers in (0, 2):
        for _ in loader(dataset=Noisy(12), num_workers=workers, collate_fn=mixup).epoch(0):
            pass
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_collate_function_draws_the_same_with_and_without_workers() -> None:
    found = [
        [micro.batch for micro in loader(dataset=Noisy(12), num_workers=workers, collate_fn=mixup).epoch(1)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    numbers = [
        torch.stack([micro.batch for micro in loader(12, num_workers=workers, collate_fn=blurred).epoch(1)])
        for workers in (0, 2)
    ]
    assert torch.equal(*numbers) and numbers[0].unique().numel() == 12


def blurred(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples) + torch.rand(len(samples))


def test_a_class_derived_from_tensordataset_is_seeded_like_any_other() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(torch.cat([micro.batch[0] for micro in loader(dataset=Jittered()).epoch(0)]))
    assert torch.equal(*found)


def test_evaluation_draws_the_same_each_time() -> None:
    config = of_config(name="Noisy", batch_size=5, val={"size": 9}, train={"size": 9})
    val = get_train_loaders(config, 0, 1, 3).val
    assert val is not None
    assert draws(list(val)) == draws(list(val))


# The other settings


def test_loader_settings_reach_torchs_loader() -> None:
    config = of_config(
        name="Numbers", batch_size=4, num_workers=2, prefetch_factor=5, timeout=30, persistent_workers=False,
        pin_memory=True, multiprocessing_context="forkserver",
        train={"size": 20}, val={"size": 20, "num_workers": 1, "batch_size": 7},
    )  # fmt: skip
    loaders = get_train_loaders(config, 0, 1, 0)
    assert loaders.train is not None and loaders.val is not None
    train = loaders.train.loader
    assert (train.num_workers, train.prefetch_factor, train.timeout, train.pin_memory) == (2, 5, 30, True)
    assert not train.persistent_workers
    assert train.multiprocessing_context.get_start_method() == "forkserver"  # type: ignore[union-attr]
    assert loaders.val.num_workers == 1
    assert loaders.val.batch_sampler.batch_size == 7  # type: ignore[union-attr]


def test_the_defaults_are_good_ones() -> None:
    config = of_config(name="Numbers", num_workers=2, train={"size": 20}, val={"size": 3, "num_workers": 0})
    for on_gpu in (False, True):
        loaders = get_train_loaders(config, 0, 1, 0, pin_memory=on_gpu)
        assert loaders.train is not None and loaders.val is not None
        assert loaders.train.loader.pin_memory is on_gpu
        assert loaders.train.loader.persistent_workers and not loaders.val.persistent_workers
        assert loaders.train.loader.prefetch_factor == 2
        assert loaders.train.shard.batch_size == 1


def test_worker_settings_are_no_error_without_workers() -> None:
    config = of_config(
        name="Numbers", prefetch_factor=4, timeout=10, multiprocessing_context="spawn", train={"size": 4}
    )
    loaders = get_train_loaders(config, 0, 1, 0)
    assert loaders.train is not None
    assert len(list(loaders.train.epoch(0))) == 4


def test_the_workers_load() -> None:
    batches = list(loader(dataset=WhoLoads(40), num_workers=2).epoch(0))
    assert {item for micro in batches for item in micro.batch.tolist()} == {0, 1}


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_a_worker_dies_with_its_rank(context: str) -> None:
    batches = list(loader(dataset=DiesWith(4), num_workers=1, multiprocessing_context=context).epoch(0))
    assert [micro.batch.tolist() for micro in batches] == [[signal.SIGKILL] * 4]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other defaults")
def test_workers_are_forked_whatever_python_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["forkserver", "fork", "spawn"])  # 3.14's
    assert loader(num_workers=1).loader.multiprocessing_context.get_start_method() == "fork"


@pytest.mark.slow
def test_workers_begin_where_python_starts_processes_by_a_fork_server(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, test_dataloader\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('forkserver')\n"  # Python 3.14's own choice
        "    batches = test_dataloader.loader(dataset=test_dataloader.WhoLoads(40), num_workers=2).epoch(0)\n"
        "    print({item for micro in batches for item in micro.batch.tolist()})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "{0, 1}\n", done.stderr


def signalled_to_end() -> None:
    """As by a batch system, which signals every process of a job."""
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)


class SlowToBegin(Numbers):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        signalled_to_end()


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_that_is_just_beginning_outlives_a_signal_to_the_whole_job(
    context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.utils.data._utils.signal_handling._set_worker_signal_handlers

    def begin() -> None:
        own()
        signalled_to_end()

    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_set_worker_signal_handlers", begin)
    loading = loader(dataset=SlowToBegin(8), num_workers=2, multiprocessing_context=context)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert sorted(chain.from_iterable(micro.batch.tolist() for micro in loading.epoch(0))) == list(range(8))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


class HoldsTheInterpreter(Numbers):
    """An item leaves a file, and then nothing else of Python runs in the process any more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(40)
        self.folder = folder

    def __getitem__(self, index: int) -> int:
        (self.folder / str(os.getpid())).touch()
        while True:
            ctypes.PyDLL(None).sleep(3600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(each, marks=pytest.mark.soak) for each in ("spawn", "forkserver"))]
)
def test_workers_say_where_they_hang(context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.loader_workers.ANSWER_SECONDS", 5.0)  # the one that is stopped never answers
    dataset = HoldsTheInterpreter(tmp_path)
    loading = loader(dataset=dataset, num_workers=2, multiprocessing_context=context, timeout=1)
    with pytest.raises(RuntimeError, match="timed out"):
        next(iter(loading.loader))
    foreign = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True)
    foreign.start()
    while len(stuck := list(tmp_path.iterdir())) < 2:
        time.sleep(0.1)
    stopped, other = (int(path.name) for path in stuck)
    os.kill(stopped, signal.SIGSTOP)
    while " T" not in Path(f"/proc/{stopped}/stat").read_text():
        time.sleep(0.1)
    stacks = stacks_of_workers()
    assert stacks.keys() == {f"worker {pid}" for pid in (stopped, other, foreign.pid)}
    assert "in __getitem__" in stacks[f"worker {other}"]
    assert stacks[f"worker {stopped}"].startswith("does not answer")
    assert stacks[f"worker {foreign.pid}"].startswith("has not begun its work")
    assert foreign.is_alive(), "it does not know the signal, which would have ended it"


def test_a_worker_whose_rank_is_gone_before_it_begins_ends() -> None:
    worker = multiprocessing.get_context("fork").Process(target=obey_parent_alone, args=(os.getpid() + 1,))
    worker.start()
    worker.join(200)
    assert worker.exitcode == 1


def test_a_function_by_name_makes_the_batches() -> None:
    config = of_config(name="Numbers", batch_size=4, collate_fn={"name": "blurred"}, train={"size": 4})
    loaders = get_train_loaders(config, 0, 1, 0)
    assert loaders.train is not None
    (micro,) = loaders.train.epoch(0)
    assert sorted(micro.batch.int().tolist()) == [0, 1, 2, 3]
    assert micro.batch.is_floating_point()


def test_a_global_batch_size_is_divided_over_the_ranks() -> None:
    config = of_config(name="Numbers", global_batch_size=12, train={"size": 30}, val={"size": 30})
    for world_size, own in ((1, 12), (2, 6), (4, 3)):
        loaders = get_train_loaders(config, 0, world_size, 0)
        assert loaders.train is not None and loaders.val is not None
        assert loaders.train.shard.batch_size == loaders.val.batch_sampler.batch_size == own  # type: ignore[union-attr]
        assert loaders.train.global_batch == 12


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ({"global_batch_size": 10}, "global_batch_size 10 is not divisible by 4 ranks; possible: 12"),
        ({"global_batch_size": 3}, "global_batch_size 3 is not divisible by 4 ranks; possible: 4"),
        ({"global_batch_size": 8, "batch_size": 2}, "'batch_size' and 'global_batch_size' are mutually exclusive"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(loaders: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        get_train_loaders(of_config(name="Numbers", train={"size": 8}, **loaders), 0, 4, 0)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"name": "Stream"}, "Stream has no length"),
        ({"name": "Numbers", "size": 0}, "Numbers is empty"),
    ],
)
def test_data_that_cannot_be_shared_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_train_loaders(of_config(train=train), 0, 1, 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
@pytest.mark.parametrize("phase", ["train", "val"])
def test_an_error_in_a_sample_names_the_sample(workers: int, error: str, phase: str) -> None:
    part = {"size": 10, "error": error}
    config = of_config(name="Broken", batch_size=5, num_workers=workers, train=part, val=part)
    loaders = get_train_loaders(config, 0, 1, 0)
    assert loaders.train is not None and loaders.val is not None
    with pytest.raises((ValueError, KeyError)) as failure:
        list(loaders.train.epoch(0) if phase == "train" else loaders.val)
    shown = "".join([str(failure.value), *getattr(failure.value, "__notes__", [])])
    assert "while loading sample 7 of Broken" in shown
    assert ("the file is cut" if error == "ValueError" else "image") in shown


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (None, "it is None, most are (tensor (2,), int)"),
        ((torch.zeros(3), 1), "it is (tensor (3,), int), most are (tensor (2,), int)"),
        ({"image": np.zeros((1, 2))}, "it is {image: ndarray (1, 2)}, most are (tensor (2,), int)"),
    ],
)
def test_a_batch_that_cannot_be_made_names_the_sample_that_is_not_like_the_others(sample: Any, said: str) -> None:
    class Odd(Numbers):
        def __getitem__(self, index: int) -> Any:
            return sample if index == 6 else (torch.zeros(2), index)

    with pytest.raises((TypeError, RuntimeError, AttributeError)) as failure:
        list(loader(dataset=Odd(12), shuffle=False, batch_size=4).epoch(0))
    assert failure.value.__notes__ == [f"while loading sample 6 of Odd: {said}"]


def test_where_all_samples_differ_none_is_named() -> None:
    class Uneven(Numbers):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index + 1)

    with pytest.raises(RuntimeError, match="equal size") as failure:
        list(loader(dataset=Uneven(8), shuffle=False, batch_size=4).epoch(0))
    assert not getattr(failure.value, "__notes__", [])


def test_a_dataset_that_gives_whole_batches_names_them() -> None:
    class Batched(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            if 7 in indices:
                raise OSError("the file is cut")
            return indices

    whole = loader(dataset=Batched(12), shuffle=False, batch_size=4)
    with pytest.raises(OSError, match="the file is cut") as failure:
        list(whole.epoch(0))
    assert failure.value.__notes__ == ["while loading the samples [4, 5, 6, 7] of Batched"]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_after_the_timeout() -> None:
    slow = loader(dataset=Stuck(8), num_workers=1, timeout=1, batch_size=8)
    with pytest.raises(RuntimeError, match="timed out after 1"):
        list(slow.epoch(0))


def test_loaders_are_torchs_own() -> None:
    config = of_config(name="Numbers", train={"size": 4}, val={"size": 4})
    assert isinstance(get_train_loaders(config, 0, 1, 0).val, DataLoader)
