"""Full disks and signals: what is left is whole, and the status is right."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxalign import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def sft(lab, supervised):
  """(workdir, changed fields) -> the command line of a small SFT run."""

  def command(workdir, **changes):
    fields = {
      "policy": lab.policy,
      "data": lab.rows,
      "steps": 3,
      "batch_size": 2,
      "packing": "true",  # one shape
    }
    return supervised("sft.py", workdir, **(fields | changes))

  return command


@pytest.fixture
def env():
  """Environment of a subprocess: CPU, no cache."""
  return os.environ | {"JAX_PLATFORMS": "cpu", "JAXALIGN_CACHE": "off"}


def command(*argv):
  return [sys.executable, "-m", "jaxalign.main", *argv]


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide(sft, env, tmp_path):
  """Also: the whole command as a user starts it prints that line alone."""
  flags = "--xla_force_host_platform_device_count=4"
  done = subprocess.run(
    command(*sft(tmp_path / "run", mesh__fsdp=4, batch_size=6)),
    cwd=ROOT,
    env=env | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 2
  assert done.stderr == (
    "error: config.batch_size gives 6 rows, which cannot be split evenly over "
    "replica x fsdp = 4 devices; make it 4 or 8, or lower config.mesh (-1 "
    "takes as many devices as fit)\n"
  )
  assert not done.stdout
  assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
  """A folder that gets full during the second save.

  A file system of its own where that is allowed; elsewhere the checkpoint
  writer says what it would say there.
  """
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder]
  if subprocess.run(mount, capture_output=True).returncode == 0:
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    # The writes that Orbax gave up tell so when they are collected, and parse
    # source for it: inside another ast.parse that breaks CPython 3.11.
    gc.collect()
    return
  from jaxalign.runtime import manifest

  seal = manifest.seal

  def full(place, content):
    if place.name != "00000001":
      raise OSError(28, "No space left on device")
    seal(place, content)

  monkeypatch.setattr(manifest, "seal", full)
  yield folder


@pytest.mark.slow
def test_a_full_disk(small_disk, sft, capfd):
  """The run says so, keeps the last whole checkpoint and stops."""
  from jaxalign.runtime import checkpoint

  run = small_disk / "run"
  argv = sft(run, steps=60, checkpoint__every_steps=1, checkpoint__keep=50)
  assert main.main(argv) == 2
  err = capfd.readouterr().err
  assert err.count("\n") == 1
  assert "the disk (or the quota) is full while" in err
  assert "free some space and start the same command again" in err
  _, _, step = checkpoint.load(run / "checkpoints")
  assert step >= 1
  assert not (run / "finished.json").exists()
  assert not (run / "model").exists()


def wait_for(path, process, text=""):
  """Until a file is there and holds `text`."""
  deadline = time.monotonic() + 300
  while not path.exists() or text not in path.read_text():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.slow
def test_signals(sft, fork, tmp_path):
  """The first one saves, the next start goes on from there."""
  run = tmp_path / "run"
  argv = sft(run, steps=10**6)

  def begun():
    return {p.name for p in (run / "checkpoints").iterdir()}

  process = fork(argv, {})
  wait_for(run / "metrics.jsonl", process, '"step": 2')
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 130
  assert "stopping after this step" in err
  assert "Traceback" not in err
  (first,) = begun()
  rows = (run / "metrics.jsonl").read_text().splitlines()
  assert json.loads(rows[-1])["step"] == int(first)

  process = fork(argv, {})
  wait_for(run / "metrics.jsonl", process, f'"step": {int(first) + 1},')
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=300)
  assert process.returncode == 143
  assert max(begun()) > first


def test_interrupted_before_the_first_step(sft, monkeypatch, capfd):
  from jaxalign.algorithms.sft import setup

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(setup, "open_policy", interrupted)
  assert main.main(sft("nowhere")) == 130
  assert not capfd.readouterr().err.strip()


def test_without_flags_and_with_help(env):
  def run(*argv):
    return subprocess.run(
      command(*argv), cwd=ROOT, env=env, capture_output=True, text=True
    )

  done = run()
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert "configs/superhf.py" in done.stderr
  done = run("--help")
  assert done.returncode == 0
  assert done.stdout.startswith("usage: python -m jaxalign.main")
  assert not done.stderr
