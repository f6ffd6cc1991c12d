"""Memory that a process frees stays its own; threads for simulated devices."""

import ctypes
import os
import subprocess
import sys

import pytest

from jaxalign.parallel import cpu

CODE = """
import jax, numpy, resource
from jax._src.dispatch import BACKEND_COMPILE_EVENT
from jaxalign.parallel import cpu

cpu.keep_freed_memory()
cpu.trim_after_compiling()

def fill():  # touches 64 MB and gives them back
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  numpy.ones(2**23)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = fill(), fill()
jax.monitoring.record_event_duration_secs(BACKEND_COMPILE_EVENT, 1.0)
print(first, second, fill())
"""


def test_freed_memory_is_not_touched_for_the_first_time_again():
  """64 MB are 16,384 pages of 4 KB; the second time none of them is new.

  Until a program has been compiled for long, which frees other memory.
  """
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  first, second, third = map(int, done.stdout.split())
  glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
  assert second < 100 < min(first, third) or not glibc


@pytest.mark.parametrize(
  ("flags", "alone", "devices"),
  [
    ("", True, None),
    ("--xla_force_host_platform_device_count=1", True, None),
    ("--xla_force_host_platform_device_count=64 --x=y", True, 64),
    ("", False, 1),
  ],
)
def test_simulated_devices_have_threads_to_wait_in(
  flags, alone, devices, monkeypatch
):
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setenv("NPROC", "")  # taken back at the end
  monkeypatch.delenv("NPROC")
  cpu.make_room_for_collectives(alone=alone)
  least = max(os.cpu_count(), cpu.THREADS * devices) if devices else None
  assert os.environ.get("NPROC") == (str(least) if least else None)
