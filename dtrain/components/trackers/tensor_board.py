"""TensorBoard's event files, written by its own package: neither torch nor TensorFlow is imported."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Figures and pictures as TensorBoard shows them: `tensorboard --logdir runs`.

    Args:
        log_dir: Where the event files go. Default: tensorboard in the run folder.
        flush_seconds: How often they are written to the disk.
    """

    def __init__(self, log_dir: str | None = None, flush_seconds: int = 10) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed: pip install tensorboard") from None
        self._events, self._summaries, self._open = event_pb2, summary_pb2, EventFileWriter
        self.log_dir, self.flush_seconds = log_dir, flush_seconds
        self._writer: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Open a file. What an earlier one has after the last step that was delivered is not shown twice."""
        run = config["run"]
        folder = self.log_dir or str(Path(run["folder"]) / "tensorboard")
        self._writer = self._open(folder, flush_secs=self.flush_seconds)
        if run["step"] is not None:
            begins = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(run["step"] + 1, session_log=begins)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A point of each figure's curve."""
        values = [self._summaries.Summary.Value(tag=key, simple_value=value) for key, value in figures.items()]
        self._add(step, summary=self._summaries.Summary(value=values))

    def picture(self, step: int, key: str, path: str) -> None:
        """One of the pictures of that name."""
        from PIL import Image

        with Image.open(path) as image:
            width, height = image.size
        content = Path(path).read_bytes()
        picture = self._summaries.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        value = self._summaries.Summary.Value(tag=key, image=picture)
        self._add(step, summary=self._summaries.Summary(value=[value]))

    def end(self, status: str) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **what))
