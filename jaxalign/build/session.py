"""From a config to a `Context`, and from the trained state to a folder.

This is the wiring that all training runs share: mesh, policy, optimizer,
run folder, checkpoint, metrics. What differs by algorithm is in its own file.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.config import TrainingConfig, to_mapping
from jaxalign.core import optim
from jaxalign.core.types import Params, TrainState
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime import (
  checkpoint,
  environment,
  metrics,
  profile,
  signals,
  view,
  workdir,
)
from jaxalign.runtime.context import Context, Recorder

# Unasked, XLA copies a donated array that is read twice, as an optimizer's
# averages are, before it writes to it.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

# What may differ between a run's first start and a later one.
MAY_CHANGE = (
  *("checkpoint.*", "metrics.*", "mesh.*", "profile_steps"),
  "compilation_cache",
)


@dataclasses.dataclass(frozen=True)
class Policy:
  """The model to train, before anything is trained."""

  model: Model
  params: Params
  tokenizer: Tokenizer
  mesh: Mesh

  @property
  def trained(self) -> Params:
    """The leaves that change: adapters, or all."""
    return lora.split(self.params)[0] if self.model.lora else self.params

  @property
  def frozen(self) -> Params:
    """The leaves that do not: the base under adapters, or none."""
    return lora.split(self.params)[1] if self.model.lora else {}

  @property
  def reference(self) -> tuple[Model, Params]:
    """The policy as it is now, without adapters; its leaves are shared."""
    if self.model.lora:
      return self.model.without_lora(), self.frozen
    return self.model, policy_of(self.params)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`."""
  o = config.optimizer
  return optim.make_optimizer(
    o.name,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
    ratios=config.learning_rate_ratios,
  )


def make_rate(config: TrainingConfig) -> Callable[[Any], Any]:
  """Step -> learning rate, by `config.optimizer` over `config.steps`."""
  o = config.optimizer
  return functools.partial(
    optim.learning_rate,
    peak=o.learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup_steps,
    steps=config.steps,
    end_ratio=o.end_value_ratio,
  )


def check_folder(config: TrainingConfig, folder: pathlib.Path) -> None:
  """Refuses a folder that cannot become this run's; makes and loads nothing.

  Raises:
    UserError: it belongs to another config, is in use or cannot be written;
      or a tracker is not installed.
  """
  # The data, which say what is left open, are not read yet.
  allowed = MAY_CHANGE + config.derived
  workdir.check_workdir(folder, to_mapping(config), may_change=allowed)
  for name in metrics.TRACKERS:
    if getattr(config.metrics, name):
      metrics.check_tracker(name)


def open_folder(
  config: TrainingConfig, folder: pathlib.Path
) -> workdir.Workdir:
  """The run's folder; an error where it belongs to another config."""
  return workdir.open_workdir(folder, to_mapping(config), may_change=MAY_CHANGE)


@contextlib.contextmanager
def open_session(
  config: TrainingConfig,
  folder: pathlib.Path,
  policy: Policy,
  *,
  reference: bool = False,
  carried: Any = None,
) -> Iterator[tuple[Context, signals.Stop]]:
  """Opens the run's folder and yields the `Context` its algorithm is handed.

  Args:
    config: validated.
    folder: the run's folder; a run that stands there already goes on.
    policy: its parameters are consumed by the first update.
    reference: keep the policy as it was before training, for a KL.
    carried: what the algorithm keeps besides, before the first step.
  """
  with (
    contextlib.closing(open_folder(config, folder)) as run,
    contextlib.closing(_open_checkpoints(config, run)) as saver,
  ):
    environment.write(run.path)
    prior = _prior(policy) if reference else None
    start, places = _begin(config, policy, saver, carried)
    title = f"{config.algorithm} {run.path.name}"
    with (
      contextlib.closing(_open_metrics(config, run, start)) as log,
      signals.catch_signals() as stop,
      view.View(config.steps, title) as screen,
    ):
      recorder = Recorder(
        log=log,
        screen=screen,
        saver=saver,
        stop=stop,
        profiler=profile.Profiler(run.profile, config.profile_steps),
        done=start.step,
        steps=config.steps,
        counters=dict(start.extra["counters"]),
        every=config.metrics.every_steps,
        best_by=config.best_metric,
        past=metrics.iterate_jsonl(run.path / metrics.METRICS),
      )
      context = Context(
        config=config,
        model=policy.model,
        state=start.state,
        frozen=policy.frozen,
        prior=prior,
        key=jax.random.key(config.seed),
        steps=recorder.steps,
        compile=functools.partial(_compile, places=places, mesh=policy.mesh),
        put=functools.partial(put_rows, policy.mesh),
        stage=recorder.stage,
        report=recorder.report,
        save=recorder.save,
        counters=recorder.counters,
        stopping=lambda: stop.requested,
      )
      yield context, stop
      saver.wait()


def _open_checkpoints(
  config: TrainingConfig, run: workdir.Workdir
) -> checkpoint.Checkpointer:
  return checkpoint.Checkpointer(
    run.checkpoints,
    every_steps=config.checkpoint.every_steps,
    every_minutes=config.checkpoint.every_minutes,
    keep=config.checkpoint.keep,
    keep_best=bool(config.checkpoint.keep_best),
  )


def _begin(
  config: TrainingConfig,
  policy: Policy,
  saver: checkpoint.Checkpointer,
  carried: Any,
) -> tuple[checkpoint.Restored, TrainState]:
  """Where the run stands, new or restored, and the state's shardings."""
  init = functools.partial(
    optim.init_state,
    optimizer=make_optimizer(config),
    ema_decay=config.optimizer.ema,
    carried=carried,
  )
  shapes = jax.eval_shape(init, policy.trained)
  places = meshes.shardings(shapes, policy.mesh)
  abstract = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
    shapes,
    places,
  )
  found = saver.restore_latest(abstract)
  if found is None:
    # The given parameters become the state's: no second copy of them.
    new = jax.jit(init, donate_argnums=0, out_shardings=places)
    extra = {"files": None, "counters": {}}
    found = checkpoint.Restored(new(policy.trained), extra, 0)
  else:
    for leaf in jax.tree.leaves(policy.trained):
      leaf.delete()  # nor here
  return found, places


def _open_metrics(
  config: TrainingConfig, run: workdir.Workdir, start: checkpoint.Restored
) -> metrics.Metrics:
  """The run's logs, cut back to where the run stands."""
  return metrics.Metrics(
    run.path,
    offsets=start.extra["files"],
    step=start.step,
    tensorboard=config.metrics.tensorboard,
    trackers={
      name: config.metrics.project
      for name in ("wandb", "trackio")
      if getattr(config.metrics, name)
    },
    config=to_mapping(config),
  )


def put_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
  """Numpy rows laid out over the mesh, rows on `axis`."""

  def place(x):
    if np.ndim(x) <= axis:
      return jax.device_put(x, meshes.replicated(mesh))
    return jax.device_put(x, meshes.rows(mesh, axis))

  return jax.tree.map(place, tree)


def _compile(update: Callable, places: TrainState, mesh: Mesh) -> Callable:
  """An update `(state, ...) -> (state, metrics)` with its state donated."""

  @functools.wraps(update)
  def on_mesh(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return update(*args)

  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return jax.jit(
    on_mesh,
    donate_argnums=0,
    out_shardings=(places, None),
    compiler_options=CPU_OPTIONS if on_cpu else None,
  )


def _prior(policy: Policy) -> tuple[Model, Params]:
  """The policy before training: adapters left out, or a copy of its own."""
  model, params = policy.reference
  if policy.model.lora:  # the base is never changed
    return model, params
  return model, jax.tree.map(lambda x: x.copy(), params)
