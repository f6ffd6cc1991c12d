"""Reward functions: a user's Python function in the place of a reward model.

The signature is that of TRL's GRPO, `f(prompts, completions, **columns)`: one
float for each completion, or None where the function does not apply.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import logging
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from types import FrameType
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxalign.cli import describe_error, load_function
from jaxalign.data.prompts import COLUMNS
from jaxalign.data.rows import PromptRow
from jaxalign.errors import StepError, UserError
from jaxalign.parallel import hosts
from jaxalign.text.templates import Message

CONTRACT = (
  "it takes prompts, completions and columns of the data by name, and returns "
  "a list with a float or None for each completion"
)
# Never handed over as columns: TRL's names for the function's own arguments.
RESERVED = ("prompt", "completion", "prompts", "completions")
_BY_NAME = (
  inspect.Parameter.POSITIONAL_OR_KEYWORD,
  inspect.Parameter.KEYWORD_ONLY,
)
_SHOWN = 60  # characters of a text in a message
_GRACE_S = 1.0  # after which an event loop counts as blocked

_log = logging.getLogger(__name__)


class _TimeUp(BaseException):  # `except Exception` in a function lets it pass
  """A reward function has taken longer than it may."""


@dataclasses.dataclass(frozen=True)
class RewardFunction:
  """One reward function; call it with prompts and completions like a `Scorer`.

  Attributes:
    name: FILE.py:FUNCTION.
    function: takes keywords, returns a value for each completion; may be async.
    field: what named it, for messages: a config field or a flag.
    seconds: that a call may take; 0 = no limit.
    digest: of its file.
  """

  name: str
  function: Callable[..., Any]  # what it returns is checked in `_check`
  field: str = "config.reward_model"
  seconds: int | float = 0.0
  digest: str = ""

  def __call__(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> Float[np.ndarray, " B"]:
    """The reward of each completion, higher is better; see `ask_functions`."""
    return ask_functions([self], prompts, completions)[0]

  @property
  def is_async(self) -> bool:
    """Whether a call gives a coroutine."""
    call = type(self.function).__call__  # of an object that can be called
    return any(map(inspect.iscoroutinefunction, (self.function, call)))

  @property
  def columns(self) -> tuple[str, ...]:
    """The columns that its signature names."""
    return tuple(
      parameter.name
      for parameter in inspect.signature(self.function).parameters.values()
      if parameter.kind in _BY_NAME and parameter.name not in RESERVED
    )

  def check_columns(self, known: Sequence[str], source: str) -> None:
    """Refuses a function that needs what the prompts' data do not have.

    Args:
      known: the columns of the data.
      source: of the data, for the message.

    Raises:
      UserError: which column, and the ones that there are.
    """
    for parameter in inspect.signature(self.function).parameters.values():
      kind, name = parameter.kind, parameter.name
      if parameter.default is not parameter.empty or name in RESERVED[2:]:
        continue
      if kind is parameter.POSITIONAL_ONLY:
        raise UserError(
          f"{self.field}: {self.name} must take {name} by name; {CONTRACT}"
        )
      if kind in _BY_NAME and (name in RESERVED or name not in known):
        there = sorted({"prompts", "completions", *known} - set(RESERVED[:2]))
        raise UserError(
          f"{self.field}: {self.name} takes {name}, which {source} does not "
          f"have; it has {', '.join(there)}: rename it, or give it a default"
        )

  def arguments(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> dict[str, list[object]]:
    """The keywords of a call, a list with one value for each completion.

    A prompt that the data have as a list of messages stays one, and its
    completion is then a list of one message, as in TRL. A column that a row
    lacks is None.
    """
    asked = [prompt_of(row) for row in prompts]
    given: dict[str, list[object]] = {
      "prompts": [*asked],
      "completions": [
        text
        if isinstance(prompt, str)
        else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, completions, strict=True)
      ],
    }
    parameters = inspect.signature(self.function).parameters
    names = dict.fromkeys(name for row in prompts for name in row.columns)
    # A default stands for a column that no row has, None for a needed one.
    for name in self.columns:
      if parameters[name].default is inspect.Parameter.empty:
        names[name] = None
    for name in names:
      if name not in RESERVED:
        given[name] = [row.columns.get(name) for row in prompts]
    # Without **kwargs it gets only what it names.
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
      given = {name: given[name] for name in given if name in parameters}
    # What a function changes in its arguments must not reach later steps.
    return copy.deepcopy(given)

  def _begin(
    self,
    prompts: Sequence[PromptRow],
    completions: Sequence[str],
    deadline: float,
  ) -> futures.Future:
    """Calls the function; an async one goes on, another has then ended.

    A function that is not async runs in the main thread: an alarm can interrupt
    it there, even in a regular expression that backtracks, and functions that
    set alarms of their own work nowhere else. Called from another thread it
    gets a thread of its own, which is left behind when the time is up.
    """
    given = self.arguments(prompts, completions)
    if self.is_async:
      return asyncio.run_coroutine_threadsafe(
        self.function(**given), _event_loop()
      )
    future: futures.Future = futures.Future()
    in_main = threading.current_thread() is threading.main_thread()

    def call() -> None:
      try:
        with _alarm(deadline if in_main else math.inf):
          value = self.function(**given)
      except (Exception, _TimeUp) as error:
        future.set_exception(error)
      else:
        future.set_result(value)

    if in_main or deadline == math.inf:
      call()
    else:
      # A daemon: it does not keep the process from exiting.
      threading.Thread(target=call, daemon=True).start()
    return future

  def _end(self, future: futures.Future, deadline: float) -> object:
    """What the call that `_begin` started returns.

    Raises:
      _TimeUp: it takes too long.
      Exception: what it raised.
    """
    if deadline < math.inf:
      futures.wait([future], max(deadline - time.monotonic(), 0))
      if not future.done():
        if self.is_async:
          future.cancel()
          _replace_blocked_loop()
        raise _TimeUp
    return future.result()

  def _deadline(self) -> float:
    """When a call that starts now has to end, by `time.monotonic`."""
    return time.monotonic() + (self.seconds or math.inf)

  def _explain(
    self,
    error: BaseException,
    prompts: Sequence[PromptRow],
    completions: Sequence[str],
  ) -> StepError:
    """The error with the row that it comes from, as far as it can be found.

    The rows are given to the function one by one until it happens again, all
    together within the time of one call.
    """
    deadline, row = self._deadline(), ""
    for i in range(len(completions)):
      one = prompts[i : i + 1], completions[i : i + 1]
      try:
        self._end(self._begin(*one, deadline), deadline)
      except (Exception, _TimeUp):
        row = _row(i, prompts, completions)
        break
    count = f"{len(completions)} completions"
    if isinstance(error, _TimeUp):
      row = row and f"; one by one it came to {row}"
      return StepError(
        f"{self.field}: {self.name} took more than "
        f"config.scoring.function_timeout={self.seconds:g} seconds for "
        f"{count}{row}; fix the function or raise the limit"
      )
    path = pathlib.Path(self.name.rpartition(":")[0])
    return StepError(
      f"{self.field}: {self.name} failed for {row or count}: "
      f"{describe_error(path, error)}; fix the function, or let some steps fail"
      " with config.max_exception_count"
    )

  def _check(
    self,
    result: object,
    prompts: Sequence[PromptRow],
    completions: Sequence[str],
  ) -> Float[np.ndarray, " B"]:
    """What the function returned, as in `ask_functions`.

    Raises:
      UserError: it is not a float or None for each completion.
    """
    count = len(completions)
    values = list(result) if isinstance(result, Iterable) else None
    if values is None or len(values) != count:
      got = (
        f"{result!r:.{_SHOWN}}" if values is None else f"{len(values)} values"
      )
      raise UserError(
        f"{self.field}: {self.name} must return a list with a float or None "
        f"for each of {count} completions, got {got}"
      )
    found = np.zeros(count)
    for i, value in enumerate(values):
      if value is None:
        found[i] = math.nan
        continue
      try:
        # float() by itself would take the text "1.5".
        number = float(value + 0)
      except (TypeError, ValueError, OverflowError):
        raise UserError(
          f"{self.field}: {self.name} must return a float or None for each "
          f"completion, got {value!r:.{_SHOWN}} for "
          f"{_row(i, prompts, completions)}"
        ) from None
      found[i] = number if math.isfinite(number) else math.inf
    # Reported, not raised: a run leaves such completions out.
    bad = np.flatnonzero(np.isinf(found))
    if len(bad):
      _log.warning(
        "%s: %d of %d rewards are not finite, the first for %s",
        self.name,
        len(bad),
        count,
        _row(int(bad[0]), prompts, completions),
      )
    return found


def open_function(
  name: str, field: str, seconds: int | float = 0.0
) -> RewardFunction:
  """The reward function that a user names as FILE.py:FUNCTION.

  Args:
    name: as the user wrote it.
    field: what it was written in, for messages.
    seconds: that a call may take; 0 = no limit.

  Raises:
    UserError: no such file or function, or the file fails.
  """
  function = load_function(name, field, CONTRACT)
  return RewardFunction(name, function, field, seconds, digest_of_file(name))


def digest_of_file(name: str) -> str:
  """A digest of the file of FILE.py:FUNCTION."""
  data = pathlib.Path(name.rpartition(":")[0]).read_bytes()
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def ask_functions(
  functions: Sequence[RewardFunction],
  prompts: Sequence[PromptRow],
  completions: Sequence[str],
) -> Float[np.ndarray, "F B"]:
  """What each function says of each completion.

  Async functions wait for their answers at the same time. With many processes
  the lead alone calls them.

  Args:
    functions: F of them.
    prompts: of each completion.
    completions: B texts.

  Returns:
    Rewards; NaN = the function said None, infinite = it gave no finite number,
    which is logged with the row.

  Raises:
    StepError: one raised, or took too long; the message names the row.
    UserError: one does not give a float or None for each completion.
  """

  def ask() -> Float[np.ndarray, "F B"]:
    # Async ones first: they go on while the others run here.
    calls: dict[int, tuple[futures.Future, float]] = {}  # place -> its call
    places = range(len(functions))
    for i in sorted(places, key=lambda i: not functions[i].is_async):
      deadline = functions[i]._deadline()
      calls[i] = functions[i]._begin(prompts, completions, deadline), deadline
    found = np.zeros((len(functions), len(completions)))
    for i, function in enumerate(functions):
      try:
        result = function._end(*calls[i])
      except (Exception, _TimeUp) as error:
        raise function._explain(error, prompts, completions) from error
      found[i] = function._check(result, prompts, completions)
    return found

  return hosts.from_lead(ask, np.zeros((len(functions), len(completions))))


def prompt_of(row: PromptRow) -> str | list[Message]:
  """A prompt as the data have it; where more is left out, as it is asked.

  A text of the data that the policy reads whole is given without what a format
  puts around it. A prompt is messages only where the data hold messages.
  """
  column = next((name for name in COLUMNS if name in row.columns), "")
  own = row.columns.get(column)
  if isinstance(own, str):
    return own if own.strip() in row.prompt else row.prompt
  return list(row.messages) if row.messages else row.prompt


def _row(
  i: int, prompts: Sequence[PromptRow], completions: Sequence[str]
) -> str:
  """A completion and its prompt, for messages."""
  return (
    f"row {i}, the completion {completions[i]!r:.{_SHOWN}} of the prompt "
    f"{prompts[i].prompt!r:.{_SHOWN}}"
  )


@contextlib.contextmanager
def _alarm(deadline: float) -> Iterator[None]:
  """Raises `_TimeUp` in the body at a deadline; for the main thread."""
  if deadline == math.inf:
    yield
    return

  def ring(number: int, frame: FrameType | None) -> None:
    raise _TimeUp

  before = signal.signal(signal.SIGALRM, ring)
  # Again every second, for a body that catches it.
  left = max(deadline - time.monotonic(), 1e-3)
  signal.setitimer(signal.ITIMER_REAL, left, 1.0)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
  """The loop of all async functions.

  One for the life of the process, because the clients that they keep are bound
  to the loop they were first used in.
  """
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, daemon=True).start()
  return loop


def _replace_blocked_loop() -> None:
  """Abandons the event loop if a coroutine blocks it."""
  alive = threading.Event()
  _event_loop().call_soon_threadsafe(alive.set)
  if not alive.wait(_GRACE_S):
    _event_loop.cache_clear()
