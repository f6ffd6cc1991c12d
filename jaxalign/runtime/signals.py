"""Ctrl-C and SIGTERM: finish the step, save, leave with the right status."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from types import FrameType

_CAUGHT = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


@dataclasses.dataclass
class Stop:
  """Whether the run was asked to stop."""

  signal: int = 0  # 0 until then

  @property
  def requested(self) -> bool:
    """True after the first signal."""
    return self.signal != 0

  @property
  def exit_status(self) -> int:
    """0, or what launchers restart on: 130 (SIGINT), 143 (SIGTERM)."""
    return 128 + self.signal if self.signal else 0


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
  """Turns the first signal into a flag; the second ends the process at once.

  Only for the main thread, as Python requires of signal handlers. The earlier
  handlers are restored at the end.

  Yields:
    The flag to check after each step.
  """
  stop = Stop()

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    if stop.requested:
      # No clean-up: a second signal means not to wait for a save. Only the
      # cursor, which the live panel may have hidden, is restored.
      if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
      os._exit(128 + number)
    stop.signal = number
    # Not print, whose buffer may be in use when the signal comes.
    os.write(2, b"\nstopping after this step; once more to stop at once\n")

  with contextlib.ExitStack() as undo:
    for number in _CAUGHT:
      undo.callback(signal.signal, number, signal.signal(number, handle))
    yield stop
