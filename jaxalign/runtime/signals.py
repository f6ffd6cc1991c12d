"""Ctrl-C and SIGTERM: finish the step, save, leave with the right status."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from jaxalign.parallel import hosts

STOPPING = "stopping after this step; once more to stop at once"

_CAUGHT = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"
# A launcher such as `timeout` forwards the signal that its whole process group
# got already. People press Ctrl-C twice faster than that.
_ECHO_SECONDS: dict[int, float] = {signal.SIGINT: 0.1, signal.SIGTERM: 1.0}


@dataclasses.dataclass
class Stop:
  """Whether the run was asked to stop."""

  signal: int = 0  # 0 until then
  # Whether the screen says it; the handler then writes nothing.
  on_screen: bool = False

  @property
  def requested(self) -> bool:
    """True after the first signal."""
    return self.signal != 0

  @property
  def exit_status(self) -> int:
    """0, or what launchers restart on: 130 (SIGINT), 143 (SIGTERM)."""
    return 128 + self.signal if self.signal else 0

  def agree(self) -> bool:
    """Whether any process of the run was asked to stop; then all of them were.

    All processes call it.
    """
    asked = hosts.highest(self.signal)
    if asked:  # or one that comes just now would be forgotten
      self.signal = asked
    return asked > 0


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
  """Turns the first signal into a flag; the second ends the process at once.

  SIGTERM again within a second, or SIGINT within a tenth, counts once. The
  first signal after `Stop.agree` has reported another host's does not count.
  Where the program had a handler of its own, it gets the second signal. The
  earlier handlers are restored at the end. Outside of the main thread nothing
  is caught, because Python runs handlers there.

  Yields:
    The flag to check after each step.
  """
  stop = Stop()
  # This process's own first signal, and when; the flag may be another host's.
  own, first = 0, 0.0
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  earlier = {int(number): signal.getsignal(number) for number in _CAUGHT}

  def handle(number: int, frame: FrameType | None) -> None:
    nonlocal own, first
    now = time.monotonic()
    if own == number and now - first < _ECHO_SECONDS[number]:
      return
    if own:
      before = earlier[number]
      if callable(before) and before is not signal.default_int_handler:
        before(number, frame)
        return
      leave(128 + number)
    own, first = number, now
    # Platforms signal hosts one by one; this one may already be saving because
    # of another host's signal.
    stop.signal = stop.signal or number
    if not stop.on_screen:
      # Not print, whose buffer may be in use when the signal comes.
      os.write(2, f"\n{STOPPING}\n".encode())

  with contextlib.ExitStack() as undo:
    for number in _CAUGHT:
      undo.callback(signal.signal, number, signal.signal(number, handle))
    yield stop


@contextlib.contextmanager
def raise_second() -> Iterator[None]:
  """Has the second Ctrl-C of `catch_signals` raise a `KeyboardInterrupt`.

  For notebooks and users' programs, which must not lose their process. A
  handler that the program has set itself stays.
  """

  def handle(number: int, frame: FrameType | None) -> None:
    signal.default_int_handler(number, frame)

  # None where the handler is none of Python's.
  before = signal.getsignal(signal.SIGINT)
  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or before is not signal.default_int_handler:
    yield
    return
  signal.signal(signal.SIGINT, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def leave(status: int) -> None:
  """Ends the process at once, without any clean-up but the cursor's."""
  # The live panel may have hidden it.
  if os.isatty(1):
    os.write(1, _SHOW_CURSOR)
  os._exit(status)


@dataclasses.dataclass
class Interrupts:
  """Ctrl-C in a conversation: it ends an answer, elsewhere the program.

  Nothing is raised while an answer is drawn: an exception could surface inside
  a compilation, whose thread goes on. The owner looks at `asked` between two
  tokens.
  """

  answering: bool = False
  asked: bool = False
  is_typing: bool = False

  @contextlib.contextmanager
  def answer(self) -> Iterator[None]:
    """Around an answer: here the first Ctrl-C only sets `asked`.

    The answer to a line that was typed has begun with the line already.
    """
    if self.answering:
      yield
      return
    self.answering, self.asked = True, False
    try:
      yield
    finally:
      self.answering = False

  @contextlib.contextmanager
  def typing(self) -> Iterator[None]:
    """Around `input`: here Ctrl-C is a `KeyboardInterrupt`.

    From the first line on everything else belongs to an answer, so that no
    moment is left in which Ctrl-C would end the conversation.
    """
    self.is_typing = True
    try:
      yield
    finally:
      self.answering, self.asked, self.is_typing = True, False, False


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
  """Handles Ctrl-C as `Interrupts` says; the earlier handler comes back."""
  state = Interrupts()

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    if state.is_typing:
      raise KeyboardInterrupt
    if state.answering and not state.asked:
      state.asked = True
      return
    os.write(2, b"\n")  # the terminal shows ^C
    leave(128 + number)

  before = signal.signal(signal.SIGINT, handle)
  try:
    yield state
  finally:
    signal.signal(signal.SIGINT, before)
