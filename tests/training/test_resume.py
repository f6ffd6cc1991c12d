"""A run that is killed twice and started again ends like one that never was."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxalign.runtime import checkpoint

# Twelve steps of a toy, saved every four, in forks of one process that has
# imported everything. The second argument is where each dies: "step 7" = with
# the rows of step 6 written and nothing of 7 saved; "save 8" = while Orbax
# writes; "seal 12" = before the manifest; "end 0" = not at all.
RUN = """
import functools, json, os, pathlib, signal, sys
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxalign.runtime import checkpoint, manifest, metrics, profile, signals
from jaxalign.runtime import console, workdir
from jaxalign.training.recorder import Recorder

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

@functools.partial(jax.jit, donate_argnums=0)
def update(state, key):
  noise = jax.random.normal(key, state["w"].shape)
  return {"w": state["w"] * 0.9 + noise, "n": state["n"] + 1}

def run(folder, what, at):
  state = {"w": jnp.zeros((256, 256)), "n": jnp.int32(0)}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
  run = workdir.open_workdir(folder, {"seed": 0})
  saver = checkpoint.Checkpointer(run.checkpoints, every_steps=4)
  found = saver.restore_latest(target)
  done, extra = 0, {"files": None, "counters": {}}
  if found:
    state, extra, done = found.state, found.extra, found.step
  log = metrics.MetricsLog(folder, offsets=extra["files"], step=done)
  with signals.catch_signals() as stop, console.Console(12, "toy") as shown:
    recorder = Recorder(
      log=log, console=shown, saver=saver, stop=stop, done=done, total=12,
      profiler=profile.Profiler(run.profile), counters=dict(extra["counters"]))
    for step in recorder.steps():
      if at == step + 1:
        saver.wait()  # so that it dies in this step's save, not the last one's
      if (what, at) == ("save", step + 1):
        ocp.PyTreeCheckpointHandler.finalize = die
      if (what, at) == ("seal", step + 1):
        manifest.seal = die
      state = update(state, jax.random.fold_in(jax.random.key(0), step))
      count = recorder.counters.get("rows", 0)
      recorder.counters["rows"] = count + 1
      recorder.report(
        step, {"w/mean": state["w"].mean(), "rows": count},
        [{"step": step + 1, "completion": str(step) * 9, "kept": True}])
      if (what, at) == ("step", step + 1):
        die()
      recorder.save(step, state)
  saver.close()
  log.close()

for folder, where in json.loads(sys.argv[1]):
  child = os.fork()
  if not child:
    what, at = where.split()
    run(pathlib.Path(folder), what, int(at))
    os._exit(0)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print("\\nexit", status, flush=True)
"""


VARYING = ("time/", "throughput/", "memory/")


def rows(folder):
  """The logs, without the values that may differ between two runs."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  kept = [
    [(k, v) for k, v in json.loads(line).items() if not k.startswith(VARYING)]
    for line in lines
  ]
  return kept, (folder / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  jobs = [(str(whole), "end 0")]
  jobs += [(str(cut), x) for x in ("step 7", "save 8", "seal 12", "end 0")]
  done = subprocess.run(
    [sys.executable, "-c", RUN, json.dumps(jobs)],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  killed = -signal.SIGKILL
  lines = done.stdout.splitlines()
  statuses = [int(line.split()[1]) for line in lines if line[:5] == "exit "]
  assert statuses == [0, killed, killed, killed, 0], done.stderr
  assert "00000012 is passed over" in done.stderr
  assert rows(cut) == rows(whole)
  assert len(rows(cut)[0]) == 12
  wanted, found = (checkpoint.load(f / "checkpoints") for f in (whole, cut))
  assert wanted[2] == found[2] == 12
  for name in ("w", "n"):
    assert np.array_equal(wanted[0][name], found[0][name])
