"""Agreement between processes: one alone, and two that talk over loopback."""

import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxalign import cli
from jaxalign.errors import HostError, UserError
from jaxalign.parallel import hosts
from jaxalign.parallel.cluster import Cluster


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


def test_a_coordinator_that_is_late_is_no_mistake(monkeypatch, capsys):
  """Status 1, on which launchers start again; 2 would end the job."""
  monkeypatch.setattr(hosts, "START_SECONDS", 0)
  with socket.socket() as probe:  # bound, but it does not listen
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(HostError, match="cannot be reached within 0 s") as late:
      hosts._check_address(Cluster(address, 2, 1, "the flags"))
  assert cli.explain(late.value) == 1
  assert capsys.readouterr().err.startswith(f"error: the coordinator {address}")


def test_a_number_that_jax_does_not_share_is_refused(monkeypatch):
  hosts.check_number()
  monkeypatch.setattr(jax, "process_index", lambda: 3)
  with pytest.raises(UserError, match=r"number 0, but it is host 3 of its TPU"):
    hosts.check_number()


def test_jax_must_not_be_used_before_the_hosts_join():
  jax.devices()
  with pytest.raises(UserError, match="JAX was used before the hosts joined"):
    hosts.start(Cluster("127.0.0.1:1", 2, 0, "the flags"))


TWO = """
import sys, time
import jax, numpy as np
from jaxalign.errors import HostError, StepError, UserError
from jaxalign.parallel import hosts
from jaxalign.parallel.cluster import find_cluster

hosts.BEAT_SECONDS, hosts.GRACE_SECONDS = 0.2, 0.5
rank = int(sys.argv[2])
hosts.start(find_cluster(sys.argv[1], 2, rank))
jax.config.update("jax_transfer_guard", "disallow")
assert hosts.count() == jax.process_count() == 2
assert hosts.is_lead() == (rank == 0)

# A second run in the same process is watched again.
with hosts.together():
  pass
hosts.start(None)
assert not hosts._watch.stop.is_set()

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
assert hosts.highest(15 * rank) == 15
assert hosts.highest(0) == 0

# Each process does its part, and all have the whole.
seen = []

def double(items):
  seen.extend(items)
  return [(2 * x, "\\ud800") for x in items]

found = hosts.spread(double, range(5))
assert [x for x, _ in found] == [0, 2, 4, 6, 8]
assert {text for _, text in found} == {"\\ud800"}
assert seen == [[0, 1], [2, 3, 4]][rank]
assert hosts.spread(double, range(1))[0][0] == 0
found = hosts.spread(lambda items: ["x" * 100_000] * len(items), range(2))
assert list(map(len, found)) == [100_000] * 2

def break_down(items):
  if rank == 1:
    raise OSError("no disk")
  return items

try:
  hosts.spread(break_down, range(2))
except (OSError if rank == 1 else RuntimeError) as error:
  assert ("no disk" if rank == 1 else "host 1 (") in str(error)
else:
  raise AssertionError("nothing failed")

# What differs, and on which host.
hosts.check_same({"steps": 3}, "fix it")
try:
  hosts.check_same({"steps": 3 + rank, "seed": 0}, "fix it")
except UserError as error:
  assert "the hosts differ: steps is 3 on host 0 (" in str(error)
  assert "and 4 on host 1 (" in str(error)
else:
  raise AssertionError("3 is not 4")

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

# Where no time-out reaches, each says where it is.
def wait(deep):
  return wait(deep - 1) if deep else time.sleep(1.5)

hosts.STEP_SECONDS = 0.5
wait(6)
hosts.STEP_SECONDS = 1800

for _ in range(2):
  hosts.barrier("step", 60)
if rank == 0:
  try:
    hosts.barrier("alone", 0.5)
  except HostError as error:
    assert str(error).startswith("host 1 (")
    assert str(error).endswith(") did not reach alone within 0.5 s")
  else:
    raise AssertionError("nobody else came")
else:
  time.sleep(1)

# One fails; the other, which waits for it, is told and ends.
with hosts.together():
  if rank == 1:
    raise UserError("a mistake of one host")
  hosts.barrier("never", 60)
"""


def test_two_processes():
  """All of it in one start, which takes most of the time."""
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
  (lead, lead_errors), (other, errors) = (
    (process.wait(timeout=120), process.communicate()[1]) for process in running
  )
  assert (lead, other) == (1, 2), lead_errors + errors
  assert "error: a mistake of one host\n" in errors
  for text in (lead_errors, errors):
    assert "the hosts have not met for 0 minutes" in text
    assert re.search(r"That of host \d .*:\n  File .* in <module>", text)
    assert ", in wait" in text
  assert re.search(r"error: host 1 .* failed; its log says why", lead_errors)
