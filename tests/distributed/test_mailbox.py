"""Notes in the launcher's store: who is the lowest rank that left one, and how often the store is asked."""

from typing import Any

import pytest
from torch.distributed import HashStore

from dtrain.distributed.mailbox import Mailbox


class Counted:
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        self.store, self.asked = HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


@pytest.mark.parametrize(("posted", "timeout", "lowest"), [((), 0, 5), ((3, 4), 0, 3), ((0, 3), 60, 0), ((7,), 0, 5)])
def test_the_lowest_rank_that_left_a_note_reads_for_all(posted: tuple[int, ...], timeout: float, lowest: int) -> None:
    store = Counted()
    boxes = [Mailbox(rank, 8, store) for rank in range(8)]
    for rank in posted:
        boxes[rank].post("hang", f"of {rank}")
    assert boxes[5].lowest("hang", timeout) == lowest
    assert boxes[5].notes("hang", ranks=[3, 6]) == ({3: "of 3"} if 3 in posted else {})
    assert Mailbox().lowest("hang", 60) == 0, "a process on its own"


def test_thousands_of_ranks_ask_the_store_for_one_note_each() -> None:
    store = Counted()
    Mailbox(0, 8000, store).post("hang", "here")
    store.asked = 0
    assert Mailbox(4321, 8000, store).lowest("hang", 60) == 0
    assert store.asked == 1
