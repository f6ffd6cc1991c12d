"""TensorBoard event files, written in the foreground.

tensorboardX's own `SummaryWriter` hands events to a thread that dies on a full
disk: then `add_scalar` waits for its queue for ever (`max_queue` >= 1) or drops
every event unnoticed (`max_queue=0`), and `flush` does not wait for the queue.
"""

import contextlib
import importlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

from jaxalign.errors import UserError

FLUSH_SECONDS = 5.0  # forcing every step to disk would slow short steps


class EventFile:
  """One event file; each start of a run begins a new one."""

  def __init__(self, folder: pathlib.Path, done: int = 0):
    """Opens a new event file.

    Args:
      folder: where TensorBoard looks; made if missing.
      done: steps done so far; TensorBoard hides values of later steps in older
        files, which a resumed run repeats.
    """
    # Imported late: tensorboardX imports torch where it is installed. By name:
    # the protocol's classes are made at run time, which no checker sees.
    events = importlib.import_module("tensorboardX.proto.event_pb2")
    writers = importlib.import_module("tensorboardX.event_file_writer")
    self._folder, self._event = folder, events.Event
    self._flushed = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # The name holds whole seconds only; two starts in one would share a file.
    suffix = f".{time.time_ns()}.jaxalign"
    with self._explained():
      self._writer = writers.EventsWriter(os.fspath(folder / "events"), suffix)
      if done:
        # A START at this step hides it and all later ones in older files.
        event = events.Event(wall_time=time.time(), step=done + 1)
        event.session_log.status = events.SessionLog.START
        self._writer.write_event(event)

  def write(self, step: int, numbers: Mapping[str, int | float]) -> None:
    """Adds one event with all scalars of a step; raises as `flush`."""
    event = self._event(wall_time=time.time(), step=step)
    for name, value in numbers.items():
      event.summary.value.add(tag=name, simple_value=float(value))
    with self._explained():
      self._writer.write_event(event)
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Forces everything so far to disk.

    Raises:
      UserError: the disk is full.
    """
    with self._explained():
      self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file; raises as `flush`."""
    with self._explained():
      self._writer.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"{self._folder}: an event file cannot be written: {error}; free some "
        "space and start the same command again, or set "
        "config.metrics.tensorboard=False"
      ) from error
