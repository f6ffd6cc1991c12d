"""Steps, stages, logs and saves of one run."""

import contextlib
import dataclasses
import difflib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax

from jaxalign.core.types import Metrics, TrainState
from jaxalign.parallel import hosts
from jaxalign.report import overoptimization
from jaxalign.runtime import metrics, profile
from jaxalign.runtime.checkpoint import Checkpointer
from jaxalign.runtime.console import Console
from jaxalign.runtime.signals import Stop

Rows = Sequence[metrics.LogRow]  # lines of samples.jsonl

# What a step counts, the seconds it took, and the name of the rate.
RATES = (
  ("num_tokens", "time/step_s", "throughput/tokens_per_s"),
  ("num_prompts", "time/step_s", "throughput/prompts_per_s"),
  ("num_sampled_tokens", "time/sample_s", "throughput/sampled_tokens_per_s"),
)

_log = logging.getLogger(__name__)


def due(step: int, interval: int, steps: int) -> bool:
  """Whether something is due after `step`, counted from 0.

  Args:
    step: the step that was just done.
    interval: every so many steps, and after the last; 0 = never.
    steps: of the whole run.
  """
  done = step + 1
  return interval > 0 and (done % interval == 0 or done == steps)


def share_due(interval: int, steps: int) -> float:
  """The share of a run's steps after which something is due; see `due`."""
  times = -(-steps // interval) if interval else 0  # rounded up
  return times / max(steps, 1)


@dataclasses.dataclass
class Recorder:
  """Counts a run's steps, writes what they measure, saves its state.

  A step's metrics are read from the device only when the next step has been
  dispatched, or when a save needs them on disk: the saved file positions
  cover exactly the steps that the saved state has seen.

  Attributes:
    log: metrics.jsonl, samples.jsonl and trackers.
    console: what a person sees.
    saver: checkpoints.
    stop: whether the run was asked to stop.
    profiler: traces some of the steps.
    done: steps done before this start.
    total: steps of the whole run.
    counters: numbers that survive restarts; saved with the state.
    every: steps between lines of metrics.jsonl.
    best_metric: what `checkpoint.keep_best` goes by; "" = off.
    digest: of the rows that are trained on; saved with the state.
    models: digests of what each start reads again; saved as well.
    past: the lines of metrics.jsonl so far.
  """

  log: metrics.MetricsLog
  console: Console
  saver: Checkpointer
  stop: Stop
  profiler: profile.Profiler
  done: int
  total: int
  counters: dict[str, int]
  every: int = 1
  best_metric: str = ""
  digest: str = ""
  models: Mapping[str, str] = dataclasses.field(default_factory=dict)
  past: dataclasses.InitVar[Iterable[metrics.LogRow]] = ()

  def __post_init__(self, past: Iterable[metrics.LogRow]):
    self._validations = overoptimization.validations(past)
    self._warned_of_turn = False
    self._best_known = False
    self._stopped = False
    # Steps of the newest checkpoint; a restored run begins with that many.
    self.saved: int = self.done
    self._seconds: dict[str, float] = {}
    self._last = time.perf_counter()
    self._pending: tuple[int, Metrics, Rows] | None = None

  def steps(self) -> Iterator[int]:
    """The steps still to do, up to the end or to a request to stop."""
    self._last = time.perf_counter()
    for step in range(self.done, self.total):
      self._seconds = {}
      with self.profiler.step(step):
        yield step
      if self._stopped:
        return

  def stage(self, name: str) -> contextlib.AbstractContextManager:
    """Names and times a part of the step."""
    return profile.stage(name, self._seconds)

  def report(self, step: int, values: Metrics, rows: Rows = ()) -> None:
    """Takes a step's metrics; reads them once the next step is dispatched."""
    # The step before: its metrics are read while this one may still run.
    self.flush()
    now = time.perf_counter()
    seconds = self._seconds | {"time/step_s": now - self._last}
    self._last = now
    self._pending = (step, values | seconds | profile.memory(), rows)

  def save(self, step: int, state: TrainState) -> None:
    """Saves the state if that is due, at the end, and before a stop."""
    # A save that failed in the background ends the run here, not at the end.
    self.saver.check()
    # Asked once a step: a request that comes after this is the next step's, so
    # that no run ends with a state that was not saved.
    self._stopped = self.stop.agree()
    last = step + 1 == self.total
    if last or self._stopped or self.saver.due(step + 1):
      self._save(step, state)

  def abandon(self, step: int, state: TrainState) -> None:
    """Ends the run in the middle of a step, for a stop that cannot wait.

    Args:
      step: that is not done; it is repeated by a later start.
      state: after the step before, which is saved.
    """
    self._stopped = True
    # Otherwise that state was saved already, or the run began with it.
    if step > self.saved:
      self._save(step - 1, state)

  def _save(self, step: int, state: TrainState) -> None:
    # The files must hold this step's lines before their lengths are saved.
    values = self.flush()
    if self.best_metric and not self._best_known:
      self._best_known = True  # say it once
      near = difflib.get_close_matches(self.best_metric, values, 1, 0)
      _log.warning(
        "config.checkpoint.keep_best=%s: no step has reported it so far, so no "
        "checkpoint can be the best; did you mean %s? Validation metrics "
        "come every config.validation_interval steps",
        self.best_metric,
        "".join(near),
      )
    extra = {
      "files": self.log.offsets(),
      "counters": self.counters,
      "rows": self.digest,
      "models": dict(self.models),
    }
    score = values.get(self.best_metric)
    self.saver.save(step + 1, state, extra, score=score)
    self.saved = step + 1

  def flush(self) -> Metrics:
    """Writes the step that is pending, if one is; returns its values."""
    if self._pending is None:
      return {}
    step, values, rows = self._pending
    self._pending = None
    # To the host all at once, then rates out of counts and times.
    values = {
      name: value.item() if hasattr(value, "item") else value
      for name, value in jax.device_get(values).items()
    }
    values |= throughput(values)
    # The line of an evaluation is always written.
    evaluated = any(name.startswith("eval_") for name in values)
    written = evaluated or due(step, self.every, self.total)
    values |= self._compare_rewards(step + 1, values, written)
    self._best_known |= self.best_metric in values
    if written:
      self.log.write(step + 1, values)
    # Samples of every step are written, whatever the interval of metrics.
    self.log.write_samples(rows)
    if hosts.is_lead():
      self.console.update(step + 1, values, rows)
    return values

  def _compare_rewards(
    self, step: int, values: Metrics, written: bool
  ) -> Metrics:
    """Train reward next to held-out reward; warns once where they part."""
    now = overoptimization.validations([{"step": step, **values}])
    if not now:
      return {}
    seen = self._validations + now
    if written:  # a resumed run reads only written lines again
      self._validations = seen
      turn = overoptimization.find_turn(seen)
      if turn and not self._warned_of_turn:
        self._warned_of_turn = True
        _log.warning("step %d: %s", step, overoptimization.message(turn))
    return overoptimization.measure(seen)


def throughput(values: Metrics) -> Metrics:
  """Rates per second of what a step's metrics count."""
  return {
    rate: values[count] / values[seconds]
    for count, seconds, rate in RATES
    if count in values and values.get(seconds)
  }
