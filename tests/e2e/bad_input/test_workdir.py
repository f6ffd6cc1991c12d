"""Workdirs that cannot become the run's."""

import os
import subprocess
import sys

import pytest

from jaxalign import main


@pytest.fixture
def other_run(run, superhf, monkeypatch):
  """A run's folder, opened by another learning rate."""
  from jaxalign.algorithms.superhf import setup
  from jaxalign.setup.folder import open_workdir

  def begin(spec, folder):
    open_workdir(spec.config, folder).close()
    return 0

  argv = superhf(run, optimizer__learning_rate=1e-3)
  with monkeypatch.context() as patch:
    patch.setattr(setup, "run", begin)
    assert main.main(argv) == 0
  return run


def test_another_config_is_refused(other_run, superhf, run, fail):
  line = fail(superhf(run, seed=7))
  assert f"{other_run} holds a run with another config" in line
  assert "optimizer.learning_rate was 0.001, now 0.01" in line
  assert "seed was 0, now 7" in line
  assert "give another --workdir" in line


def test_a_wrong_path_is_said_before_another_config(
  other_run, superhf, run, fail
):
  line = fail(superhf(run, policy="./nowhere", seed=7))
  assert "./nowhere does not exist" in line
  line = fail([*superhf(run, seed="seven")])
  assert "config.seed must be a whole number" in line


def test_a_new_length_needs_a_run(superhf, run, fail):
  line = fail([*superhf(run, steps=9), "--extend"])
  assert f"{run} holds no run; name its folder by --workdir" in line


def test_a_run_that_cannot_start_moves_nothing(other_run, superhf, run, fail):
  argv = superhf(run, policy="./nowhere")
  assert "./nowhere does not exist" in fail([*argv, "--fresh"])


def test_a_run_to_begin_from(other_run, superhf, lab, run, fail):
  argv = [word for word in superhf(run) if "--config.policy=" not in word]
  for name, said in (
    ("nowhere", ": nowhere does not exist"),
    (lab.policy, " must be a run's folder"),
  ):
    line = fail([*argv, "--fresh", f"--init_from={name}"])
    assert f"config.init_from{said}" in line
  (run / "checkpoints").mkdir()
  line = fail([*argv, "--fresh", f"--init_from={run}"])
  assert f"names the run's own folder {run}" in line
  argv[1] += "-2"
  line = fail([*argv, f"--init_from={run}"])
  assert "has neither a finished model/ nor a whole checkpoint" in line
  line = fail([*superhf(run), "--fresh", f"--init_from={run}"])
  assert "config.init_from takes the place of config.policy" in line


def test_what_may_change_is_not_refused(other_run, superhf, run, fail):
  argv = superhf(
    run, optimizer__learning_rate=1e-3, checkpoint__keep=5, mesh__fsdp=3
  )
  assert "config.mesh" in fail(argv)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda path: path.touch(), ("a file is in the way", "another path")),
    (
      lambda path: (path / "novel.txt").touch(path.mkdir() or 0o644),
      ("is not empty (novel.txt)", "new or empty folder"),
    ),
    (
      lambda path: (path / "config.json").touch(path.mkdir() or 0o644),
      ("config.json is not JSON", "give another --workdir"),
    ),
  ],
)
def test_a_bad_workdir(make, words, superhf, run, fail):
  make(run)
  line = fail(superhf(run))
  for word in words:
    assert word in line


def test_a_workdir_that_may_not_be_written(superhf, run, fail, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: path != run.parent)
  assert "run cannot be written: permission denied" in fail(superhf(run))


def test_a_workdir_in_use(other_run, superhf, run, fail):
  code = (
    "import fcntl, sys; file = open(sys.argv[1]); "
    "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, other_run / ".lock"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as other:
    other.stdout.readline()
    argv = superhf(run, optimizer__learning_rate=1e-3)
    assert "is in use by process" in fail(argv)
    other.communicate(b"\n")
