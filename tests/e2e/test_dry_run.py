"""--dry_run: everything is opened and checked, nothing is read or written."""

import re

import pytest

from jaxalign import main
from jaxalign.models.hf import place


@pytest.fixture
def dry(monkeypatch, tmp_path, capfd):
  """A command line -> what its dry run prints."""

  def refuse(*args):
    raise AssertionError("parameters were read")

  monkeypatch.setattr(place, "place", refuse)

  def dry(argv):
    before = sorted(tmp_path.rglob("*"))
    assert main.main([*argv, "--dry_run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out, err = capfd.readouterr()
    assert not err
    return re.sub(" {2,}", ": ", out)

  return dry


def test_a_run_that_samples(dry, superhf, tmp_path, lab):
  out = dry(superhf(tmp_path / "run", steps=7))
  assert "run: superhf, 7 steps\n" in out
  assert f"folder: {tmp_path / 'run'} (new)\n" in out
  assert f"policy: {lab.policy}, " in out
  assert f"reward_model: {lab.reward}, " in out
  assert "prompts: 24 of at most " in out
  assert "update: one pass of 2 texts of at most 64 tokens\n" in out
  assert "devices: 1 x cpu (replica 1, fsdp 1, sequence 1, tensor 1)\n" in out


def test_what_is_there_is_said(dry, supervised, tmp_path, lab, capfd):
  run = tmp_path / "run"
  argv = supervised("sft.py", run, policy=lab.policy, data=lab.rows, steps=9)
  (run / "checkpoints" / "00000004").mkdir(parents=True)
  assert main.main([*argv, "--print_config"]) == 0
  (run / "config.json").write_text(capfd.readouterr().out)
  assert f"folder: {run} (goes on after step 4)\n" in dry(argv)
  (run / "finished.json").write_text("{}")
  assert "(finished; nothing would be done)\n" in dry(argv)
  assert "(new; the run that is there would be moved aside)\n" in dry(
    [*argv, "--fresh"]
  )
  # What would refuse the run refuses its dry run.
  for flags, hint in (
    (["--extend", "--fresh"], "give one of them"),
    (["--extend", "--config.steps=8"], "config.steps must be >= 9"),
    (["--extend", "--config.steps=10"], "has no checkpoint left"),
  ):
    assert main.main([*argv, *flags, "--dry_run"]) == 2
    assert hint in capfd.readouterr().err


def test_a_score_head_and_adapters_by_default(
  dry, supervised, tmp_path, lab, capfd
):
  """On a language model, with a rank and nothing else."""
  argv = supervised(
    "reward_model.py",
    tmp_path / "run",
    policy=lab.policy,
    data=lab.pairs,
    lora__rank=2,
  )
  out = dry(argv)
  # One text: only DeBERTa has segments.
  assert "\\n\\nAssistant: " in out
  assert main.main([*argv, "--config.encoding=pair"]) == 2
  assert "give auto or concat" in capfd.readouterr().err
  assert f"{lab.policy} is a language model: it gets a new score head" in out
  # Two layers of 16: A [16, 2] and B [2, 48] each, and the head's 16.
  assert "LoRA on query_key_value: 272 of " in out


def test_a_run_that_would_learn_little_says_so(dry, supervised, tmp_path, lab):
  fields = {"policy": lab.policy, "data": lab.rows, "steps": 3}
  argv = supervised("sft.py", tmp_path / "run", **fields, batch_size=64)
  out = dry([*argv, "--config.optimizer.warmup_steps=3"])
  assert "note: all 3 steps are in optimizer.warmup_steps=3, " in out
  assert " rows for an update of batch_size=64, which takes them more " in out
  argv = supervised("sft.py", tmp_path / "run", **fields, batch_size=1)
  assert "note:" not in dry([*argv, "--config.optimizer.warmup_steps=2"])


def test_a_data_file_that_is_not_there(supervised, tmp_path, capfd):
  (tmp_path / "train.jsonl").touch()
  for name, hint in (
    ("trian.jsonl", f"did you mean {tmp_path / 'train.jsonl'}?"),
    ("*.csv", "check the path"),
    ("train.jsonl,none.csv", "check the path"),
  ):
    path = tmp_path / name
    argv = supervised("sft.py", tmp_path / "run", data=path)
    assert main.main(argv) == 2
    err = capfd.readouterr().err
    missing = f"{tmp_path / name}".rpartition(",")[2]
    assert err == f"error: config.data: {missing}: no such file; {hint}\n"
