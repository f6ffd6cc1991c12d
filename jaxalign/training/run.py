"""What a method is handed: one run, its state and its machine."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jaxalign.config.sections import TrainingConfig
from jaxalign.core import keys, optim
from jaxalign.core.types import Metrics, Params, TrainState
from jaxalign.errors import StepError, UserError
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.cpu import COMPILER_OPTIONS
from jaxalign.parallel.program import Program, key_shape
from jaxalign.training.recorder import Recorder, Rows, due

C = TypeVar("C", bound=TrainingConfig)
# (state, frozen, reference, batch, key) -> (state, metrics); pure. The batch is
# a method's own pytree of rows `[M, B, ...]`, M micro-batches.
Update = Callable[
  [TrainState, Params, Params, PyTree, Array], tuple[TrainState, Metrics]
]

UPDATES = 2**31 - 2  # folded into the run's key; no step has this number

_log = logging.getLogger(__name__)


@runtime_checkable
class Evaluator(Protocol):
  """Measures the policy during training, after the last step included."""

  @property
  def name(self) -> str:
    """What is measured."""
    ...

  @property
  def every(self) -> int:
    """Steps between evaluations, also after the last; 0 = only then."""
    ...

  def __call__(self, params: Params, step: int) -> Metrics:
    """Metrics of all the policy's parameters after `step`, named `eval_...`."""
    ...

  def programs(self, params: Params) -> list[Program]:
    """What it runs on the devices; `params` are shapes with shardings."""
    ...


@runtime_checkable
class Dataset(Protocol):
  """Rows of a method that learns from a data set."""

  def batch(self, step: int) -> PyTree:  # the method's own
    """Numpy rows `[M, B, ...]` of a step; a pure function."""
    ...


@dataclasses.dataclass
class Run(Generic[C]):
  """One run, as its method sees it.

  Attributes:
    config: the validated config.
    model: what is trained, with its adapters if it has any.
    state: where the run stands, new or restored; given away with the first
      update. Of a run that is only described, its shapes.
    frozen: parameters that are read and never changed: the base under LoRA
      adapters, else empty.
    reference: the reference policy and its parameters; None = the method has
      none, or its log-probs were precomputed.
    mesh: the devices.
    recorder: logs, checkpoints, signals; a run that is only described has
      none.
    optimizer: without its learning rate.
    schedule: step -> learning rate.
    shardings: of the state.
    evaluators: called where they are due.
    key: of the run; see `step_key` and `update_key`.
  """

  config: C
  model: Model
  state: TrainState
  frozen: Params
  reference: tuple[Model, Params] | None
  mesh: Mesh
  recorder: Recorder
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  shardings: TrainState
  evaluators: list[Evaluator] = dataclasses.field(default_factory=list)
  key: Array = dataclasses.field(init=False)

  def __post_init__(self):
    # Made before the first step, which may run under a transfer guard.
    self.key = jax.random.key(self.config.seed)

  def step_key(self, step: int) -> Array:
    """The key of a step, derived from its number alone."""
    return keys.fold(self.key, step)

  def update_key(self, step: int) -> Array:
    """Another one, for the updates of a step that `step_key` samples in."""
    return keys.fold(keys.fold(self.key, UPDATES), step)

  def steps(self) -> Iterator[int]:
    """The steps still to do; ends early when the run is asked to stop."""
    return self.recorder.steps()

  def stage(self, name: str) -> contextlib.AbstractContextManager:
    """Names and times a part of a step."""
    return self.recorder.stage(name)

  def stopping(self) -> bool:
    """Whether the run was asked to stop; for what waits within a step."""
    return self.recorder.stop.requested

  def policy_params(self, state: TrainState) -> Params:
    """All parameters of the policy, adapters and base joined."""
    return policy_of(lora.join(state.params, self.frozen))

  @property
  def reference_params(self) -> Params:
    """Parameters of the live reference, an argument of compiled functions."""
    return self.reference[1] if self.reference else {}

  def live_reference(self, params: Params) -> tuple[Model, Params] | None:
    """The reference with its parameters as a trace has them; None = not live.

    Args:
      params: `reference_params`, handed through the trace.
    """
    return (self.reference[0], params) if self.reference else None

  def put(self, batch: PyTree) -> PyTree:
    """Numpy rows `[M, B, ...]` on the mesh, B split over its row axes."""
    return meshes.put_rows(batch, self.mesh)

  def jit(self, update: Update) -> "Step":
    """Compiles an update, which keeps the state's shardings and donates it."""
    on_cpu = meshes.platform(self.mesh) == "cpu"
    compiled = meshes.jit(
      update,
      self.mesh,
      donate_argnums=0,
      out_shardings=(self.shardings, None),
      compiler_options=COMPILER_OPTIONS if on_cpu else None,
    )
    return Step(self, compiled)

  def apply_gradients(
    self,
    state: TrainState,
    grads: Params,
    loss: Float[Array, ""],
  ) -> tuple[TrainState, Metrics]:
    """One optimizer update at the rate of `state.step`, inside a trace.

    It is skipped and counted if the loss or a gradient is not finite. The
    step is counted by `end_step`, so several updates may share its rate.
    """
    rate = jnp.asarray(self.schedule(state.step))
    state, norm = optim.apply_gradients(
      state, grads, loss, rate, self.optimizer, self.config.optimizer.ema
    )
    return state, {
      "grad_norm": norm,
      "lr": rate,
      "skipped_updates": state.skipped,
    }

  @contextlib.contextmanager
  def tolerate_failure(self, step: int, allowed: int) -> Iterator[None]:
    """Lets the body fail in up to `allowed` steps of the whole run.

    Out of memory, no usable completion: tolerated up to a set number, as in
    SuperHF's released code, but counted and logged. A `UserError` is a mistake
    in the input, which does not go away, unless it is a `StepError`. With
    several processes only that is tolerated: it is raised by all of them, any
    other error by one while the others wait for it.
    """
    counters = self.recorder.counters
    counters.setdefault("exceptions", 0)
    try:
      yield
    except Exception as error:
      shared = isinstance(error, StepError)
      if not shared and (isinstance(error, UserError) or hosts.count() > 1):
        raise
      counters["exceptions"] += 1
      if counters["exceptions"] > allowed:
        raise
      _log.exception("step %d failed and is skipped", step + 1)

  def write_pending(self) -> None:
    """Writes the lines of the step before, while the device works on this one.

    They would be written by `end_step`, when a method that waits for the device
    within a step has nothing left to overlap them with.
    """
    self.recorder.flush()

  def end_step(
    self, step: int, state: TrainState, metrics: Metrics, rows: Rows = ()
  ) -> TrainState:
    """Counts the step, evaluates, reports and saves where that is due.

    Args:
      step: counted from 0.
      state: after the step's updates.
      metrics: may still be on the device.
      rows: lines of samples.jsonl.
    """
    state = optim.advance(state)
    for evaluator in self.evaluators:
      # An interval of 0 stands for the last step alone.
      if due(step, evaluator.every or self.config.steps, self.config.steps):
        with self.stage("evaluate"):
          params = policy_of(lora.join(state.eval_params, self.frozen))
          metrics = metrics | evaluator(params, step)
    # Reported before it is saved: a save covers this step's lines.
    self.recorder.report(step, metrics | self.recorder.counters, rows)
    self.recorder.save(step, state)
    return state


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """An update of one run, compiled.

  Attributes:
    run: its base parameters and its reference are read at every call.
    function: a jitted `Update`.
  """

  run: Run
  function: jax.stages.Wrapped

  def __call__(
    self, state: TrainState, batch: PyTree, key: Array
  ) -> tuple[TrainState, Metrics]:
    """The state after a numpy batch, and metrics; the given state is gone."""
    run = self.run
    # The reference is an argument: a constant would be compiled in.
    return self.function(
      state, run.frozen, run.reference_params, run.put(batch), key
    )

  def program(
    self, batch: PyTree, calls: int | float = 1, name: str = "update"
  ) -> Program:
    """The program of a numpy batch of this shape; `run` may hold shapes."""
    run = self.run
    rows, key = meshes.row_shapes(batch, run.mesh), key_shape(run.mesh)
    arguments = (run.state, run.frozen, run.reference_params, rows, key)
    return Program(name, self.function, arguments, calls)


def fit(run: Run[C], data: Dataset, update: Update) -> TrainState:
  """The loop of the methods that learn from a data set; the last state."""
  state, compiled = run.state, run.jit(update)
  for step in run.steps():
    with run.stage("data"):
      batch = data.batch(step)
    with run.stage("update"):
      state, metrics = compiled(state, batch, run.step_key(step))
    if step == 0:  # said once; a data set may have nothing to say
      metrics = metrics | getattr(data, "counts", {})
    state = run.end_step(step, state, metrics)
  return state
