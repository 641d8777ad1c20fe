"""A text stream whose errors do not end the training: a full disk, a reader that has gone away, a missing letter."""

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO


class SafeStream:
    """Writes to a stream, and drops what the stream refuses."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Writes what the stream's encoding can express, and the rest as escapes."""
        with self._errors_dropped():
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._errors_dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors_dropped(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The reader has gone (`| head`). Python would fail once more when it flushes at exit: exit status 120.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):
            pass  # no space left for a log, a terminal that hung up, a closed stream
