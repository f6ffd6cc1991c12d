"""The exceptions that are meant for people."""

import errno

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # of an OSError


class UserError(ValueError):
  """A mistake in what the user gave us, in one line.

  The message says where (field, file and line), what was found, which rule it
  breaks and what to do. A command prints it and exits with status 2; every
  exception of another kind than these is a bug of ours and keeps its traceback.
  """


class StepError(UserError):
  """A step that failed for a reason which may be gone in the next one.

  A reward function that raised or took too long, say. It counts against
  `max_exception_count`; one too many ends the run like any `UserError`.
  """


class HostError(RuntimeError):
  """Another process, the hub or a store does not answer, or a GPU is missing.

  A command prints it and exits with status 1: it is no mistake in the input,
  and the same command may succeed the next time.
  """
