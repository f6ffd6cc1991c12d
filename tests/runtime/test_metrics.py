"""The logs: what a line looks like, and that a resume leaves no trace."""

import errno
import json
import logging
import math
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxalign.errors import UserError
from jaxalign.runtime import files, metrics
from jaxalign.runtime.metrics import MetricsLog, read_jsonl


def rows(step):
  return [
    {
      "step": step,
      "prompt": "Frage: „ü“?\n",
      "completion": "\ud800 cut surrogate",
      "score": np.float32(step / 3),
      "test_score": None,
      "kept": np.bool_(step % 2),
    }
  ]


def drive(folder, first, last, offsets=None):
  """Steps first..last; returns the offsets after each."""
  log = MetricsLog(folder, offsets=offsets, step=first - 1)
  after = {}
  for step in range(first, last + 1):
    log.write(step, {"score/mean": math.sin(step), "b": step, "a": 0.1})
    log.write_samples(rows(step))
    after[step] = log.offsets()
  log.close()
  return after


def contents(folder):
  return [(folder / n).read_bytes() for n in ("metrics.jsonl", "samples.jsonl")]


def test_a_line_is_step_then_sorted_names(tmp_path):
  drive(tmp_path, 1, 1)
  line = (tmp_path / "metrics.jsonl").read_text()
  assert line == (
    f'{{"step": 1, "a": 0.1, "b": 1, "score/mean": {math.sin(1)!r}}}\n'
  )


def test_numbers_come_back_as_they_were(tmp_path):
  log = MetricsLog(tmp_path)
  third = np.float32(1 / 3)
  log.write(1, {"f": third, "i": np.int64(2**40), "z": np.zeros(())})
  log.write(2, {"a": math.nan, "b": math.inf, "c": -math.inf})
  log.close()
  first, second = read_jsonl(tmp_path / "metrics.jsonl")
  assert np.float32(first["f"]) == third
  assert first["i"] == 2**40
  assert isinstance(first["i"], int)
  assert second == {"step": 2, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  assert math.isnan(float(second["a"]))
  assert float(second["c"]) == -math.inf


def test_samples_keep_their_text(tmp_path):
  drive(tmp_path, 1, 1)
  (row,) = read_jsonl(tmp_path / "samples.jsonl")
  assert row["prompt"] == "Frage: „ü“?\n"
  assert row["completion"] == "\ud800 cut surrogate"
  assert row["test_score"] is None
  assert row["kept"] is True


def test_a_resume_leaves_the_files_of_an_uninterrupted_run(tmp_path):
  """Saved after 3, killed at 5 inside a line, started again, run to 8."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  whole.mkdir()
  cut.mkdir()
  drive(whole, 1, 8)
  saved = drive(cut, 1, 5)[3]
  with open(cut / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "a"')
  drive(cut, 4, 8, offsets=json.loads(json.dumps(saved)))
  assert contents(cut) == contents(whole)


def test_a_new_start_empties_the_files(tmp_path):
  drive(tmp_path, 1, 3)
  drive(tmp_path, 1, 1)
  assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_a_file_shorter_than_the_checkpoint_says_is_a_warning(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    drive(tmp_path, 4, 4, offsets={"metrics.jsonl": 100, "samples.jsonl": 0})
  assert "has 0 bytes, the checkpoint says 100" in caplog.text
  assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_a_cut_last_line_is_not_read(tmp_path):
  (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st')
  assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
  assert read_jsonl(tmp_path / "none.jsonl") == []


class FullAfter:
  """A raw file that takes `room` more bytes, then has no space."""

  def __init__(self, file, room):
    self._file, self._room = file, room

  def write(self, data):
    if not self._room:
      raise OSError(errno.ENOSPC, "No space left on device")
    taken = data[: self._room]
    self._room -= len(taken)
    return self._file.write(taken)

  def __getattr__(self, name):
    return getattr(self._file, name)


def test_full_disk_leaves_whole_lines(tmp_path):
  growing = files.Growing(tmp_path / "m.jsonl")
  growing.append(b'{"step": 1}\n')
  growing._file = FullAfter(growing._file, 5)
  with pytest.raises(UserError, match=r"m\.jsonl: the disk .* full"):
    growing.append(b'{"step": 2}\n')
  growing.close()
  assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 1}\n'


def test_write_atomic_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch):
  def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  place = tmp_path / "config.json"
  files.write_atomic(place, "old")
  monkeypatch.setattr(files.os, "fsync", no_space)
  with pytest.raises(UserError, match="full"):
    files.write_atomic(place, "new")
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
  assert place.read_text() == "old"


def test_disk_full_is_recognised_through_causes():
  inner = ValueError("write: No space left on device [os_error_code='28']")
  outer = RuntimeError("saving failed")
  assert not files.is_disk_full(outer)
  outer.__cause__ = inner
  assert files.is_disk_full(outer)
  assert files.is_disk_full(OSError(errno.EDQUOT, "quota"))
  assert not files.is_disk_full(OSError(errno.EACCES, "no"))
  assert not files.is_disk_full(ValueError("RESOURCE_EXHAUSTED: Out of memory"))


def test_tensorboard_hides_what_a_resume_repeats(tmp_path):
  """The new event file begins with a START at the first step to be redone."""
  drive(tmp_path, 1, 3)
  drive(tmp_path, 3, 4, offsets={})
  first, second = sorted((tmp_path / "tensorboard").iterdir())
  events = [_steps(p.read_bytes()) for p in (first, second)]
  assert events == [[0, 1, 2, 3], [0, 3, 3, 4]]


def _steps(data):
  """Steps of the events in a TFRecord file."""
  steps = []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    body, data = data[12 : 12 + length], data[16 + length :]
    steps.append(event_pb2.Event.FromString(body).step)
  return steps


def test_an_uninstalled_tracker_is_an_error(monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install wandb, or set"):
    metrics.check_tracker("wandb")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_step_and_one_name(tmp_path, monkeypatch, name):
  calls = []
  fake = types.SimpleNamespace(
    init=lambda **options: calls.append(options),
    log=lambda values, step: calls.append((step, values)),
    finish=lambda: calls.append("finish"),
  )
  monkeypatch.setitem(sys.modules, name, fake)
  for _ in range(2):
    log = MetricsLog(tmp_path, trackers={name: "superhf"}, config={"seed": 0})
    log.write(1, {"b": 2, "a": 1})
    log.close()
  first, logged, finish, second, *_ = calls
  assert first["project"] == "superhf"
  assert first["config"] == {"seed": 0}
  assert first["resume"] == "allow"
  assert (logged, finish) == ((1, {"a": 1, "b": 2}), "finish")
  assert second == first
