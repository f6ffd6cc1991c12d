"""The same run on eight devices, which a process of its own pretends to have.

How many devices there are is settled when jax starts, so it cannot be done in
the process of the other tests.
"""

import collections
import json
import os
import subprocess
import sys

import pytest

from jaxalign.training import reference_cache

RUN = """
import json
import logging
import pathlib
import sys
import jax
from jaxalign import main
assert len(jax.devices()) == 8
compiled = []

class Listener(logging.Handler):
  def emit(self, record):
    compiled.append(record.getMessage())

logger = logging.getLogger("jax._src.interpreters.pxla")
logger.addHandler(Listener())
logger.propagate = False
jax.config.update("jax_log_compiles", True)
for command in json.loads(sys.argv[1]):
  compiled.clear()
  assert main.main(command) == 0, command
  (folder,) = (x for x in command if x.startswith("--workdir="))
  lines = [x for x in compiled if x.startswith("Compiling ")]
  path = pathlib.Path(folder.removeprefix("--workdir=")) / "compiled.txt"
  path.write_text("\\n".join(lines))
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
def runs(superhf, supervised, lab, tmp_path_factory):
  """The folder of runs of SuperHF and KTO, in one process.

  It has a folder for each method, and in it one for each mesh.
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

  commands = [superhf_on(sizes) for sizes in (ONE, MANY["superhf"])]
  commands += [kto_on(sizes) for sizes in (ONE, MANY["kto"])]
  flags = os.environ.get("XLA_FLAGS", "")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8 {PATIENCE}",
  }
  done = subprocess.run(
    [sys.executable, "-c", RUN, json.dumps(commands)],
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr
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
@pytest.mark.parametrize("sizes", [ONE, MANY["superhf"]])
def test_a_program_compiles_once_for_its_shapes(runs, sizes):
  """What jax says as it compiles: a function's name, and all its shapes."""
  lines = (runs / "superhf" / sizes / "compiled.txt").read_text().splitlines()
  count = collections.Counter(
    line.partition(" Argument mapping")[0] for line in lines
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
