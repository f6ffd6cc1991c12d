"""Runs whose reference was run once and stored, against those that keep it."""

import gc
import shutil

import jax
import pytest

from jaxalign import main
from jaxalign.training import reference_cache
from jaxalign.training.recorder import Recorder

NOT_COMPARED = ("time/", "throughput/", "memory/")


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


@pytest.fixture(scope="module")
def run(guarded):
  """Runs a command; the least bytes that it has on the device after a step.

  Saves, where there are any, hold more for a while. No transfer is hidden in
  the steps.
  """

  def alive():
    return sum(x.nbytes for x in jax.live_arrays())

  def run(argv):
    save, found = Recorder.save, []

    def watched(self, step, state):
      found.append(alive())
      save(self, step, state)

    gc.collect()
    before = alive()
    with guarded(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(Recorder, "save", watched)
      assert main.main(argv) == 0
    return min(found) - before

  return run


@pytest.fixture(scope="module", params=["dpo.py", "kto.py"])
def stored(request, command, run, tmp_path_factory):
  """(config file, folder, bytes on the device) of a run that stores."""
  folder = tmp_path_factory.mktemp("stored") / "run"
  fields = {"reference": "stored", "checkpoint__every_steps": 1}
  return request.param, folder, run(command(request.param, folder, **fields))


def test_a_stored_reference_changes_nothing_but_memory(
  stored, command, run, tmp_path, read
):
  config, folder, size = stored
  live = tmp_path / "live"
  copy = run(command(config, live)) - size
  wanted, found = values(live, read), values(folder, read)
  assert len(wanted) == len(found) == 4
  for a, b in zip(wanted, found, strict=True):
    assert b == pytest.approx(a, abs=1e-5, rel=1e-5, nan_ok=True)
  assert copy > 0.9 * len(weights(live))  # that of the frozen policy
  assert (folder / "reference.npz").is_file()
  assert not (live / "reference.npz").exists()


def test_under_adapters_the_base_is_what_is_stored(command, tmp_path, read):
  same = {"lora__rank": 2, "lora__targets": "query_key_value,dense"}
  live = command("dpo.py", tmp_path / "live", **same)
  kept = command("dpo.py", tmp_path / "stored", reference="stored", **same)
  assert main.main(live) == main.main(kept) == 0
  wanted, found = (values(tmp_path / name, read) for name in ("live", "stored"))
  for a, b in zip(wanted, found, strict=True):
    assert b == pytest.approx(a, abs=1e-5, rel=1e-5)
  assert wanted[-1]["rewards/margins"] > 1e-3


@pytest.mark.parametrize("stored", ["kto.py"], indirect=True)
def test_a_later_start_reads_the_file_and_ends_bit_for_bit(
  stored, command, tmp_path, read, monkeypatch
):
  config, whole, _ = stored
  cut = tmp_path / "cut"
  # As if it had been killed after step 2: what came later is taken back.
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  for step in (3, 4):
    shutil.rmtree(cut / "checkpoints" / f"{step:08}", ignore_errors=True)
  forbid(monkeypatch)
  fields = {"reference": "stored", "checkpoint__every_steps": 1}
  assert main.main(command(config, cut, **fields)) == 0
  assert values(cut, read) == values(whole, read)
  assert weights(cut) == weights(whole)


@pytest.mark.parametrize("stored", ["dpo.py"], indirect=True)
def test_another_run_takes_the_file_over(
  stored, command, tmp_path, read, monkeypatch
):
  config, first, _ = stored
  fields = {"reference": "stored", "beta": 0.1, "optimizer__learning_rate": 0.1}
  own = command(config, tmp_path / "own", **fields)
  place = first / "reference.npz"
  theirs = command(config, tmp_path / "theirs", reference_logps=place, **fields)
  assert main.main(own) == 0
  forbid(monkeypatch)
  assert main.main(theirs) == 0
  assert values(tmp_path / "own", read) == values(tmp_path / "theirs", read)
  assert not (tmp_path / "theirs" / "reference.npz").exists()
