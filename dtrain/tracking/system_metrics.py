"""Figures of this machine (CPU, memory, GPU, ...), sampled for MLflow, and those of the run's other machines."""

import contextlib
import json
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.tracking.mlflow_store import Row, describe_error
from dtrain.tracking.run_folder import RunFolder

_log = logging.getLogger(__name__)


def collected(monitor: Any) -> dict[str, float]:
    """What MLflow's SystemMetricsMonitor finds now."""
    monitor.collect_metrics()
    values = {key: float(value) for key, value in monitor.aggregate_metrics().items()}
    for each in monitor.monitors:
        each.clear_metrics()
    return values


class SystemMetrics:
    """Figures of machines that wait to be sent; their step is the number of sampling intervals since the start.

    Of mlflow's SystemMetricsMonitor only the sampling is used: its own thread ends for good at the first request that
    fails, and stores nothing of a run shorter than ten seconds. `started` is in unix seconds. The other machines' are
    in files of the run folder, see `node_metrics`; those of earlier starts are left out.
    """

    def __init__(self, monitor: Any, started: float, folder: Path | None = None, attempt_started: float = 0.0) -> None:
        self.waiting: deque[Row] = deque(maxlen=10_000)  # an outage that outlasts it costs the oldest
        self._monitor = monitor
        self._every_seconds: float = monitor.sampling_interval * monitor.samples_before_logging
        self._prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
        self._started, self._attempt_started = started, attempt_started
        self._folder = folder
        self._read: dict[Path, int] = defaultdict(int)  # bytes of the other machines' files
        self._due_at = time.monotonic()

    def sample(self) -> None:
        """Takes a sample when one is due; a run can do without."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + self._every_seconds
        try:
            self._add(self._prefix, time.time(), collected(self._monitor))
        except Exception as error:
            _log.warning("no more system metrics: %s", describe_error(error))
            self._due_at = float("inf")
        with contextlib.suppress(OSError):  # what cannot be read now is read the next time
            for node, now, values in self._others():
                self._add(f"system/{node}/", now, values)

    def _add(self, prefix: str, now: float, values: dict[str, float]) -> None:
        step = round((now - self._started) / self._every_seconds)
        self.waiting.extend((prefix + key, float(value), round(now * 1000), step) for key, value in values.items())

    def _others(self) -> Iterator[tuple[str, float, dict[str, float]]]:
        """What the other machines have written since the last time: name, unix seconds, figures."""
        pattern = RunFolder(self._folder).node_metrics() if self._folder else None
        for path in sorted(pattern.parent.glob(pattern.name)) if pattern else ():
            with path.open("rb") as file:
                file.seek(self._read[path])
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    self._read[path] += len(line)
                    with contextlib.suppress(ValueError):  # a disk was full: two halves of lines in one
                        entry = json.loads(line)
                        if entry["time"] >= self._attempt_started:
                            yield path.stem, entry["time"], entry["values"]
