"""The same run on one device and on eight, which a process pretends to have.

How many devices there are is settled when jax starts, so it cannot be done in
the process of the other tests.
"""

import collections
import os

import pytest

from jaxalign import main
from jaxalign.training import reference_cache

# Writes what jax says as it compiles to a file.
LISTEN = """
import jax, logging
assert len(jax.devices()) == 8
handler = logging.FileHandler({file!r})
logger = logging.getLogger("jax._src.interpreters.pxla")
logger.addHandler(handler)
logger.propagate = False
jax.config.update("jax_log_compiles", True)
"""
# The functions of a run that take time to compile, and how many models have
# each: two reward models are alike here.
PROGRAMS = {"sample": 1, "score": 2, "update": 1}
NOT_COMPARED = ("time/", "throughput/", "memory/")
# Eight devices share few cores, so one may be late at a meeting point. XLA ends
# the process after 40 s of that.
PATIENCE = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
  "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)


ONE = "1,1,1,1"  # replica, fsdp, sequence, tensor
MANY = {"superhf": "1,2,2,2", "kto": "2,2,1,2"}


@pytest.fixture(scope="module")
def runs(fork, superhf, supervised, lab, tmp_path_factory):
  """The folder of runs of SuperHF and KTO: one for each method and mesh.

  Those of one device are this process's, the others have one each.
  """
  folder = tmp_path_factory.mktemp("meshes")

  def of_mesh(sizes):
    axes = ("replica", "fsdp", "sequence", "tensor")
    sizes = zip(axes, sizes.split(","), strict=True)
    return {f"mesh.{axis}": size for axis, size in sizes}

  def superhf_on(sizes):
    return superhf(
      folder / "superhf" / sizes,
      steps=2,
      superbatch__prompts=8,
      batch_size=8,
      optimizer__warmup_steps=0,
      checkpoint__every_steps=0,
      **of_mesh(sizes),
    )

  def kto_on(sizes):
    return supervised(
      "kto.py",
      folder / "kto" / sizes,
      steps=3,
      policy=lab.policy,
      data=lab.pairs,
      validation_data=lab.pairs,
      validation_rows=10,
      batch_size=16,
      micro_batch=8,
      beta=0.5,
      reference="stored",
      **of_mesh(sizes),
    )

  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count=8 {PATIENCE}"
  running = [
    fork(
      command(MANY[method]),
      {"XLA_FLAGS": flags},
      LISTEN.format(file=str(folder / f"{method}.txt")),
    )
    for method, command in (("superhf", superhf_on), ("kto", kto_on))
  ]
  for command in (superhf_on, kto_on):
    assert main.main(command(ONE)) == 0
  for process in running:
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
  return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), [("superhf", 2), ("kto", 3)])
def test_metrics_do_not_depend_on_the_mesh(runs, method, steps, read):
  """KTO's KL: its rows lie on four devices, parameters are split two ways."""
  one, many = (
    read(runs / method / sizes / "metrics.jsonl")
    for sizes in (ONE, MANY[method])
  )
  assert len(one) == len(many) == steps
  for a, b in zip(one, many, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(NOT_COMPARED):
        assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name


@pytest.mark.slow
def test_a_program_compiles_once_for_its_shapes(runs):
  """Jax says a function's name, and all its shapes; see test_steps, too."""
  lines = (runs / "superhf.txt").read_text().splitlines()
  count = collections.Counter(
    line.partition(" Argument mapping")[0]
    for line in lines
    if line.startswith("Compiling ")
  )
  for name, models in PROGRAMS.items():
    times = [n for line, n in count.items() if f"jit({name})" in line]
    assert times, name
    assert max(times) <= models, name


@pytest.mark.slow
def test_samples_do_not_depend_on_the_mesh(runs, read):
  """Their noise is keyed by prompt, not by device."""
  one, many = (
    [row["completion"] for row in read(runs / "superhf" / s / "samples.jsonl")]
    for s in (ONE, MANY["superhf"])
  )
  assert one == many


@pytest.mark.slow
def test_a_stored_reference_does_not_depend_on_the_mesh(runs):
  """It is of the same model, wherever its parameters lie."""
  one, many = (
    reference_cache.read(runs / "kto" / sizes / "reference.npz")
    for sizes in (ONE, MANY["kto"])
  )
  assert one.model == many.model
  assert many.logps == pytest.approx(one.logps, abs=1e-3)
