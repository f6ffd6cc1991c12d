"""What an algorithm is handed, and the loop around its steps.

An algorithm sees a frozen `Context` of values and functions. It never meets
Orbax, flags or a mesh, and a test hands it fakes.
"""

import contextlib
import dataclasses
import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxalign.core import keys
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models.model import Model
from jaxalign.runtime import profile, watch

Rows = Sequence[dict[str, Any]]  # of samples.jsonl

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Context:
  """One run, as its algorithm sees it.

  Attributes:
    config: the validated config of this algorithm.
    model: what is trained, with its adapters if it has any.
    state: where the run stands, new or restored.
    frozen: parameters that are read and never changed: the base under LoRA
      adapters, else empty.
    prior: the reference policy and its parameters, or None.
    key: the run's key; a step uses `fold_in(key, step)`.
    steps: yields the indices of the steps still to do, and ends early when
      the run is asked to stop.
    compile: jits an update `(state, ...) -> (state, metrics)` with the
      state's shardings and donates it.
    put: lays numpy rows out over the mesh: `put(tree, axis)`, rows on axis.
    stage: context manager that names and times a part of a step.
    report: `report(step, metrics, rows)`; metrics may still be on the device.
    save: `save(step, state)` after every step; saves when it is due.
    counters: numbers that live through restarts; saved with the state.
    stopping: whether the run was asked to stop; for what waits within a step.
  """

  config: Any
  model: Model
  state: TrainState
  frozen: Params
  prior: tuple[Model, Params] | None
  key: jax.Array
  steps: Callable[[], Iterator[int]]
  compile: Callable[[Callable], Callable]
  put: Callable[..., Any]
  stage: Callable[[str], contextlib.AbstractContextManager]
  report: Callable[[int, Metrics, Rows], None]
  save: Callable[[int, TrainState], None]
  counters: dict[str, int]
  stopping: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Task:
  """The data of a run that learns from a data set, as functions.

  Attributes:
    batch: step -> numpy rows `[M, B, ...]`, M micro-batches; a pure function.
    validation: batches `[1, B, ...]` that are never trained on.
    texts: gives every text that a step may hold, as `TextBatch`es `[M, B, T]`,
      for a reference that is run once over all of them.
  """

  batch: Callable[[int], Any]
  validation: tuple[Any, ...] = ()
  texts: Callable[[], Iterable[TextBatch]] = tuple


def due(step: int, interval: int, steps: int) -> bool:
  """Whether a check is due after `step`, counted from 0.

  Args:
    step: the step that was just done.
    interval: every so many steps, and after the last; 0 = never.
    steps: of the whole run.
  """
  done = step + 1
  return interval > 0 and (done % interval == 0 or done == steps)


def fit(
  ctx: Context,
  batch: Callable[[int], Any],
  update: Callable[..., tuple[TrainState, Metrics]],
  validate: Callable[[TrainState], Metrics] | None = None,
) -> TrainState:
  """The loop of the algorithms that learn from a data set.

  Args:
    ctx: the run.
    batch: step -> numpy rows `[M, B, ...]`, M micro-batches.
    update: compiled, `(state, frozen, batch, key) -> (state, metrics)`.
    validate: state -> metrics; called at the config's interval and at the end.

  Returns:
    The state after the last step.
  """
  config, state = ctx.config, ctx.state
  for step in ctx.steps():
    with ctx.stage("data"):
      rows = ctx.put(batch(step), 1)
    with ctx.stage("update"):
      key = keys.fold(ctx.key, step)
      state, metrics = update(state, ctx.frozen, rows, key)
    check = due(step, config.validation_interval, config.steps)
    if validate and (check or step + 1 == config.steps):
      metrics |= validate(state)
    ctx.report(step, metrics, ())
    ctx.save(step, state)
  return state


class Recorder:
  """Steps, stages, reports and saves of one run.

  A step's metrics are read from the device only when the next step has been
  dispatched, or when a save needs them on disk: the saved file positions
  cover exactly the steps that the saved state has seen.
  """

  def __init__(
    self,
    *,
    log,
    screen,
    saver,
    stop,
    profiler,
    done,
    steps,
    counters,
    every=1,
    best_by="",
    past=(),
  ):
    self._log, self._screen, self._saver = log, screen, saver
    self._stop, self._profiler = stop, profiler
    self._done, self._steps, self._every = done, steps, every
    self.counters = counters
    self._best_by, self._best_known = best_by, False
    self._seen = watch.validations(past)  # of the lines that are written
    self._turned = False
    self._seconds: dict[str, float] = {}
    self._last = time.perf_counter()
    self._pending: tuple[int, Metrics, Rows] | None = None

  def steps(self) -> Iterator[int]:
    """The steps still to do, up to the end or to a request to stop."""
    self._last = time.perf_counter()
    for step in range(self._done, self._steps):
      self._seconds = {}
      with self._profiler.step(step):
        yield step
      if self._stop.requested:
        return

  def stage(self, name: str) -> contextlib.AbstractContextManager:
    """Names and times a part of the step."""
    return profile.stage(name, self._seconds)

  def report(self, step: int, metrics: Metrics, rows: Rows = ()) -> None:
    """Takes a step's metrics; they are read when the next step is out."""
    self._flush()
    now = time.perf_counter()
    seconds = self._seconds | {"time/step_s": now - self._last}
    self._last = now
    self._pending = (step, metrics | seconds | profile.memory(), rows)

  def save(self, step: int, state: TrainState) -> None:
    """Saves if it is due, and at the end and before a stop."""
    self._saver.check()
    last = step + 1 == self._steps
    if last or self._stop.requested or self._saver.due(step + 1):
      values = self._flush()
      self._check_best(values)
      score = values.get(self._best_by)
      extra = {"files": self._log.offsets(), "counters": self.counters}
      self._saver.save(step + 1, state, extra, score=score)

  def _check_best(self, values: Metrics) -> None:
    """Says once if no step so far had the metric that `keep_best` names."""
    if self._best_by and not self._best_known:
      self._best_known = True
      near = difflib.get_close_matches(self._best_by, values, 1, 0)
      _log.warning(
        "config.checkpoint.keep_best=%s: no step has reported it so far, so no "
        "checkpoint can be the best; did you mean %s? Of the metrics, those "
        "of validation come every config.validation_interval steps",
        self._best_by,
        *near,
      )

  def _flush(self) -> Metrics:
    """Writes what is pending, if anything is; returns its values."""
    if self._pending is None:
      return {}
    step, metrics, rows = self._pending
    self._pending = None
    values = {k: _number(v) for k, v in jax.device_get(metrics).items()}
    values |= throughput(values)
    # An evaluation's line is never thinned out.
    evaluated = any(name.startswith("eval_") for name in values)
    written = evaluated or due(step, self._every, self._steps)
    values |= self._watch(step + 1, values, written)
    self._best_known |= self._best_by in values
    if written:
      self._log.write(step + 1, values)
    self._log.write_samples(rows)
    self._screen.update(step + 1, values, rows)
    return values

  def _watch(self, step: int, values: Metrics, written: bool) -> Metrics:
    """Train and held-out reward side by side; says once where they part."""
    now = watch.validations([{"step": step, **values}])
    if not now:
      return {}
    seen = self._seen + now
    if written:  # only these are there again after a resume
      self._seen = seen
      turn = watch.find_turn(seen)
      if turn and not self._turned:
        self._turned = True
        _log.warning("step %d: %s", step, watch.told(turn))
    return watch.measure(seen)


# What is counted in a step, the seconds it took, and the rate's name.
RATES = (
  ("num_tokens", "time/step_s", "throughput/tokens_per_s"),
  ("num_prompts", "time/step_s", "throughput/prompts_per_s"),
  (
    "num_sampled_tokens",
    "time/sample_s",
    "throughput/sampled_tokens_per_s",
  ),
)


def throughput(values: Metrics) -> Metrics:
  """Rates a second, of what a step's metrics count."""
  return {
    rate: values[count] / values[seconds]
    for count, seconds, rate in RATES
    if count in values and values.get(seconds)
  }


def _number(value: Any) -> Any:
  return value.item() if hasattr(value, "item") else value
