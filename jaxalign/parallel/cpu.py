"""What a program needs to be fast on a CPU."""

import ctypes
import functools
import os
import re
import sys

# By default XLA copies a donated array that is read twice before writing to it;
# an optimizer's averages are such arrays.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

THREADS = 8  # of a simulated device: the collectives that may wait at once
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
  libc = _glibc()
  if libc is not None:
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache  # once in a process
def trim_after_compiling() -> None:
  """Has the process hand on what compiling a program has freed.

  It lies in pieces into which no array fits, so keeping it serves no step.
  Nothing happens where the C library is not glibc.
  """
  libc = _glibc()
  if libc is None:
    return
  import jax  # late: commands import this file before they check their input

  def trim(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED and duration_secs > _LONG:
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)


def make_room_for_collectives(*, alone: bool) -> None:
  """Gives simulated devices enough threads; before JAX starts its backend.

  XLA's CPU devices share a pool of as many threads as there are cores. One that
  waits in a collective is taken, and where a layer gathers several matrices at
  once, all threads may wait in different ones, for ever.

  Args:
    alone: whether this is the run's only process.
  """
  flag = r"--xla_force_host_platform_device_count=(\d+)"
  found = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
  devices = int(found[-1]) if found else 1
  if devices > 1 or not alone:
    threads = max(os.cpu_count() or 1, THREADS * devices)
    os.environ.setdefault("NPROC", str(threads))  # as XLA calls it


def _glibc() -> ctypes.CDLL | None:
  """The C library, where it is glibc."""
  if not sys.platform.startswith("linux"):
    return None
  libc = ctypes.CDLL(None)
  return libc if hasattr(libc, "malloc_trim") else None
