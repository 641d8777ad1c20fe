"""What a rank leaves for the others without waiting for them: notes in the launcher's store."""

import base64
import pickle
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

LOOK_SECONDS = 1.0  # a flag is looked up no more often: it costs a round trip to the store
_POLL_SECONDS = 0.05
_MOST_REQUESTS = 40_000  # a second, that the store gets of all ranks when each of them polls


class Mailbox:
    """Notes by name and rank. It outlives every rank but the store's own, and works where a collective would hang.

    Nothing here raises: whoever leaves or looks for a note is in trouble already, and the store may be gone. The
    store is the process group's (a torch.distributed.Store); None for a process on its own.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None) -> None:
        self.rank, self.world_size, self._store = rank, world_size, store
        self._pause_seconds = max(_POLL_SECONDS, world_size / _MOST_REQUESTS)
        self._own: dict[str, Any] = {}
        self._looked: dict[str, float] = {}

    def post(self, name: str, value: Any) -> None:
        """Leave this rank's note."""
        self._own[name] = value
        with suppress(Exception):
            self._store.set(f"dtrain/{name}/{self.rank}", base64.b64encode(pickle.dumps(value)).decode())

    def lowest(self, name: str, timeout_seconds: float) -> int:
        """The lowest rank whose note is there, this one's included; rank 0's is waited for.

        So one can read for all, where thousands of ranks that read thousands of notes would keep the store busy.
        """
        end = time.monotonic() + timeout_seconds
        while self.rank and self._store is not None:
            lower = range(self.rank) if (is_over := time.monotonic() >= end) else range(1)
            for rank in lower:
                with suppress(Exception):
                    if self._store.check([f"dtrain/{name}/{rank}"]):
                        return rank
            if is_over:
                break
            time.sleep(self._pause_seconds)
        return self.rank

    def notes(self, name: str, timeout_seconds: float = 0.0, ranks: Collection[int] | None = None) -> dict[int, Any]:
        """The notes of these ranks, or of all, that are there, by rank; waits until all are, or the time is over."""
        ranks = range(self.world_size) if ranks is None else ranks
        found = {self.rank: self._own[name]} if name in self._own and self.rank in ranks else {}
        end = time.monotonic() + timeout_seconds
        while self._store is not None:
            for rank in set(ranks) - found.keys():
                with suppress(Exception):
                    if self._store.check([key := f"dtrain/{name}/{rank}"]):
                        found[rank] = pickle.loads(base64.b64decode(self._store.get(key)))
            if len(found) == len(ranks) or time.monotonic() >= end:
                break
            time.sleep(self._pause_seconds)
        return dict(sorted(found.items()))

    def note(self, name: str, rank: int) -> Any:
        """The note of one rank; None where there is none."""
        with suppress(Exception):
            if self._store is not None and self._store.check([key := f"dtrain/{name}/{rank}"]):
                return pickle.loads(base64.b64decode(self._store.get(key)))
        return None

    def raise_flag(self, name: str) -> None:
        """Raise a flag that no rank can take down."""
        with suppress(Exception):
            self._store.set(f"dtrain/flag/{name}", "1")

    def is_raised(self, name: str, wish: bool = False) -> bool:
        """Whether a rank has raised a flag, which this one does with a wish; looked up once a second at most."""
        if wish:
            self.raise_flag(name)
            return True
        if self._store is None or time.monotonic() < self._looked.get(name, 0.0) + LOOK_SECONDS:
            return False
        self._looked[name] = time.monotonic()
        with suppress(Exception):
            return bool(self._store.check([f"dtrain/flag/{name}"]))
        return False
