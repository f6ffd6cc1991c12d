"""What a program needs to be fast on a CPU."""

import ctypes
import sys

# By default XLA copies a donated array that is read twice before writing to it;
# an optimizer's averages are such arrays.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
  """Has the process keep the memory that it frees, for its next step.

  XLA takes its temporary memory from malloc and gives it back after every call.
  glibc hands large pieces on to the system, and to touch them again costs a
  tenth of a small model's step. Nothing happens where the C library is another
  one.
  """
  if not sys.platform.startswith("linux"):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
