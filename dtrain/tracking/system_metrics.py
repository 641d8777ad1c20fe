"""Figures of this machine (CPU, memory, GPU, ...), sampled for MLflow."""

import logging
import time
from collections import deque
from typing import Any

from dtrain.tracking.mlflow_store import Row, describe_error

_log = logging.getLogger(__name__)


class SystemMetrics:
    """Figures of this machine that wait to be sent; their step is the number of sampling intervals since the start.

    Of mlflow's SystemMetricsMonitor only the sampling is used: its own thread ends for good at the first request that
    fails, and stores nothing of a run shorter than ten seconds. `started` is in unix seconds.
    """

    def __init__(self, monitor: Any, started: float) -> None:
        self.waiting: deque[Row] = deque(maxlen=10_000)  # an outage that outlasts it costs the oldest
        self._monitor = monitor
        self._every_seconds: float = monitor.sampling_interval * monitor.samples_before_logging
        self._prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
        self._started = started
        self._due_at = time.monotonic()

    def sample(self) -> None:
        """Takes a sample when one is due; a run can do without."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + self._every_seconds
        now = time.time()
        step = round((now - self._started) / self._every_seconds)
        try:
            self._monitor.collect_metrics()
            for key, value in self._monitor.aggregate_metrics().items():
                self.waiting.append((self._prefix + key, float(value), round(now * 1000), step))
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()
        except Exception as error:
            _log.warning("no more system metrics: %s", describe_error(error))
            self._due_at = float("inf")
