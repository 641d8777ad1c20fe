"""Generators that datasets, transforms and collate functions hold: found, and seeded for each sample."""

import functools
import random
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dataloader import Numbers, draws, loader
from torch.utils.data import get_worker_info
from whole_runs import Place, figures

from dtrain.data.own_generators import MOST_OBJECTS, generators_in
from dtrain.data.own_seeding import seed_generator

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


@pytest.mark.slow
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
    monai = pytest.importorskip("monai")
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

    class AsksWhetherThereIsOne(WithMonai):
        def __getitem__(self, index: int) -> torch.Tensor:
            assert self.transform  # by which MONAI counts them, and makes new generators
            return super().__getitem__(index)

    for kind, is_seeded in ((WithMonai, False), (WithMonai, True), (AsksWhetherThereIsOne, False)):
        make = functools.partial(kind, is_seeded)
        before = monai.utils.get_seed()
        expected = found(2, make=make)
        assert monai.utils.get_seed() == before
        assert found(2, make=make) == expected
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
    assert sorted(generators_in(dataset=Holds())[0]) == [
        "dataset.function.mixed", "dataset.own", "dataset.slotted.bits", "dataset.transforms['first'][0].Jitter.RNG",
        "dataset.transforms['first'][0].Jitter.shared", "dataset.transforms['first'][0].rng",
        "dataset.transforms['first'][1].keywords['generator']",
    ]  # fmt: skip
    assert generators_in(dataset=Numbers()) == ({}, True)

    class Left:
        seeds_itself = True
        rng = random.Random(1)

    assert generators_in(dataset=[Left(), random.SystemRandom(), np.random, torch.default_generator])[0] == {}


def test_the_search_is_bounded() -> None:
    chain: Any = None
    for _ in range(3 * MOST_OBJECTS):
        chain = [chain]
    circle: list[Any] = [chain]
    circle.append(circle)
    data = [circle, list(range(10**6)), {str(n): n for n in range(10**5)}]
    found, calls = counted(lambda: generators_in(dataset=data))
    assert found == ({}, False)
    assert calls < 100 * MOST_OBJECTS, "half of the numbers' number"


def counted(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and how many functions it calls for it."""
    calls = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        return function(), calls
    finally:
        sys.setprofile(before)


class Annotations:
    """What pycocotools' COCO holds, as large as a set of 600 images has it."""

    def __init__(self, images: int = 600) -> None:
        annotations = [
            {"id": n, "image_id": n // 7, "category_id": n % 80, "bbox": [0.0] * 4, "segmentation": [[0.0] * 12]}
            for n in range(7 * images)
        ]
        self.dataset = {
            "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(images)],
            "annotations": annotations,
        }
        self.anns = {row["id"]: row for row in annotations}
        self.imgToAnns, self.catToImgs = defaultdict(list), defaultdict(list)
        for row in annotations:
            self.imgToAnns[row["image_id"]].append(row)
            self.catToImgs[row["category_id"]].append(row["image_id"])


class Record:
    def __init__(self, number: int) -> None:
        self.path, self.boxes, self.meta = Path(f"{number}.jpg"), [[number] * 4] * 3, {"size": (3, 4)}


class Composed:
    def __init__(self, *steps: Any) -> None:
        self.steps = steps


def deep_numbers(levels: int = 6) -> Any:
    return [deep_numbers(levels - 1) for _ in range(8)] if levels else 1


@pytest.mark.parametrize("attribute", ["transforms", "zoom", "tail"])  # the last ones behind all the data, by name
def test_much_plain_data_does_not_hide_the_transforms(attribute: str) -> None:
    class Coco(Numbers):
        def __init__(self) -> None:
            self.coco, self.ids, self.records = Annotations(), list(range(600)), [Record(n) for n in range(9000)]
            setattr(self, attribute, Composed(Jitter()))

    dataset = Coco()
    (names, is_whole), calls = counted(lambda: generators_in(dataset=dataset))
    assert f"dataset.{attribute}.steps[0].rng" in names and is_whole
    assert calls < 100_000, "most of which are no more than looked at"
    names, is_whole = generators_in(dataset=[deep_numbers(), Composed(Jitter())])
    assert "dataset[1].steps[0].rng" in names


def test_what_stands_among_data_is_found() -> None:
    one, two, three = (np.random.RandomState(n) for n in range(3))
    settings = {**{f"key{n}": n for n in range(40)}, "rng": one, **{f"more{n}": [n] for n in range(40)}}
    assert set(generators_in(dataset=settings)[0].values()) == {one}
    pairs = [(0.5, Composed(np.random.RandomState(n))) for n in range(40)]
    assert len([name for name in generators_in(dataset=pairs)[0] if name.endswith(".steps[0]")]) == 40
    last = [*range(10**5), two]
    assert set(generators_in(dataset=last)[0].values()) == {two}
    assert set(generators_in(dataset=dict(enumerate(last)))[0].values()) == {two}
    assert set(generators_in(dataset=np.array([None, three], dtype=object))[0].values()) == {three}


def test_sets_are_looked_into_and_names_do_not_follow_their_order() -> None:
    for kind in (set, frozenset):
        names, is_whole = generators_in(dataset=kind([Jitter(), Slotted(), random.Random(1), random.Random(2), "text"]))
        assert {
            "dataset['Jitter 1'].rng",
            "dataset['Slotted 1'].bits",
            "dataset['Random 1']",
            "dataset['Random 2']",
        } <= {*names}
        assert is_whole


def test_a_search_that_was_cut_off_says_so() -> None:
    assert not generators_in(dataset=[np.random.RandomState(n) for n in range(101)])[1]
    assert not generators_in(dataset=[Composed(lambda: 1) for _ in range(101)])[1]
    assert generators_in(dataset=[Composed(lambda: 1) for _ in range(90)])[1]
    assert generators_in(dataset=np.random.SeedSequence(1).spawn(200)) == ({}, True)


class Hostile:
    """Looking at it fails."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not to be looked at")


def test_what_cannot_be_looked_at_is_left_alone() -> None:
    assert set(generators_in(dataset=[Hostile(), random.Random(1)])[0]) == {"dataset[1]"}


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


@pytest.mark.parametrize(
    "kind", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_what_they_spawn_is_seeded_too(kind: Any) -> None:
    own = (5 + zlib.crc32(b"a") * 0x9E3779B97F4A7C15) % 2**64
    expected = np.random.Generator(kind(own).spawn(2)[1]).random()
    held = np.random.Generator(kind(1))
    sequence = np.random.SeedSequence(7)
    words, spawned = sequence.generate_state(4), []
    for before in range(3):
        held.spawn(before)
        for generator in (held, held.bit_generator):
            seed_generator(generator, "a", 5)
            assert held.spawn(2)[1].random() == expected
        sequence.spawn(before)
        seed_generator(sequence, "a", 5)
        spawned.append(sequence.spawn(1)[0].spawn_key)
    assert len(set(spawned)) == 1
    assert (sequence.generate_state(4) == words).all(), "what is made of its entropy stays"


class Spawns(Numbers):
    """Spawns a generator for each sample, as NumPy's documentation advises for each process."""

    random = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(12)
        self.own, self.sequence = np.random.default_rng(3), np.random.SeedSequence(4)
        self.bits = np.random.Philox(5)

    def __getitem__(self, index: int) -> torch.Tensor:
        ways = self.own.spawn(1)[0], self.own.bit_generator.seed_seq.spawn(1)[0], self.sequence.spawn(1)[0], self.bits
        return torch.tensor([index, *(np.random.default_rng(way).random() for way in ways)], dtype=torch.float64)


def test_what_is_spawned_follows_from_seed_epoch_and_index_alone() -> None:
    expected = found(3, make=Spawns)
    columns = list(zip(*expected.values(), strict=True))
    assert len(columns) == 4 and all(len(set(column)) == 12 for column in columns)
    assert found(3, make=Spawns, num_workers=2) == expected
    assert found(3, make=Spawns, world_size=2, num_workers=1) == expected
    resumed = found(3, make=Spawns, start=8)
    assert resumed == {index: expected[index] for index in resumed} and resumed
    assert not {*columns[0]} & {row[0] for row in found(4, make=Spawns).values()}


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
        self.rows = {n: [{"id": n, "box": [0.0] * 4}] * 3 for n in range(9000)}
        self.set = {np.random.default_rng(3)}
        self.functions = [lambda: 1 for _ in range(101)]
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        (held,) = self.set
        return x + self.transform.R.normal() + held.spawn(1)[0].normal(), y
'''


@pytest.mark.timeout(600)
def test_a_trainings_losses_do_not_depend_on_workers_and_ranks_and_the_log_names_the_generators(place: Place) -> None:
    place.write("own_rng.py", MODULE)
    losses = {}
    for name, ranks, changes in (
        ("own-0", 1, {"loaders.batch_size": 4}),
        ("own-2", 1, {"loaders.batch_size": 4, "loaders.num_workers": 2}),
        ("own-ranks", 2, {"loaders.batch_size": 2, "loaders.num_workers": 1}),
    ):
        loaders = {"loaders.name": "Noisy", "loaders.train": {"size": 22}, "loaders.val": {"size": 11, "seed": 1}}
        result = place.run(place.config(name, modules=["own_rng", "toy"], **loaders, **changes), ranks=ranks)
        assert (
            "generators that are seeded for each sample: train: dataset.transform.R (RandomState), "
            "train: dataset.set['Generator 1'] (Generator), " in result.text
        )
        assert result.text.count("saw only a part of the datasets of train, val; it passes over objects with") == 1
        found_here = figures(place.path(name))
        losses[name] = [*found_here["train/loss"].values(), *found_here["val/loss"].values()]
    assert losses["own-2"] == losses["own-0"]
    assert losses["own-ranks"] == pytest.approx(losses["own-0"], rel=1e-5)
