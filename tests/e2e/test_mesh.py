"""The same run on eight devices, which a process of its own pretends to have.

How many devices there are is settled when jax starts, so it cannot be done in
the process of the other tests.
"""

import collections
import os
import subprocess
import sys

import pytest

from jaxalign.training import reference_cache

RUN = """
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
for sizes in sys.argv.pop(1).split():
  compiled.clear()
  replica, fsdp, sequence, tensor = sizes.split(",")
  status = main.main([
    *sys.argv[2:],
    f"--workdir={sys.argv[1]}/{sizes}",
    f"--config.mesh.replica={replica}",
    f"--config.mesh.fsdp={fsdp}",
    f"--config.mesh.sequence={sequence}",
    f"--config.mesh.tensor={tensor}",
  ])
  assert status == 0, (sizes, status)
  lines = [x for x in compiled if x.startswith("Compiling ")]
  folder = pathlib.Path(sys.argv[1]) / sizes
  (folder / "compiled.txt").write_text("\\n".join(lines))
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


def on_meshes(sizes, folder, command):
  """Runs a command on each mesh `replica,fsdp,sequence,tensor`."""
  command = [word for word in command if not word.startswith("--workdir")]
  flags = os.environ.get("XLA_FLAGS", "")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8 {PATIENCE}",
  }
  done = subprocess.run(
    [sys.executable, "-c", RUN, sizes, str(folder), *command],
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(scope="module")
def runs(superhf, tmp_path_factory):
  folder = tmp_path_factory.mktemp("meshes")
  command = superhf(
    folder,
    steps=2,
    superbatch__prompts=8,
    batch_size=8,
    optimizer__warmup_steps=0,
    checkpoint__every_steps=0,
  )
  return on_meshes("1,1,1,1 1,8,1,1 1,2,2,2", folder, command)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["1,8,1,1", "1,2,2,2"])
def test_metrics_do_not_depend_on_the_mesh(runs, sizes, read):
  one, many = (read(runs / s / "metrics.jsonl") for s in ("1,1,1,1", sizes))
  assert len(one) == len(many) == 2
  for a, b in zip(one, many, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(NOT_COMPARED):
        assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name
  # Neither do the samples: their noise is keyed by prompt, not by device.
  texts = [
    [r["completion"] for r in read(runs / s / "samples.jsonl")]
    for s in ("1,1,1,1", sizes)
  ]
  assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["1,1,1,1", "1,8,1,1", "1,2,2,2"])
def test_a_program_compiles_once_for_its_shapes(runs, sizes):
  """What jax says as it compiles: a function's name, and all its shapes."""
  lines = (runs / sizes / "compiled.txt").read_text().splitlines()
  count = collections.Counter(
    line.partition(" Argument mapping")[0] for line in lines
  )
  for name, models in PROGRAMS.items():
    times = [n for line, n in count.items() if f"jit({name})" in line]
    assert times, name
    assert max(times) <= models, name


@pytest.mark.slow
def test_kto_and_its_stored_reference_on_a_mesh(
  supervised, lab, tmp_path, read
):
  """The KL's rows lie on four devices; parameters are split in two ways."""
  command = supervised(
    "kto.py",
    tmp_path,
    steps=3,
    policy=lab.policy,
    data=lab.pairs,
    validation_data=lab.pairs,
    validation_rows=10,
    batch_size=16,
    micro_batch=8,
    beta=0.5,
    reference="stored",
  )
  on_meshes("1,1,1,1 2,2,1,2", tmp_path, command)
  one, many = (tmp_path / sizes for sizes in ("1,1,1,1", "2,2,1,2"))
  for a, b in zip(
    read(one / "metrics.jsonl"), read(many / "metrics.jsonl"), strict=True
  ):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(NOT_COMPARED):
        assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name
  # The same model, wherever its parameters lie.
  first, second = (
    reference_cache.read(x / "reference.npz") for x in (one, many)
  )
  assert first.model == second.model
  assert second.logps == pytest.approx(first.logps, abs=1e-3)
