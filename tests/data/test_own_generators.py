"""Generators that datasets, transforms and collate functions hold: found, and seeded for each sample."""

import functools
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from test_dataloader import Numbers, draws, loader
from torch.utils.data import get_worker_info
from whole_runs import Place, figures

from dtrain.data.own_generators import MOST_OBJECTS, generators_in, seed_generator

RNG = np.random.default_rng(0)  # a module's own


class Jitter:
    """A transform of the usual kind."""

    shared = random.Random(3)  # a class's own

    def __init__(self) -> None:
        self.rng = np.random.RandomState(1)

    def __call__(self, value: float) -> float:
        return value + self.rng.normal()  # of which the generator keeps a second one back


class Slotted:
    __slots__ = ("bits",)

    def __init__(self) -> None:
        self.bits = np.random.Generator(np.random.PCG64(5))


def added(value: float, generator: torch.Generator) -> float:
    return value + float(torch.rand((), generator=generator))


class Holds(Numbers):
    """Draws from generators that its constructor made, in every place where one may be."""

    random = None  # type: ignore[assignment]

    def __init__(self, size: int = 12) -> None:
        super().__init__(size)
        self.transforms: Any = {"first": [Jitter(), functools.partial(added, generator=torch.Generator())]}
        self.slotted, self.own = Slotted(), random.Random(7)
        mixed = np.random.RandomState(np.random.PCG64(2))
        self.function = lambda: mixed.normal()

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [transform(0.0) for transform in self.transforms["first"]]
        drawn += [self.slotted.bits.random(), self.own.random(), self.function(), RNG.random(), Jitter.shared.random()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


def found(epoch: int, world_size: int = 1, start: int = 0, make: Any = Holds, **settings: Any) -> dict[int, Any]:
    """What each sample drew, each way with a dataset of its own."""
    ranks = [
        list(loader(dataset=make(), rank=rank, world_size=world_size, batch_size=4 // world_size, **settings).epoch(
            epoch, start
        ))
        for rank in range(world_size)
    ]  # fmt: skip
    return draws([micro.batch[: micro.samples] for rank in ranks for micro in rank])


def test_what_is_drawn_from_them_follows_from_seed_epoch_and_index_alone() -> None:
    expected = found(3)
    columns = list(zip(*expected.values(), strict=True))
    assert len(columns) == 7 and all(len(set(column)) == 12 for column in columns), "no sample draws another's numbers"
    assert found(3, num_workers=2) == expected
    assert found(3, world_size=2, num_workers=1) == expected
    assert found(3, world_size=4) == expected
    assert found(3, start=8) == {index: expected[index] for index in found(3, start=8)}
    for other in (found(4), found(3, seed=1)):
        assert not {number for row in other.values() for number in row} & {n for row in expected.values() for n in row}


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_draw_the_same(context: str) -> None:
    assert found(3, num_workers=1, multiprocessing_context=context, make=Pickled) == found(3, make=Pickled)


class Pickled(Numbers):
    """Without what cannot be pickled; what its class and module hold is another object in a worker."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, RNG.random(), Jitter.shared.random()], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__(12)
        self.transform = Jitter()
        self.random = True


class Lazy(Numbers):
    """Makes its generator with its first sample, from the worker's own seed, as documentation elsewhere advises."""

    random = None  # type: ignore[assignment]
    rng: Any = None

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.rng is None:
            info = get_worker_info()
            self.rng = np.random.default_rng(info.seed if info else torch.initial_seed())
        return torch.tensor([index, self.rng.random()], dtype=torch.float64)


def test_one_that_the_first_sample_makes_is_found_too() -> None:
    expected = found(1, make=lambda: Lazy(12))
    assert len(set(expected.values())) == 12
    for workers in (1, 3):
        assert found(1, make=lambda: Lazy(12), num_workers=workers) == expected


def test_monais_transforms_draw_anew_for_each_sample() -> None:
    transforms = pytest.importorskip("monai.transforms")

    class WithMonai(Numbers):
        random = None  # type: ignore[assignment]

        def __init__(self, is_seeded: bool) -> None:
            super().__init__(12)
            steps = [transforms.RandGaussianNoise(prob=1.0), transforms.RandShiftIntensity(9, prob=1.0)]
            self.transform = transforms.Compose(steps)
            if is_seeded:
                self.transform.set_random_state(5)

        def __getitem__(self, index: int) -> torch.Tensor:
            noisy = self.transform(torch.zeros(1, 2))
            return torch.cat([torch.tensor([index]), torch.as_tensor(noisy).flatten().double()])

    for is_seeded in (False, True):
        make = functools.partial(WithMonai, is_seeded)
        expected = found(2, make=make)
        assert len(set(expected.values())) == 12
        assert found(2, make=make, num_workers=2) == expected
        assert found(2, make=make, world_size=2) == expected


class Mixes:
    """A collate function with a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, samples: list[int]) -> torch.Tensor:
        return torch.tensor(samples) + self.rng.random()


def test_a_collate_functions_own_follows_the_batch() -> None:
    batches = [
        [micro.batch for micro in loader(dataset=Numbers(12), collate_fn=Mixes(), num_workers=workers).epoch(1)]
        for workers in (0, 2)
    ]
    batches = [torch.cat(found_here) for found_here in batches]
    assert torch.equal(*batches)
    assert (batches[0] % 1).mul(1e3).round().unique().numel() == 3


def test_a_worker_begins_with_a_seed_of_its_own() -> None:
    class Seeds(Numbers):
        random = False

        def __getitem__(self, index: int) -> int:
            return torch.initial_seed() % 2**53

    def seeds(**settings: Any) -> set[int]:
        start = settings.pop("start", 0)
        made = loader(dataset=Seeds(12), num_workers=2, batch_size=2, **settings)
        return {seed for micro in made.epoch(0, start) for seed in micro.batch.tolist()}

    ways = [seeds(), seeds(seed=1), seeds(world_size=2, rank=1), seeds(start=4)]
    assert all(len(way) == 2 for way in ways)
    assert len(set().union(*ways)) == 8
    assert seeds() == ways[0]


def test_where_they_are_is_said_whatever_the_order_in_which_they_were_made() -> None:
    assert sorted(generators_in(dataset=Holds())) == [
        "dataset.function.RNG", "dataset.function.mixed", "dataset.own", "dataset.slotted.bits",
        "dataset.transforms['first'][0].Jitter.shared", "dataset.transforms['first'][0].rng",
        "dataset.transforms['first'][1].keywords['generator']",
    ]  # fmt: skip
    assert generators_in(dataset=Numbers()) == {}

    class Left:
        seeds_itself = True
        rng = random.Random(1)

    assert generators_in(dataset=[Left(), random.SystemRandom(), np.random, torch.default_generator]) == {}


def test_the_search_is_bounded() -> None:
    chain: Any = None
    for _ in range(3 * MOST_OBJECTS):
        chain = [chain]
    circle: list[Any] = [chain]
    circle.append(circle)
    began = time.process_time()
    assert generators_in(dataset=[circle, list(range(10**6)), {str(n): n for n in range(10**5)}]) == {}
    assert time.process_time() - began < 1.0


class Hostile:
    """Looking at it fails."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not to be looked at")


def test_what_cannot_be_looked_at_is_left_alone() -> None:
    assert set(generators_in(dataset=[Hostile(), random.Random(1)])) == {"dataset[1]"}


@pytest.mark.parametrize(
    "generator",
    [
        random.Random(1), torch.Generator(), np.random.RandomState(1), np.random.default_rng(1),
        np.random.RandomState(np.random.PCG64(1)), np.random.Generator(np.random.MT19937(1)),
        np.random.Generator(np.random.Philox(1)),
    ],
)  # fmt: skip
def test_each_kind_is_seeded_in_place_with_all_that_it_keeps_back(generator: Any) -> None:
    def drawn(name: str, seed: int, before: int) -> list[float]:
        for _ in range(before):  # an odd number leaves half of a pair of normal numbers behind
            _normal(generator)
        seed_generator(generator, name, seed)
        return [_normal(generator) for _ in range(4)]

    assert drawn("a", 5, before=1) == drawn("a", 5, before=2)
    assert drawn("a", 5, before=1) != drawn("b", 5, before=1)
    assert drawn("a", 5, before=1) != drawn("a", 6, before=1)


def _normal(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.randn((), generator=generator))
    return float(generator.gauss(0, 1) if isinstance(generator, random.Random) else generator.normal())


MODULE = '''
"""A dataset as the MONAI and albumentations kinds are: its transform holds the generator."""
import numpy as np
from toy import Points

class Noise:
    def __init__(self):
        self.R = np.random.RandomState()

class Noisy(Points):
    def __init__(self, size, seed=0):
        super().__init__(size, seed)
        self.transform = Noise()
        self.random = None
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + self.transform.R.normal(), y
'''


@pytest.mark.timeout(300)
def test_a_trainings_losses_do_not_depend_on_workers_and_ranks_and_the_log_names_the_generators(place: Place) -> None:
    (place.folder / "own_rng.py").write_text(MODULE)
    losses = {}
    for name, ranks, changes in (
        ("own-0", 1, {"loaders.batch_size": 4}),
        ("own-2", 1, {"loaders.batch_size": 4, "loaders.num_workers": 2}),
        ("own-ranks", 2, {"loaders.batch_size": 2, "loaders.num_workers": 1}),
    ):
        loaders = {"loaders.name": "Noisy", "loaders.train": {"size": 22}, "loaders.val": {"size": 11, "seed": 1}}
        result = place.run(place.config(name, modules=["own_rng", "toy"], **loaders, **changes), ranks=ranks)
        assert "generators that are seeded for each sample: train: dataset.transform.R (RandomState)" in result.text
        found_here = figures(place.path(name))
        losses[name] = [*found_here["train/loss"].values(), *found_here["val/loss"].values()]
    assert losses["own-2"] == losses["own-0"]
    assert losses["own-ranks"] == pytest.approx(losses["own-0"], rel=1e-5)
