"""TensorBoard event files, by tensorboardX.

Its `SummaryWriter` hands events to a thread that a full disk stops for ever,
after which the run waits for its queue. The writer below that one is used: it
writes in the foreground, so a full disk is met where it can be told.
"""

import importlib
import os
import pathlib
import time
from collections.abc import Mapping

from jaxalign.errors import explained

FLUSH_SECONDS = 5.0  # forcing every step to disk would slow short steps


class Board:
  """One event file, begun anew at each start of a run."""

  def __init__(self, folder: pathlib.Path, done: int = 0):
    """Opens a new event file.

    Args:
      folder: where TensorBoard looks; made if missing.
      done: steps done so far; values of later steps in older files, from a
        course of the run that was given up, are hidden by TensorBoard.
    """
    # Imported late: tensorboardX imports torch where it is installed.
    library, events, summaries = (
      importlib.import_module(f"tensorboardX.{name}")
      for name in ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    )
    self._event, self._summary = events.Event, summaries.Summary
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    # The name says the second only; two starts in one would share a file.
    suffix = f".{time.time_ns()}.jaxalign"
    prefix = os.fspath(folder / "events")
    self._writer = library.EventsWriter(prefix, suffix)
    self._flushed = time.monotonic()
    if done:
      start = events.SessionLog(status=events.SessionLog.START)
      self._append(done + 1, session_log=start)

  def write(self, step: int, numbers: Mapping[str, int | float]) -> None:
    """One event with all scalars of a step.

    Raises:
      UserError: the disk is full.
    """
    values = [
      self._summary.Value(tag=name, simple_value=float(value))
      for name, value in numbers.items()
    ]
    self._append(step, summary=self._summary(value=values))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Forces what was written to disk.

    Raises:
      UserError: the disk is full.
    """
    with self._explained():
      self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file."""
    with self._explained():
      self._writer.close()

  def _append(self, step: int, **what) -> None:
    event = self._event(wall_time=time.time(), step=step, **what)
    with self._explained():
      self._writer.write_event(event)

  def _explained(self):
    failed = lambda why: (
      f"{self._folder}: an event file cannot be written: {why}; free some "
      "space and start the same command again, or set "
      "config.metrics.tensorboard=False"
    )
    return explained(OSError, by=failed)
