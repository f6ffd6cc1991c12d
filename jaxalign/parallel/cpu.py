"""What a program needs to be fast on a CPU."""

import ctypes
import functools
import sys
from collections.abc import Callable

# By default XLA copies a donated array that is read twice before writing to it;
# an optimizer's averages are such arrays.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# JAX's name of the time that XLA took to compile a program.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 0.3  # seconds of it, from which on there is much to hand on


def keep_freed_memory() -> None:
  """Has the process keep the memory that it frees, for its next step.

  XLA takes its temporary memory from malloc and gives it back after every call.
  glibc hands large pieces on to the system, and to touch them again costs a
  tenth of a small model's step. Nothing happens where the C library is another
  one.
  """
  mallopt = _of_glibc("mallopt")
  if mallopt is not None:
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache  # once in a process
def trim_after_compiling() -> None:
  """Has the process hand on what compiling a program has freed.

  It lies in pieces into which no array fits, so keeping it serves no step.
  Nothing happens where the C library is not glibc.
  """
  import jax  # late: commands import this file before they check their input

  malloc_trim = _of_glibc("malloc_trim")

  def trim(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED and duration_secs > _LONG and malloc_trim is not None:
      malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)


def _of_glibc(name: str) -> Callable[..., int] | None:
  """A function of the C library; None where it is not glibc's."""
  if not sys.platform.startswith("linux"):
    return None
  return getattr(ctypes.CDLL(None), name, None)
