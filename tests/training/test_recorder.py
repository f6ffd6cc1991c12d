"""When a step's numbers are read, what a save covers, when checks are due."""

import dataclasses
import pathlib
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import TrainState
from jaxalign.runtime.checkpoint import Checkpointer
from jaxalign.runtime.console import Console
from jaxalign.runtime.metrics import MetricsLog
from jaxalign.runtime.profile import Profiler
from jaxalign.runtime.signals import Stop
from jaxalign.training.recorder import Recorder, due, throughput


class Calls(list):
  """What was called, in order, with its arguments."""

  def __init__(self):
    self.scores = []
    self.lines = []


class Log(MetricsLog):
  """Files nothing."""

  def __init__(self, calls):
    self.calls = calls

  def write(self, step, values):
    self.calls.lines.append({"step": step, **values})
    self.calls.append(("write", step, values["n"]))

  def write_samples(self, rows):
    self.calls.extend(("row", row) for row in rows)

  def offsets(self):
    return {"metrics.jsonl": len(self.calls)}


class Screen(Console):
  """Shows nothing."""

  def __init__(self, calls):
    self.calls = calls

  def update(self, step, values, rows):
    self.calls.append(("show", step))


class Saver(Checkpointer):
  """Is due at given steps."""

  def __init__(self, calls, saves):
    self.calls, self.saves = calls, saves

  def check(self):
    self.calls.append(("check",))

  def due(self, step):
    return step in self.saves

  def save(self, step, state, extra, *, score=None):
    self.calls.scores.append(score)
    counters = dict(extra["counters"])
    files = extra["files"]
    self.calls.append(("save", step, int(state.step), files, counters))


def record(
  steps,
  done=0,
  saves=(),
  stop_after=None,
  every=1,
  more=(),
  best_metric="n",
  past=(),
  rewards=None,
  asked_after_save=None,
  abandoned=None,
):
  """Drives a recorder through its steps; returns what it called."""
  calls, stop = Calls(), Stop()
  recorder = Recorder(
    log=Log(calls),
    console=Screen(calls),
    saver=Saver(calls, saves),
    stop=stop,
    profiler=Profiler(pathlib.Path("profile")),
    done=done,
    total=steps,
    counters={"exceptions": 1},
    every=every,
    best_metric=best_metric,
    past=past,
  )
  for step in recorder.steps():
    calls.append(("step", step))
    state = TrainState({}, None, jnp.int32(step), jnp.int32(0))
    if step == abandoned:
      recorder.abandon(step, state)
      continue
    if step == stop_after:
      stop.signal = signal.SIGTERM
    extra = {"eval_score/mean": 0.0} if step in more else {}
    extra |= rewards(step) if rewards else {}
    recorder.report(step, {"n": np.float32(step)} | extra, [{"of": step}])
    recorder.save(step, dataclasses.replace(state, step=state.step + 1))
    if step == asked_after_save:
      stop.signal = signal.SIGTERM
  return calls


def test_a_step_is_read_when_the_next_one_is_out():
  calls = record(2)
  order = [c for c in calls if c[0] in ("step", "write")]
  assert order == [
    ("step", 0),
    ("step", 1),
    ("write", 1, 0.0),
    ("write", 2, 1.0),
  ]


def test_a_save_covers_exactly_the_steps_it_has_seen():
  """Its own step is written before the files' lengths are taken."""
  calls = record(4, saves=(2,))
  at = next(i for i, c in enumerate(calls) if c[0] == "save")
  assert calls[at] == (
    *("save", 2, 2),
    *({"metrics.jsonl": at}, {"exceptions": 1}),
  )
  assert [c[1] for c in calls[:at] if c[0] == "write"] == [1, 2]
  assert ("row", {"of": 1}) in calls[:at]


def test_thinned_lines_keep_the_last_step_and_every_evaluation():
  calls = record(7, every=3, more=(3,))
  assert [c[1] for c in calls if c[0] == "write"] == [3, 4, 6, 7]
  assert len([c for c in calls if c[0] == "row"]) == 7


def test_the_last_step_is_saved():
  assert [c[1] for c in record(3, done=1) if c[0] == "save"] == [3]


def test_a_request_to_stop_ends_the_run_with_a_save():
  calls = record(9, stop_after=1)
  assert [c[1] for c in calls if c[0] == "step"] == [0, 1]
  assert [c[1] for c in calls if c[0] == "save"] == [2]


def test_a_request_that_comes_after_the_save_is_the_next_steps():
  """No run ends with a step that is in no checkpoint."""
  calls = record(9, asked_after_save=1)
  assert [c[1] for c in calls if c[0] == "step"] == [0, 1, 2]
  assert [c[1] for c in calls if c[0] == "save"] == [3]


def test_a_step_that_is_abandoned_leaves_the_one_before_saved():
  """With its line; once, where it was saved already."""
  calls = record(9, done=3, abandoned=5)
  assert [c[:2] for c in calls if c[0] in ("write", "save")] == [
    ("write", 4),
    ("write", 5),
    ("save", 5),
  ]
  for abandoned, saves in ((5, (5,)), (3, ())):
    calls = record(9, done=3, abandoned=abandoned, saves=saves)
    assert [c[1] for c in calls if c[0] == "save"] == list(saves)


@pytest.mark.parametrize(
  ("interval", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4])]
)
def test_due(interval, expected):
  assert [s for s in range(5) if due(s, interval, 5)] == expected


def test_throughput_is_of_what_was_counted():
  values = {
    "num_tokens": 300,
    "num_sampled_tokens": 100,
    "time/step_s": 2.0,
    "time/sample_s": 0.5,
  }
  assert throughput(values) == {
    "throughput/tokens_per_s": 150.0,
    "throughput/sampled_tokens_per_s": 200.0,
  }
  assert throughput({"num_tokens": 3, "time/step_s": 0.0}) == {}


def test_a_save_is_judged_by_its_own_step():
  assert record(6, saves=(2, 4)).scores == [1.0, 3.0, 5.0]


def test_a_misspelt_best_metric_is_said_once(caplog):
  assert (
    record(6, saves=(2, 4), best_metric="times/step_s").scores == [None] * 3
  )
  (said,) = caplog.messages
  assert "keep_best=times/step_s: no step has reported it" in said
  assert "did you mean time/step_s?" in said


def test_a_metric_of_some_steps_is_a_known_one(caplog):
  """Reported at the first step only, absent at the save itself."""
  scores = record(3, more=(0,), best_metric="eval_score/mean").scores
  assert scores == [None]
  assert not caplog.messages


def parting(step):
  """The held-out reward turns at step 20 of 40."""
  return {
    "score/mean": np.float32(step / 10),
    "test_score/mean": np.float32(-abs(step - 20) / 10),
  }


def lines(calls):
  """What a log would hold, seconds and memory left out."""
  clock = ("time/", "memory/")
  return [
    {k: v for k, v in line.items() if not k.startswith(clock)}
    for line in calls.lines
  ]


def test_a_line_has_the_gap_and_the_recent_mean():
  """Train rises by 0.5 a step, held-out by 0.25 from 1 on."""

  def rewards(step):
    return {"score/mean": step / 2, "test_score/mean": 1 + step / 4}

  calls = record(3, rewards=rewards)
  found = [line["score/gap"] for line in calls.lines]
  assert found == [0, 0.25, 0.5]
  recent = [line["test_score/recent"] for line in calls.lines]
  assert recent == [1, 1.125, 1.25]
  plain = record(3, rewards=lambda step: {"score/mean": 1.0})
  assert not any("score/gap" in line for line in plain.lines)


def test_the_turn_is_said_once(caplog):
  record(40, rewards=parting)
  (said,) = caplog.messages
  assert said.startswith("step ")
  assert "The held-out reward turned near step 2" in said


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_writes_the_same_lines_and_warns_again(every, caplog):
  """What it knows of the past is what the lines say, thinned or not."""
  whole = lines(record(90, rewards=parting, every=every, saves=(70,)))
  first = [line for line in whole if line["step"] <= 70]
  caplog.clear()
  rest = record(90, done=70, rewards=parting, every=every, past=first)
  assert lines(rest) == [line for line in whole if line["step"] > 70]
  (said,) = caplog.messages
  assert "turned near step 2" in said


def test_the_best_by_held_out_is_a_mean_of_five():
  """-2 at first; after 23 steps -0.2, -0.1, 0, -0.1, -0.2, mean -0.12."""
  calls = record(
    30, saves=(1, 23), rewards=parting, best_metric="test_score/recent"
  )
  assert calls.scores[:2] == pytest.approx([-2, -0.12])
