"""Agreement between processes: one alone, and two that talk over loopback."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.parallel import hosts


def test_one_process_agrees_with_itself():
  assert hosts.is_lead()
  value = {"n": 3, "rows": np.arange(4, dtype=np.int64)}
  assert hosts.broadcast(value) is value
  assert hosts.agree(True) is True
  assert hosts.agree(False) is False
  found = hosts.gather(value)
  assert found["n"].tolist() == [3]
  assert np.array_equal(found["rows"], [[0, 1, 2, 3]])
  hosts.barrier("here", 0.001)
  assert hosts.from_lead(lambda: 5, 0) == 5
  with pytest.raises(UserError, match="as it was said"):
    hosts.from_lead(mistaken, 0)


def mistaken():
  raise UserError("as it was said")


TWO = """
import sys, time
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, num_processes=2, process_id=rank)
jax.config.update("jax_transfer_guard", "disallow")
from jaxalign.errors import StepError, UserError
from jaxalign.parallel import hosts

assert jax.process_count() == 2
assert hosts.is_lead() == (rank == 0)

# Every bit of 64 arrives; numbers stay numbers.
mine = {"step": 2**40 + rank, "late": rank == 1, "loss": 0.1 + rank,
        "rows": np.array([[1.5, rank]], np.float64), "none": np.zeros((0, 3))}
found = hosts.broadcast(mine)
assert type(found["step"]) is int and found["step"] == 2**40
assert found["late"] is False
assert found["loss"] == 0.1
assert found["rows"].dtype == np.float64
assert found["rows"].tolist() == [[1.5, 0]]
assert found["none"].shape == (0, 3)

rows = hosts.gather(np.array([rank, 2**40], np.int64))
assert rows.tolist() == [[0, 2**40], [1, 2**40]]
assert hosts.gather(rank).tolist() == [0, 1]

assert hosts.agree(rank == 1) is True
assert hosts.agree(False) is False

# Only the lead is asked; its failure ends the others too.
def ask():
  assert rank == 0
  return np.array([3, 4])

assert hosts.from_lead(ask, np.zeros(2, np.int64)).tolist() == [3, 4]
kinds = {UserError: UserError, StepError: StepError, OSError: RuntimeError}
for kind, wanted in kinds.items():
  def fail():
    raise kind("no answer")
  try:
    hosts.from_lead(fail, 0)
  except kind if rank == 0 else wanted as error:
    assert type(error) is (kind if rank == 0 else wanted)
    assert ("no answer" if rank == 0 else "the lead process") in str(error)
  else:
    raise AssertionError("nothing failed")

for _ in range(2):
  hosts.barrier("step", 60)
if rank == 0:
  try:
    hosts.barrier("alone", 0.5)
  except TimeoutError as error:
    assert "did not reach alone within 0.5 s" in str(error)
  else:
    raise AssertionError("nobody else came")
else:
  time.sleep(2)
print("done")
"""


@pytest.mark.slow
def test_two_processes():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  running = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, address, str(rank)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  for process in running:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.endswith("done\n")
