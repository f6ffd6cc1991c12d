"""A run that is killed at random ends like one that never was."""

import os
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import main
from jaxalign.runtime import checkpoint
from jaxalign.training.run import Run

NOT_COMPARED = ("time/", "throughput/", "memory/")


@pytest.fixture
def kill_after(fork):
  """(command, lines, pause) -> kills a run once its log has so many lines."""

  def kill_after(command, lines, pause):
    """Whether the run was still there `pause` seconds later."""
    process = fork(command, {})
    log = next(w for w in command if w.startswith("--workdir=")).split("=")[1]
    while process.poll() is None and count(f"{log}/metrics.jsonl") < lines:
      time.sleep(0.02)
    time.sleep(pause)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL

  return kill_after


def test_a_run_in_bfloat16_goes_on(superhf, lab, read, tmp_path, capsys):
  """Base in bfloat16, adapters in float32, as the later presets have it.

  On other prompts than it began with, or with another reward model under the
  same name, it does not, unless it is told to. Where moments and reward models
  wait makes no difference.
  """
  prompts, reward = tmp_path / "prompts.jsonl", tmp_path / "reward"
  shutil.copy(lab.prompts, prompts)
  shutil.copytree(lab.reward, reward)
  fields = {
    "prompts": prompts,
    "reward_model": reward,
    "precision.params": "bfloat16",
    "precision.compute": "bfloat16",
    "lora.rank": 2,
    "lora.dropout": 0.1,
    "lora.targets": "query_key_value",
    "checkpoint.every_steps": 1,
    "steps": 2,
  }
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert main.main(superhf(whole, **fields)) == 0
  # As if it had been killed after step 1: what came later is taken back.
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  shutil.rmtree(cut / "checkpoints" / "00000002")
  rows = prompts.read_text()
  prompts.write_text(rows.replace("What does", "What did", 1))
  assert main.main(superhf(cut, **fields)) == 2
  assert "config.prompts no longer gives the rows" in capsys.readouterr().err
  # Told to, it goes on; here to its end, after the last step.
  other = tmp_path / "other"
  shutil.copytree(whole, other)
  (other / "finished.json").unlink()
  told = fields | {"checkpoint.allow_other_data": "true"}
  assert main.main(superhf(other, **told)) == 0
  prompts.write_text(rows)
  # Nor with a reward model that was trained further in the meantime.
  weights = (reward / "model.safetensors").read_bytes()
  (reward / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\x3f")
  assert main.main(superhf(cut, **fields)) == 2
  assert "config.reward_model is no longer the model" in capsys.readouterr().err
  (reward / "model.safetensors").write_bytes(weights)
  offload = {"optimizer.offload": "true", "scoring.offload": "true"}
  assert main.main(superhf(cut, **fields | offload)) == 0
  assert result(cut, read) == result(whole, read)
  assert "sampling/logp_diff_max" not in read(whole / "metrics.jsonl")[0]


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
def test_killed_at_random_is_bit_identical(superhf, kill_after, tmp_path, read):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  same = {"steps": 16, "optimizer__ema": 0.9, "compilation_cache": "true"}
  assert main.main(superhf(whole, **same)) == 0
  rng = random.Random(0)
  for lines in (1, 7):
    assert kill_after(superhf(cut, **same), lines, rng.uniform(0, 0.1))
  assert main.main(superhf(cut, **same)) == 0
  wanted, found = result(whole, read), result(cut, read)
  assert len(wanted[0]) == 16
  names = ("metrics", "samples", "weights")
  for name, a, b in zip(names, wanted, found, strict=True):
    assert a == b, f"{name} differ"
  # What is exported is the average.
  average, _, step = checkpoint.load(cut / "checkpoints", "ema")
  assert step == 16
  exported = jaxalign.load(cut / "model").params
  jax.tree.map(np.testing.assert_array_equal, exported, average)


@pytest.mark.slow
def test_killed_against_a_stored_reference(
  supervised, lab, kill_after, tmp_path, read
):
  """Killed while it starts, then while it trains."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  fields = {
    "steps": 12,
    "policy": lab.policy,
    "data": lab.pairs,
    "batch_size": 4,
    "reference": "stored",
    "checkpoint.every_steps": 2,
  }
  assert main.main(supervised("kto.py", whole, **fields)) == 0
  command = supervised("kto.py", cut, **fields)
  rng = random.Random(0)
  assert kill_after(command, 0, rng.uniform(0.5, 2))
  assert kill_after(command, 3, rng.uniform(0, 0.1))
  assert main.main(command) == 0
  assert result(cut, read) == result(whole, read)


def interrupted(run):
  """In the place of `Run.steps`: Ctrl-C, which lets one step end."""
  os.kill(os.getpid(), signal.SIGINT)
  return run.recorder.steps()


def test_a_run_on_an_object_store_goes_on(
  bucket, supervised, lab, read, tmp_path, capsys, monkeypatch
):
  """Model and folder are there; cut back, it ends as it had ended."""
  monkeypatch.chdir(tmp_path)
  for file in pathlib.Path(lab.policy).iterdir():
    (bucket / "policy" / file.name).write_bytes(file.read_bytes())
  folder = bucket / "runs" / "sft"
  command = supervised(
    "sft.py",
    folder,
    policy=bucket / "policy",
    data=lab.rows,
    steps=2,
    batch_size=4,
    checkpoint__every_steps=1,
    metrics__tensorboard="false",
  )

  def left():
    rows = read(folder / "metrics.jsonl")
    kept = [
      {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
      for row in rows
    ]
    names = sorted(path.name for path in folder.iterdir())
    return names, kept, (folder / "model/model.safetensors").read_bytes()

  assert main.main(command) == 0
  before = left()
  assert {"config.json", "finished.json", "report.html"} < set(before[0])
  # As if it had been killed after step 1, and then stopped before the end.
  (folder / "finished.json").unlink()
  (folder / "model").rmtree()
  (folder / "checkpoints" / "00000002" / "manifest.json").unlink()
  with monkeypatch.context() as patch:
    patch.setattr(Run, "steps", interrupted)
    assert main.main(command) == 130
  out = capsys.readouterr().out
  # The store is named, not the temporary folder of this machine.
  assert f"which is saved in {folder}/checkpoints\n" in out
  assert f"report: {folder}/report.html\n" in out
  assert f"{folder}: goes on after step 1 of 2" in out
  assert main.main(command) == 0
  assert left() == before
  # What is done is not done again, and nothing of it is left here.
  assert main.main(command) == 0
  assert f"read {folder}/report.html" in capsys.readouterr().out
  assert main.main([*command, "--fresh"]) == 2
  assert "need a folder of this machine" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["stores"]
