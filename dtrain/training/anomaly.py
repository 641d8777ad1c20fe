"""torch's anomaly detection, with the line of forward whose backward failed on the error itself."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FRAME = re.compile(r'File "(.*?)", line (\d+), in (.*)\n\s*(.*)')


@contextmanager
def detecting_anomalies(is_wanted: bool) -> Iterator[None]:
    """A backward pass that fails or makes NaN raises, with `forward_frames`: where in forward it was called.

    torch tells that place in a warning alone, and keeps a traceback for each operation: steps take several times as
    long.
    """
    if not is_wanted:
        yield
        return
    told: list[str] = []
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        show: Any = warnings.showwarning

        def noted(message: Any, *arguments: Any, **options: Any) -> None:
            if str(message).startswith("Error detected in"):
                told.append(str(message))
            else:
                show(message, *arguments, **options)

        warnings.filterwarnings("always", message="Error detected in")
        warnings.showwarning = noted
        try:
            yield
        except Exception as error:
            if told:
                error.forward_frames = _FRAME.findall(told[-1])  # type: ignore[attr-defined]
            raise
