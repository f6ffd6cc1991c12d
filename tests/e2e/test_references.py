"""Runs whose reference was run once and stored, against those that keep it."""

import shutil

import jax
import pytest

from jaxalign import main
from jaxalign.training import reference_cache
from jaxalign.training.recorder import Recorder

NOT_COMPARED = ("time/", "throughput/", "memory/")
CONFIGS = pytest.mark.parametrize("config", ["dpo.py", "kto.py"])


@pytest.fixture(scope="module")
def command(supervised, lab):
  """(config file, workdir, changed fields) -> a short run's command line."""

  def command(config, workdir, **changes):
    fields = {
      "steps": 4,
      "policy": lab.policy,
      "data": lab.pairs,
      "validation_data": lab.pairs,
      "validation_rows": 6,
      "validation_interval": 2,
      "batch_size": 8,
      "micro_batch": 4,
      "beta": 0.5,
      "metrics__tensorboard": "false",
    }
    return supervised(config, workdir, **(fields | changes))

  return command


def values(folder, read):
  """What a run measured, clocks left out."""
  return [
    {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
    for row in read(folder / "metrics.jsonl")
  ]


def weights(folder):
  return (folder / "model" / "model.safetensors").read_bytes()


def forbid(monkeypatch):
  """From here on, whoever runs a reference over all texts fails."""

  def refuse(*args):
    raise AssertionError("the reference was run")

  monkeypatch.setattr(reference_cache, "precompute", refuse)


@pytest.fixture
def alive(monkeypatch):
  """Bytes on the device after each step."""
  found = []
  save = Recorder.save

  def watched(self, step, state):
    found.append(sum(x.nbytes for x in jax.live_arrays()))
    save(self, step, state)

  monkeypatch.setattr(Recorder, "save", watched)
  return found


@CONFIGS
def test_a_stored_reference_changes_nothing_but_memory(
  config, command, tmp_path, read, alive
):
  assert main.main(command(config, tmp_path / "live")) == 0
  kept = alive[-1]
  again = command(config, tmp_path / "stored", reference="stored")
  assert main.main(again) == 0
  wanted, found = (values(tmp_path / name, read) for name in ("live", "stored"))
  assert len(wanted) == len(found) == 4
  for a, b in zip(wanted, found, strict=True):
    assert b == pytest.approx(a, abs=1e-5, rel=1e-5, nan_ok=True)
  size = len(weights(tmp_path / "live"))
  assert kept - alive[-1] > 0.9 * size  # the frozen copy
  assert (tmp_path / "stored" / "reference.npz").is_file()
  assert not (tmp_path / "live" / "reference.npz").exists()


def test_under_adapters_the_base_is_what_is_stored(command, tmp_path, read):
  same = {"lora__rank": 2, "lora__targets": "query_key_value,dense"}
  live = command("dpo.py", tmp_path / "live", **same)
  kept = command("dpo.py", tmp_path / "stored", reference="stored", **same)
  assert main.main(live) == main.main(kept) == 0
  wanted, found = (values(tmp_path / name, read) for name in ("live", "stored"))
  for a, b in zip(wanted, found, strict=True):
    assert b == pytest.approx(a, abs=1e-5, rel=1e-5)
  assert wanted[-1]["rewards/margins"] > 1e-3


@CONFIGS
def test_a_later_start_reads_the_file_and_ends_bit_for_bit(
  config, command, tmp_path, read, monkeypatch
):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  fields = {"reference": "stored", "checkpoint__every_steps": 1}
  assert main.main(command(config, whole, **fields)) == 0
  # As if it had been killed after step 2: what came later is taken back.
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  for step in (3, 4):
    shutil.rmtree(cut / "checkpoints" / f"{step:08}", ignore_errors=True)
  forbid(monkeypatch)
  assert main.main(command(config, cut, **fields)) == 0
  assert values(cut, read) == values(whole, read)
  assert weights(cut) == weights(whole)


@CONFIGS
def test_another_run_takes_the_file_over(
  config, command, tmp_path, read, monkeypatch
):
  assert main.main(command(config, tmp_path / "first", reference="stored")) == 0
  place = tmp_path / "first" / "reference.npz"
  fields = {"reference": "stored", "beta": 0.1, "optimizer__learning_rate": 0.1}
  own = command(config, tmp_path / "own", **fields)
  theirs = command(config, tmp_path / "theirs", reference_logps=place, **fields)
  assert main.main(own) == 0
  forbid(monkeypatch)
  assert main.main(theirs) == 0
  assert values(tmp_path / "own", read) == values(tmp_path / "theirs", read)
  assert not (tmp_path / "theirs" / "reference.npz").exists()
