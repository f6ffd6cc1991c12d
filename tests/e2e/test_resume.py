"""A run that is killed at random ends like one that never was."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

NOT_COMPARED = ("time/", "throughput/", "memory/")


def start(command, cache):
  """A process of its own group, with a compilation cache of this test."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAXALIGN_CACHE": str(cache),
  }
  return subprocess.Popen(
    [sys.executable, "-m", "jaxalign.main", *command],
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def finish(command, cache):
  process = start(command, cache)
  _, err = process.communicate(timeout=900)
  assert process.returncode == 0, err


def kill_after(command, cache, lines, pause):
  """Kills the run `pause` seconds after its log has so many lines.

  Returns:
    Whether it was still running.
  """
  process = start(command, cache)
  log = next(w for w in command if w.startswith("--workdir=")).split("=")[1]
  log = f"{log}/metrics.jsonl"
  while process.poll() is None and count(log) < lines:
    time.sleep(0.02)
  time.sleep(pause)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  return process.returncode == -signal.SIGKILL


def count(path):
  if not os.path.exists(path):
    return 0
  with open(path, "rb") as lines:
    return sum(1 for _ in lines)


def result(folder, read):
  """What must not differ: weights, samples, metrics that are no clock's."""
  metrics = [
    {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
    for row in read(folder / "metrics.jsonl")
  ]
  weights = (folder / "model" / "model.safetensors").read_bytes()
  return metrics, (folder / "samples.jsonl").read_bytes(), weights


@pytest.mark.slow
def test_killed_at_random_is_bit_identical(superhf, tmp_path, read):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  same = {"steps": 16, "compilation_cache": "true", "optimizer__ema": 0.9}
  cache = tmp_path / "cache"
  finish(superhf(whole, **same), cache)
  rng = random.Random(0)
  killed = sum(
    kill_after(superhf(cut, **same), cache, lines, rng.uniform(0, 0.1))
    for lines in (1, 5, 9)
  )
  assert killed >= 2
  finish(superhf(cut, **same), cache)
  wanted, found = result(whole, read), result(cut, read)
  assert len(wanted[0]) == 16
  names = ("metrics", "samples", "weights")
  for name, a, b in zip(names, wanted, found, strict=True):
    assert a == b, f"{name} differ"
