"""`jaxalign.train`: what `main` does, from a program."""

import os
import pathlib
import signal
import threading

import pytest

import jaxalign
from jaxalign.algorithms import read_config
from jaxalign.training.run import Run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def fields(lab):
  """A small SFT run, that of test_stops."""
  return {
    "algorithm": "sft",
    "policy": lab.policy,
    "data": lab.rows,
    "steps": 3,
    "batch_size": 2,
    "packing": True,
    "max_length": 96,
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    "checkpoint": {"every_steps": 0},
    "compilation_cache": False,
  }


def test_a_stopped_run_goes_on_and_returns_its_metrics(
  fields, tmp_path, monkeypatch
):
  """Stopped by an interrupt, finished from another thread."""
  end_step = Run.end_step

  def interrupted(self, step, *args, **kwargs):
    if step == 1:
      os.kill(os.getpid(), signal.SIGINT)
    return end_step(self, step, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(Run, "end_step", interrupted)
    stopped = jaxalign.train(fields, tmp_path / "run", quiet=True)
  assert (stopped.finished, stopped.model, stopped.step) == (False, None, 2)
  assert "stopped after 2 steps" in repr(stopped)

  results = []
  config = read_config(fields)

  def train():
    results.append(jaxalign.train(config, str(tmp_path / "run")))

  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  (result,) = results
  assert result.finished
  assert [row["step"] for row in result.metrics] == [1, 2, 3]
  assert result.metrics[:2] == stopped.metrics
  assert result.metrics[2]["loss/nll"] < result.metrics[0]["loss/nll"]
  assert jaxalign.load(result.model).model.config.head == "lm"
  # The same call again returns what is there.
  again = jaxalign.train(fields, tmp_path / "run")
  assert again.metrics == result.metrics


@pytest.mark.parametrize(
  ("config", "folder"),
  [
    (f"{ROOT}/configs/sft.py:lab", "sft-lab-steps7"),
    ({"algorithm": "sft"}, "sft-data-rows.jsonl-"),
  ],
)
def test_the_folders_name_is_the_commands(
  config, folder, fields, tmp_path, monkeypatch
):
  """It tells what differs from the preset, or from the defaults."""
  asked = []

  def run(config, path, **flags):
    asked.append((config, path))
    path.mkdir(parents=True)

  monkeypatch.setattr("jaxalign.algorithms.run", run)
  monkeypatch.chdir(tmp_path)
  changes = {"steps": 7}
  if not isinstance(config, str):
    changes = {"data": fields["data"], "policy": fields["policy"]}
  jaxalign.train(config, overrides=changes)
  ((read, path),) = asked
  assert path.as_posix().startswith(f"runs/{folder}")
  assert all(getattr(read, name) == value for name, value in changes.items())
