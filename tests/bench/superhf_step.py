"""Where a SuperHF step's time goes, and how soon a second start is through one.

The lab preset with the models that ship: 8 prompts x 16 samples x 48 tokens.
First the command is started twice with an empty compilation cache, and the
seconds from the second start to the end of its first step are taken. Then a
run in this process, in which the three compiled programs are timed each on
its own (waiting for their results); the rest of a step is the host's: prompts,
decoding, truncation, encoding, filtering, diversity, metrics, files. Medians
over the steps after the first ones, which compile. Prints one JSON line.

    python tests/bench/superhf_step.py [--steps 12]
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from jaxalign import main as command
from jaxalign.sampling import sampler
from jaxalign.scoring import scorer
from jaxalign.training.recorder import Recorder
from jaxalign.training.run import Run

CONFIG = "configs/superhf.py:lab"
WARM_UP = 4  # steps; each length bucket compiles when it first comes
ROOT = pathlib.Path(__file__).parents[2]


def start(folder, name):
  """Seconds from the start of the command to the end of its first step."""
  words = ["-m", "jaxalign.main", "--config", CONFIG, "--config.steps=1"]
  words += ["--workdir", str(folder / name)]
  env = os.environ | {"JAXALIGN_CACHE": str(folder / "cache")}
  began = time.perf_counter()
  with subprocess.Popen(
    [sys.executable, "-u", *words],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    done = [
      time.perf_counter() - began
      for line in process.stdout
      if line.startswith("step 1/")
    ]
  assert process.returncode == 0
  return done[0]


def timed(spans, name, fn):
  """`fn`, noting when it ran, until its results were there."""

  @functools.wraps(fn)
  def run(*args, **kwargs):
    began = time.perf_counter()
    out = jax.block_until_ready(fn(*args, **kwargs))
    spans.append((name, began, time.perf_counter()))
    return out

  return run


def run(folder, steps):
  """Runs the lab preset here; the programs' spans and the steps' ends."""
  spans, ends = [], []
  jit, report = Run.jit, Recorder.report

  def timed_jit(self, update):
    return timed(spans, "update", jit(self, update))

  def noted(*args, **kwargs):
    report(*args, **kwargs)
    ends.append(time.perf_counter())

  for owner, name, label in (
    (sampler.Sampler, "__call__", "sample"),
    (scorer._Program, "__call__", "score"),
  ):
    setattr(owner, name, timed(spans, label, getattr(owner, name)))
  Run.jit, Recorder.report = timed_jit, noted
  os.chdir(ROOT)
  words = ["--config", CONFIG, f"--config.steps={steps}"]
  with contextlib.redirect_stdout(io.StringIO()):
    assert command.main([*words, "--workdir", str(folder / "timed")]) == 0
  return spans, ends


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=12)
  steps = parser.parse_args().steps
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    first, second = start(folder, "first"), start(folder, "second")
    os.environ["JAXALIGN_CACHE"] = str(folder / "cache")
    spans, ends = run(folder, steps)
  parts = {"sample": [], "score": [], "update": [], "host": []}
  for began, ended in list(itertools.pairwise(ends))[WARM_UP - 1 :]:
    left = ended - began
    for label in ("sample", "score", "update"):
      spent = sum(
        b - a for n, a, b in spans if n == label and began <= a < ended
      )
      parts[label].append(spent)
      left -= spent
    parts["host"].append(left)
  seconds = {n: statistics.median(found) for n, found in parts.items()}
  total = sum(seconds.values())
  report = {
    "bench": "superhf_step",
    "shape": "lab: 8 prompts x 16 samples x 48 tokens, float32",
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[0], 1),
    "seconds": {n: round(s, 3) for n, s in seconds.items()},
    "share": {n: round(s / total, 3) for n, s in seconds.items()},
    "step_s": round(total, 3),
    "first_step_cold_s": round(first, 1),
    "first_step_warm_s": round(second, 1),
  }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
