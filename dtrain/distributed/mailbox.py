"""What a rank leaves for the others without waiting for them: notes in the launcher's store."""

import base64
import pickle
import time
from contextlib import suppress
from typing import Any

LOOK_SECONDS = 1.0  # a flag is looked up no more often: it costs a round trip to the store
_POLL_SECONDS = 0.05


class Mailbox:
    """Notes by name and rank. It outlives every rank but the store's own, and works where a collective would hang.

    Nothing here raises: whoever leaves or looks for a note is in trouble already, and the store may be gone. The
    store is the process group's (a torch.distributed.Store); None for a process on its own.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None) -> None:
        self.rank, self.world_size, self._store = rank, world_size, store
        self._own: dict[str, Any] = {}
        self._looked: dict[str, float] = {}

    def post(self, name: str, value: Any) -> None:
        """Leave this rank's note."""
        self._own[name] = value
        with suppress(Exception):
            self._store.set(f"dtrain/{name}/{self.rank}", base64.b64encode(pickle.dumps(value)).decode())

    def notes(self, name: str, timeout_seconds: float = 0.0) -> dict[int, Any]:
        """The ranks' notes that are there, by rank; waits until all are, or the time is over."""
        found = {self.rank: self._own[name]} if name in self._own else {}
        end = time.monotonic() + timeout_seconds
        while self._store is not None:
            for rank in set(range(self.world_size)) - found.keys():
                with suppress(Exception):
                    if self._store.check([key := f"dtrain/{name}/{rank}"]):
                        found[rank] = pickle.loads(base64.b64decode(self._store.get(key)))
            if len(found) == self.world_size or time.monotonic() >= end:
                break
            time.sleep(_POLL_SECONDS)
        return dict(sorted(found.items()))

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
