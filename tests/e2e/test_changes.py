"""Runs that are extended, begun again, and begun from others."""

import json
import shutil

import pytest

from jaxalign import main
from jaxalign.runtime import checkpoint

NOT_COMPARED = ("time/", "throughput/", "memory/")


@pytest.fixture(scope="module")
def sft(lab, supervised):
  """(workdir, changed fields) -> the command line of a small SFT run."""

  def command(workdir, **changes):
    fields = {
      "policy": lab.policy,
      "data": lab.rows,
      "steps": 2,
      "batch_size": 2,
      "packing": "true",
      "optimizer__schedule": "constant",
    }
    return supervised("sft.py", workdir, **(fields | changes))

  return command


@pytest.fixture(scope="module")
def short(sft, tmp_path_factory):
  """The folder of a finished run of two steps."""
  folder = tmp_path_factory.mktemp("short") / "run"
  assert main.main(sft(folder)) == 0
  return folder


def weights(folder, name="model"):
  return (folder / name / "model.safetensors").read_bytes()


def numbers(folder, read):
  return [
    {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
    for row in read(folder / "metrics.jsonl")
  ]


def test_an_extended_run_is_a_long_one(sft, short, read, tmp_path, capsys):
  """Bit for bit where the rate is constant; else the new rates are said."""
  longer, whole = tmp_path / "longer", tmp_path / "whole"
  shutil.copytree(short, longer)
  assert main.main(sft(longer, steps=3)) == 2
  assert "steps was 2, now 3; give --extend" in capsys.readouterr().err
  assert main.main([*sft(longer, steps=3), "--extend"]) == 0
  assert (
    f"{longer}: extended from 2 to 3 steps, 2 are done; the constant learning "
    "rate was 0.01 at step 2 and is 0.01 at step 3\n"
  ) in capsys.readouterr().out
  assert main.main(sft(whole, steps=3)) == 0
  assert numbers(longer, read) == numbers(whole, read)
  assert weights(longer) == weights(whole)
  capsys.readouterr()
  # Once more: there is nothing left to do.
  assert main.main([*sft(longer, steps=3), "--extend"]) == 0
  assert "raise config.steps or config.epochs" in capsys.readouterr().out
  assert main.main([*sft(longer, steps=1), "--extend"]) == 2
  assert "config.steps must be >= 3" in capsys.readouterr().err


def test_the_rates_of_an_extended_run(sft, tmp_path, capsys, monkeypatch):
  from jaxalign.algorithms.sft import setup
  from jaxalign.runtime import workdir
  from jaxalign.setup.folder import open_workdir

  def begin(spec, folder):
    open_workdir(spec.config, folder).close()
    workdir.mark_finished(folder, {"steps": spec.config.steps})
    return 0

  monkeypatch.setattr(setup, "run", begin)
  # In the place of a checkpoint that a training would have left.
  inside = "jaxalign.runtime.checkpoint."
  monkeypatch.setattr(f"{inside}newest_whole", lambda folder: 2)
  monkeypatch.setattr(f"{inside}read_extra", lambda folder, step: {})
  argv = sft(tmp_path / "run", optimizer__schedule="linear")
  assert main.main(argv) == 0
  assert main.main([*argv, "--config.steps=4", "--extend"]) == 0
  assert (
    "2 are done; the linear learning rate was 0.005 at step 2 and is 0.005 at "
    "step 3, stretched over 4 steps and 0.0025 at the last\n"
  ) in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_not_extended(
  sft, short, tmp_path, capsys
):
  run = tmp_path / "run"
  shutil.copytree(short, run)
  shutil.rmtree(run / "checkpoints")
  before = {p: p.read_bytes() for p in run.glob("*.json*")}
  argv = [w for w in sft(run) if "--config.steps=" not in w]
  assert main.main([*argv, "--config.steps=9", "--extend"]) == 2
  assert "has no checkpoint left to go on" in capsys.readouterr().err
  assert {p: p.read_bytes() for p in run.glob("*.json*")} == before


def test_a_run_begins_again_from_another(sft, short, tmp_path, capsys):
  """From its model, then from its checkpoint with the optimizer's state."""
  argv = [w for w in sft(tmp_path / "run") if "--config.policy=" not in w]
  argv += ["--config.steps=1", f"--init_from={short}"]
  assert main.main(argv) == 0
  run = tmp_path / "run"
  assert weights(run, "start") == weights(short)
  assert json.loads((run / "start.json").read_text())["step"] == 2
  assert f"begins with the weights of {short}" in capsys.readouterr().out

  again = ["--fresh", "--init_optimizer"]
  assert main.main([*argv, *again, "--config.optimizer.name=lion"]) == 2
  err = capsys.readouterr().err
  assert "optimizer.name was adamw, now lion; set these alike" in err
  argv[-1] += "/checkpoints/00000002"
  assert main.main([*argv, *again]) == 0
  assert "the earlier run of" in capsys.readouterr().out
  assert weights(tmp_path / "run.1") != weights(run)
  # Adam has counted on, on the same weights.
  assert weights(run, "start") == weights(short)
  counts = []
  for folder in (short, tmp_path / "run.1", run):
    state, _, _ = checkpoint.load(folder / "checkpoints", "opt_state")
    (adam,) = state.values()
    counts.append(int(adam["count"]))
  assert counts == [2, 1, 3]


def test_the_weights_that_a_run_began_with_stay(sft, short, tmp_path, capsys):
  """Whatever becomes of the other run; they are not silently replaced."""
  other, run = tmp_path / "other", tmp_path / "run"
  shutil.copytree(short, other)
  argv = [w for w in sft(run) if "--config.policy=" not in w]
  argv += [f"--init_from={other}"]
  assert main.main(argv) == 0
  (run / "finished.json").unlink()
  shutil.rmtree(other)
  assert main.main(argv) == 0
  (run / "finished.json").unlink()
  with open(run / "start" / "model.safetensors", "ab") as file:
    file.write(b"x")
  assert main.main(argv) == 2
  assert "is not what the run began with" in capsys.readouterr().err
