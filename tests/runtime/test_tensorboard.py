"""Event files, read back record by record."""

import errno
import math
import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxalign.errors import UserError
from jaxalign.runtime.tensorboard import EventFile


def read_events(path):
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    (checksum,) = struct.unpack("<I", data[12 + size : 16 + size])
    assert checksum == masked_crc32c(data[12 : 12 + size])
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events


def test_a_reader_finds_what_was_written(tmp_path):
  log = EventFile(tmp_path)
  log.write(1, {"score/mean": -1.5, "n": 300, "big": 1e300, "low": -1e300})
  log.write(2**40, {"score/mean": math.nan, "größe": 0.25})
  log.close()
  (path,) = tmp_path.iterdir()
  head, first, second = read_events(path)
  assert head.file_version == "brain.Event:2"
  assert abs(second.wall_time - head.wall_time) < 60
  assert (first.step, second.step) == (1, 2**40)
  found = {v.tag: v.simple_value for v in first.summary.value}
  expected = {"score/mean": -1.5, "n": 300.0}
  assert found == expected | {"big": math.inf, "low": -math.inf}
  nan, quarter = second.summary.value
  assert math.isnan(nan.simple_value)
  assert (quarter.tag, quarter.simple_value) == ("größe", 0.25)


def test_a_resume_hides_later_steps(tmp_path):
  EventFile(tmp_path, done=40).close()
  _, start = read_events(next(tmp_path.iterdir()))
  assert start.step == 41
  assert start.session_log.status == start.session_log.START


def test_starts_within_a_second_have_a_file_each(tmp_path):
  for step in (1, 2):
    log = EventFile(tmp_path, done=step)
    log.write(step + 1, {"n": 1})
    log.close()
  first, second = sorted(tmp_path.iterdir())
  assert [e.step for e in read_events(first)] == [0, 2, 2]
  assert [e.step for e in read_events(second)] == [0, 3, 3]


def test_a_flush_shows_every_step(tmp_path):
  """A checkpoint flushes, so no step before it is missing after a kill."""
  log = EventFile(tmp_path)
  for step in (1, 2, 3):
    log.write(step, {"n": step})
  log.flush()
  (path,) = tmp_path.iterdir()
  assert [e.step for e in read_events(path)] == [0, 1, 2, 3]
  log.close()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
  log = EventFile(tmp_path)

  def full():
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(log._writer, "flush", full)
    with pytest.raises(UserError, match="No space left on device; free some"):
      log.flush()
  log.close()
