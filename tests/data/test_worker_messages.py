"""How loader workers pass batches on: whole, in order, each in memory of its own for as long as it is used."""

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from dtrain.data import worker_messages
from dtrain.data.samplers import EvaluationShard
from dtrain.data.seeded_samples import BatchLoader, batch_loader
from dtrain.data.worker_messages import GROUP_BYTES, GROUP_SECONDS, MOST_BLOCKS, MOST_IN_GROUP, Groups, Made
from dtrain.dataloader import loader_settings

Pair = namedtuple("Pair", "first second")
LARGE = 30_000  # numbers, of which two do not go through the pipe


def loader(dataset: Any, batch_size: int = 2, workers: int = 2, **options: Any) -> BatchLoader:
    wish = loader_settings(num_workers=workers, **options) | {"pin_memory": False}
    wish = {key: value for key, value in wish.items() if key not in ("batch_size", "global_batch_size")}
    return batch_loader(dataset, 0, EvaluationShard(len(dataset), 0, 1, batch_size), wish)


class Numbers(Dataset[Any]):
    """Rows that hold their own index, of so many numbers each."""

    def __init__(self, samples: int, width: int, fails_at: int = -1) -> None:
        self.samples, self.width, self.fails_at = samples, width, fails_at

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise RuntimeError("this one is damaged")
        return torch.full((self.width,), float(index)), index


class Forms(Numbers):
    """All that a batch may be made of."""

    def __getitem__(self, index: int) -> Any:
        wide = torch.arange(self.width) + index
        return {
            "float": wide / 3, "bool": wide % 2 == 0, "half": wide.bfloat16(), "complex": wide * 1j,
            "array": np.arange(self.width, dtype=np.int16) - index, "number": np.float32(index), "text": f"no. {index}",
            "pair": Pair(torch.tensor(index), [index, 0.5]), "none": torch.zeros(0, 3), "same": (wide, wide),
        }  # fmt: skip


def as_they_come(items: list[Any]) -> Any:
    """What cannot be sent as plain memory: transposed, a view of what is larger, a parameter, arrays, nothing."""
    rows = torch.stack([item["float"] for item in items])
    arrays = np.stack([item["array"] for item in items])
    return [
        rows.T,
        rows[:, 1:3],
        torch.nn.Parameter(rows[0].clone()),
        arrays,
        arrays.T,
        None,
        rows.expand(2, *rows.shape),
    ]


def plain(value: Any) -> Any:
    """A batch as something that can be compared."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape, value.tolist()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return (type(value), [plain(item) for item in value]) if isinstance(value, list | tuple) else value


@pytest.mark.slow
@pytest.mark.parametrize("width", [5, LARGE])
@pytest.mark.parametrize("collate", [None, as_they_come])
def test_a_batch_of_any_form_is_what_torchs_own_loader_makes_of_it(width: int, collate: Any) -> None:
    dataset = Forms(6 if width == LARGE else 40, width)
    own = list(loader(dataset, collate_fn=collate))
    torchs = list(DataLoader(dataset, 2, collate_fn=collate))
    assert [plain(batch) for batch in own] == [plain(batch) for batch in torchs]


@pytest.mark.parametrize("items", [
    [(torch.ones(2), 1, "a"), (torch.zeros(2), 2, "b")], [(1, torch.ones(2)), (2.5, torch.ones(2))], [(), ()],
    [((1, Pair(2, 3.0)), {"a": np.ones(2)})] * 3, [[torch.ones(()), True]] * 2, [Pair(1, 2)] * 2,
    [(1, 2), (1,)], [(torch.ones(1),), (torch.ones(2),)], [(None,), (None,)],
])  # fmt: skip
def test_in_the_rank_a_batch_is_what_torchs_default_collate_makes(items: list[Any]) -> None:
    def outcome(collate: Any) -> str:
        try:
            return repr(collate(items))
        except Exception as error:
            return repr(error)

    assert outcome(worker_messages.collated) == outcome(default_collate)


@pytest.mark.slow
def test_batches_that_are_kept_or_changed_in_place_stay_as_they_are() -> None:
    count = 3 * MOST_BLOCKS
    kept = []
    for number, (rows, _) in enumerate(loader(Numbers(2 * count, LARGE))):
        assert rows[:, 0].tolist() == [2 * number, 2 * number + 1]
        rows += 0.5
        kept.append(rows[1])  # a part keeps the whole
    assert [row.unique().tolist() for row in kept] == [[2 * number + 1.5] for number in range(count)]


@pytest.mark.slow
def test_memory_is_used_again_once_nobody_needs_it() -> None:
    batches = loader(Numbers(80, GROUP_BYTES // 8 + 1), workers=1)  # too large for groups
    places = {rows.data_ptr() for rows, _ in batches}
    assert len(places) <= 5, "of 40 batches: two are loaded ahead, one is used, one lives on in the loop's variable"
    assert len(places) == len([key for key in worker_messages._received if key[0] == _worker(batches)])


def _worker(batches: BatchLoader) -> int:
    iterator: Any = batches._iterator
    return int(iterator._workers[0].pid)


@pytest.mark.slow
def test_an_error_comes_after_the_batches_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_messages, "GROUP_SECONDS", 1e9)  # so that groups grow on the busiest machine
    batches = loader(Numbers(2000, 4, fails_at=1503), workers=1)
    seen = []
    with pytest.raises(RuntimeError, match="this one is damaged") as raised:
        for _, indices in batches:
            seen += indices.tolist()
    assert seen == list(range(1502))
    assert batches.groups.size > 1, "the damaged one was in a group, as most are"
    assert "while loading sample 1503 of Numbers" in str(raised.value)


class Refilled(Numbers):
    """A data set that reads each sample into the same memory."""

    def __init__(self, samples: int, width: int) -> None:
        super().__init__(samples, width)
        self.tensor, self.array = torch.zeros(width), np.zeros(width)

    def __getitem__(self, index: int) -> Any:
        self.tensor[:] = self.array[:] = index
        return self.tensor, self.array


def as_it_is(items: list[Any]) -> Any:
    return {"tensor": items[0][0], "array": items[0][1]}


def test_batches_in_memory_that_the_dataset_fills_again_are_those_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_messages, "GROUP_SECONDS", 1e9)  # so that groups grow on the busiest machine
    batches = loader(Refilled(300, 4), batch_size=1, workers=1, collate_fn=as_it_is)
    seen = [(batch["tensor"].tolist(), batch["array"].tolist()) for batch in batches]
    assert seen == [([float(index)] * 4, [float(index)] * 4) for index in range(300)]
    assert batches.groups.size > 1


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> worker_messages._Block:
    """What a worker has open, in which a rank may be given its next batch."""
    block = worker_messages._Block(1 << 12, 0)
    monkeypatch.setattr(worker_messages, "get_worker_info", object)
    monkeypatch.setattr(worker_messages._blocks, "open", block)
    return block


def is_in(block: worker_messages._Block, tensor: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - block.begin < block.size


class Special(torch.Tensor):
    """A user's own."""


def test_tensors_of_a_users_own_are_not_in_memory_that_is_used_again(
    block: worker_messages._Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are passed on by torch, and nothing would tell when the rank lets go of them."""
    items = [(torch.full((2,), float(n)), torch.full((2,), float(n)).as_subclass(Special)) for n in range(3)]
    plain_one, special = worker_messages.collated(items)
    assert is_in(block, plain_one)
    assert not is_in(block, special)
    assert type(special) is Special
    assert torch.equal(special.as_subclass(torch.Tensor), torch.tensor([[0.0] * 2, [1.0] * 2, [2.0] * 2]))

    def turned(batch: Any, *, collate_fn_map: Any = None) -> Any:
        rows = [torch.full((2,), float(value.real)) for value in batch]
        return collate_fn_map[torch.Tensor](rows, collate_fn_map=collate_fn_map).T

    monkeypatch.setitem(default_collate_fn_map, complex, turned)
    made = worker_messages.collated([1j, 1 + 1j])
    assert made.tolist() == [[0.0, 1.0]] * 2
    assert not is_in(block, made)


@pytest.mark.parametrize("first", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32])
def test_samples_of_two_dtypes_lose_nothing_in_a_worker(first: torch.dtype, block: worker_messages._Block) -> None:
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    (batch,) = worker_messages.collated([(torch.ones(2, dtype=first),), (third,)])
    assert batch.dtype is torch.float64
    assert batch.tolist() == [[1.0, 1.0], [1 / 3, 1 / 3]]
    assert not is_in(block, batch)


def test_a_group_is_what_is_worth_a_message() -> None:
    groups = Groups(range(100))
    quick, slow = GROUP_SECONDS / 100, 10 * GROUP_SECONDS

    def size_after(count: int, seconds: float, size: int = 100) -> int:
        list(groups.batches_of((Made([(None, 1)] * count, seconds), size)))
        return groups.size

    assert groups.size == 1
    assert [size_after(1, quick), size_after(2, quick), size_after(4, quick)] == [2, 4, 8]
    assert size_after(16, quick) == MOST_IN_GROUP
    assert size_after(16, quick, size=GROUP_BYTES * 4) == 4
    groups.size = 7
    assert [len(group) for group in groups] == [7] * 14 + [2]
    assert [number for group in groups for number in group] == list(range(100))
    assert size_after(8, slow) == 1


def test_torch_has_what_this_relies_on() -> None:
    assert isinstance(DataLoader.__dict__["_index_sampler"], property)
    assert isinstance(BatchLoader.__dict__["_index_sampler"], property)
    assert torch.Tensor in default_collate_fn_map


BATCHES: dict[str, list[Any]] = {
    "pairs": [(torch.full((2, 3), float(n)), torch.tensor(n)) for n in range(3)],
    "labels": [(torch.full((2,), float(n)), n, n / 3, n == 1, f"no. {n}", np.int16(n)) for n in range(3)],
    "dicts": [{"image": torch.full((2,), n), "label": n, "deep": {"a": (torch.tensor(n), 1)}} for n in range(3)],
    "tensors": [torch.full((2,), n) for n in range(3)],
    "lists": [[torch.full((2,), n), n] for n in range(3)],
    "named": [Pair(torch.full((2,), n), n) for n in range(3)],
    "parameters": [(nn.Parameter(torch.full((2,), float(n))), n) for n in range(3)],
    "transposed": [(torch.arange(6).view(2, 3).T, torch.zeros(0, 2)) for _ in range(3)],
    "mixed dtypes": [(torch.ones(2, dtype=torch.float64 if n else torch.float32), n or 0.5) for n in range(3)],
    "ordered": [OrderedDict(b=torch.tensor(n), a=n) for n in range(3)],
    "empty": [() for _ in range(3)],
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Types, values, dtypes, layout and the order of keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        facts = [(item.dtype, item.shape, item.stride(), item.requires_grad) for item in (one, other)]
        return facts[0] == facts[1] and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_what_default_collate_makes_of_it(name: str) -> None:
    assert same(worker_messages.collated(BATCHES[name]), default_collate(BATCHES[name]))


@pytest.mark.parametrize(
    ("items", "error"),
    [
        ([(torch.ones(2), 1), (torch.ones(3), 1)], "stack expects each tensor to be equal size"),
        ([(torch.ones(2), 1), (torch.ones(2),)], "each element in list of batch should be of equal size"),
        ([(torch.ones(2), 1), (torch.ones(2), 1, 2)], "each element in list of batch should be of equal size"),
        ([(torch.ones(2), 1), (None, 1)], "expected Tensor as element 1"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], "a"),
        ([(torch.ones(2).to_sparse(), 1)] * 2, "Batches of sparse tensors are not currently supported"),
        ([(object(), 1)] * 2, "must contain tensors, numpy arrays, numbers, dicts or lists; found <class 'object'>"),
    ],
)
def test_what_it_refuses_is_refused_with_its_words(items: list[Any], error: str) -> None:
    with pytest.raises(Exception, match=error) as ours:
        worker_messages.collated(items)
    with pytest.raises(type(ours.value), match=error):
        default_collate(items)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_user_puts_into_torchs_table_is_used(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's documentation of collate shows it."""

    def doubled(batch: Any, *, collate_fn_map: Any = None) -> Any:
        return 2 * torch.stack(batch)

    monkeypatch.setitem(default_collate_fn_map, torch.Tensor, doubled)
    (first, *_) = loader(Numbers(4, 3), workers=workers)
    assert first[0].tolist() == [[0.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("kind", [tuple, dict, Mapping])
def test_how_a_user_has_pairs_and_dicts_put_together_is_used(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(default_collate_fn_map, kind, lambda batch, *, collate_fn_map=None: len(batch))
    assert worker_messages.collated([(torch.ones(2), 1)] * 3 if kind is tuple else [{"a": torch.ones(2)}] * 3) == 3
