"""The file that TensorBoard shows a run from; the run goes on without it if it must."""

import io
import sys
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

from spieldose_trainer.errors import ConfigError


class EventFile:
    """Stand in for PyTorch's SummaryWriter, whose thread ends in a traceback on a full disk."""

    def __init__(self, directory: Path) -> None:
        """Make the file; raises ConfigError if it cannot be written."""
        self._path = directory / f"events.out.tfevents.{time.time():.6f}"
        self._pending = io.BytesIO()
        self._records = RecordWriter(self._pending)
        self._given_up = False
        self._add(file_version="brain.Event:2")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._append()
        except OSError as error:
            raise ConfigError(f"out: expected to write to {directory}, got: {error}") from error

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._add(summary=summary.scalar(tag, value), step=step)

    def add_text(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text."""
        self._add(summary=summary.text(tag, text), step=step)

    def flush(self) -> None:
        """Write what was added; says so in one line when the file cannot be written any more."""
        try:
            self._append()
        except OSError as error:
            self._given_up = True
            reason = f"TensorBoard will not show the rest of this run: {error}"
            tqdm.write(f"{self._path}: {reason}", file=sys.stderr)

    def close(self) -> None:
        """Write what was added."""
        self.flush()

    def _add(self, **fields: Any) -> None:
        if not self._given_up:
            event = Event(wall_time=time.time(), **fields)
            self._records.write(event.SerializeToString())

    def _append(self) -> None:
        content = self._pending.getvalue()
        self._pending.seek(0)
        self._pending.truncate()
        if content:
            with self._path.open("ab") as file:  # closed in between: a run may fail at any time
                file.write(content)
