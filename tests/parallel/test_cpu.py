"""Memory that a process frees stays its own."""

import ctypes
import subprocess
import sys

CODE = """
import numpy, resource
from jaxalign.parallel import cpu

cpu.keep_freed_memory()

def fill():  # touches 64 MB and gives them back
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  numpy.ones(2**23)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = fill(), fill()
print(first, second)
"""


def test_freed_memory_is_not_touched_for_the_first_time_again():
  """64 MB are 16,384 pages of 4 KB; the second time none of them is new."""
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  first, second = map(int, done.stdout.split())
  glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
  assert second < 100 < first or not glibc
