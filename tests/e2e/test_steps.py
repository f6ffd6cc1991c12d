"""What a SuperHF run costs after its first steps: nothing is compiled twice."""

import logging

import jax
import pytest

from jaxalign import main
from jaxalign.algorithms.superhf import train as algorithm
from jaxalign.training.recorder import Recorder


@pytest.fixture
def traced(monkeypatch):
  """Shapes of the updates that were traced."""
  shapes = []
  make_update = algorithm.make_update

  def counting(*args):
    update = make_update(*args)

    def traced_update(state, frozen, reference, batch, key):
      shapes.append(batch.text.tokens.shape)
      return update(state, frozen, reference, batch, key)

    return traced_update

  monkeypatch.setattr(algorithm, "make_update", counting)
  return shapes


@pytest.fixture
def compiled(monkeypatch):
  """How many programs had been compiled when each step was reported."""
  names, counts = [], []
  report = Recorder.report

  class Listener(logging.Handler):
    def emit(self, record):
      if record.getMessage().startswith("Compiling "):
        names.append(record.getMessage())

  def counting(self, step, metrics, rows=()):
    report(self, step, metrics, rows)
    counts.append(len(names))

  monkeypatch.setattr(Recorder, "report", counting)
  listener = Listener()
  logger = logging.getLogger("jax._src.interpreters.pxla")
  logger.addHandler(listener)
  logger.propagate = False
  with jax.log_compiles(True):
    yield counts
  logger.propagate = True
  logger.removeHandler(listener)


def test_compiled_once(superhf, tmp_path, traced, compiled):
  """Temperature, rate and texts change; shapes do not, so no more programs."""
  command = superhf(
    tmp_path / "run", steps=5, checkpoint__every_steps=0, max_length=32
  )
  assert main.main(command) == 0
  assert len(traced) == len(set(traced)) == 1
  assert compiled[0] > 0
  assert compiled[-1] == compiled[1], compiled


def test_compiled_once_however_many_are_kept(
  superhf, tmp_path, read, traced, compiled
):
  """Eight, six, four, two, two texts are kept: four updates to one, a shape."""
  command = superhf(
    tmp_path / "run",
    steps=5,
    checkpoint__every_steps=0,
    max_length=32,
    superbatch__percentile="0,1",
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  assert [row["num_kept"] for row in rows] == [8, 6, 4, 2, 2]
  assert len(traced) == 1
  assert compiled[-1] == compiled[1], compiled


def test_no_hidden_transfers(guarded, superhf, tmp_path):
  """Of SuperHF; test_references has the runs on comparisons."""
  with guarded():
    assert main.main(superhf(tmp_path / "run", steps=2)) == 0
