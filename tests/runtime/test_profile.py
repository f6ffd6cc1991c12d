"""Step ranges, stages, peak memory, and a trace that is really written."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms import read_config
from jaxalign.errors import UserError
from jaxalign.runtime import profile


@pytest.fixture
def calls(monkeypatch):
  """The starts (their folder) and stops of traces, instead of traces."""
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  return calls


@pytest.mark.parametrize(
  ("text", "steps"),
  [("10:13", [10, 11, 12]), ("0:1", [0]), ("7:8", [7]), ("", [])],
)
def test_step_ranges(tmp_path, calls, text, steps):
  profiler = profile.Profiler(tmp_path, text)
  for step in range(20):
    with profiler.step(step):
      calls.append(step)
  if steps:
    assert calls[steps[0]] == tmp_path
    calls.remove(tmp_path)
    assert calls[steps[-1] + 1] == "stop"
    calls.remove("stop")
  assert calls == list(range(20))


@pytest.mark.parametrize(
  "text", ["a", "7", "3:", ":3", "3:3", "5:2", "-1:2", "1.5"]
)
def test_bad_step_ranges_name_field_and_value(text):
  with pytest.raises(
    UserError, match=rf"config\.profile_steps .*, got '{text}'"
  ):
    read_config({"algorithm": "sft", "profile_steps": text})


def test_stages_add_up():
  seconds = {}
  for _ in range(2):
    with profile.stage("sample", seconds):
      time.sleep(0.02)
  with profile.stage("score", seconds):
    pass
  assert seconds.keys() == {"time/sample_s", "time/score_s"}
  assert 0.04 <= seconds["time/sample_s"] < 1
  assert seconds["time/score_s"] < 0.1


def test_peak_memory_sees_an_allocation():
  before = profile.memory()["memory/peak_bytes"]
  ballast = np.ones(1 << 26, np.uint8)
  after = profile.memory()["memory/peak_bytes"]
  assert after >= before
  assert after > ballast.nbytes
  assert isinstance(before, int)


def test_only_the_given_steps_are_traced(tmp_path, calls):
  profiler = profile.Profiler(tmp_path, "1:3")
  for step in range(5):
    with profiler.step(step):
      calls.append(step)
  profiler.close()
  assert calls == [0, tmp_path, 1, 2, "stop", 3, 4]


def test_a_failing_step_still_leaves_its_trace(tmp_path, calls):
  profiler = profile.Profiler(tmp_path, "0:9")
  with pytest.raises(KeyError), profiler.step(0):
    raise KeyError
  assert calls == [tmp_path, "stop"]


def test_a_resume_inside_the_range_traces_the_rest(tmp_path, calls):
  profiler = profile.Profiler(tmp_path, "1:4")
  for step in (2, 3, 4):
    with profiler.step(step):
      calls.append(step)
  assert calls == [tmp_path, 2, 3, "stop", 4]


def test_a_trace_holds_the_stages(tmp_path):
  profiler = profile.Profiler(tmp_path, "0:1")
  with profiler.step(0), profile.stage("an_own_stage", {}):
    jax.block_until_ready(jnp.ones(8) + 1)
  (trace,) = tmp_path.rglob("*.xplane.pb")
  assert b"an_own_stage" in trace.read_bytes()
