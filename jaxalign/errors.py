"""The one exception that is meant for people, and how others become it."""

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # of an OSError: the disk is
INTERRUPTED = 130  # 128 + SIGINT


class UserError(ValueError):
  """A mistake in what the user gave us, told in one line.

  The message says where (field, file and line), what was found, which rule it
  breaks and what to do. A command prints it and exits with status 2; every
  other exception is a bug of ours and keeps its traceback.
  """


@contextlib.contextmanager
def explained(
  *kinds: type[Exception], by: Callable[[str], str]
) -> Iterator[None]:
  """Exceptions of these kinds become a `UserError`.

  A `UserError` from inside goes through as it is: it says more already.

  Args:
    kinds: what the code inside may raise over a user's mistake.
    by: the first line of the exception's text -> the whole message.

  Raises:
    UserError: instead of the exception.
  """
  try:
    yield
  except kinds as error:
    if isinstance(error, UserError):
      raise
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(by(reason)) from error


def exit_status(run: Callable[[], int | None]) -> int:
  """Runs a command; a `UserError` ends it with one line and status 2.

  So does a full disk, wherever it is met; Ctrl-C gives `INTERRUPTED`.
  """
  try:
    return run() or 0
  except KeyboardInterrupt:
    print(file=sys.stderr)  # the terminal shows ^C
    return INTERRUPTED
  except UserError as error:
    text = str(error)
  except OSError as error:
    if error.errno not in FULL:
      raise
    text = (
      f"{error.filename or 'a file'}: the disk (or the quota) is full; free "
      "some space and start the same command again"
    )
  print("error:", " ".join(text.splitlines()), file=sys.stderr)
  return 2


def told(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """A parser whose mistakes are `UserError`s instead of usage and exit."""

  def error(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")

  parser.error = error
  return parser
