"""From a described run to a running one, and from its end to a folder."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxalign.config import to_mapping
from jaxalign.config.sections import TrainingConfig
from jaxalign.core import optim
from jaxalign.core.types import JsonObject, Params, TrainState
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.models.hf import card, write
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.report import page
from jaxalign.runtime import (
  checkpoint,
  console,
  environment,
  metrics,
  profile,
  signals,
  workdir,
)
from jaxalign.setup.models import Loaded, ModelSpec
from jaxalign.setup.rollout import RolloutSpec
from jaxalign.training.recorder import Recorder
from jaxalign.training.run import Dataset, Run

# What may differ between a run's first start and a later one.
MAY_CHANGE = (
  "checkpoint.*",
  "metrics.*",
  "mesh.*",
  "profile_steps",
  "compilation_cache",
)

C = TypeVar("C", bound=TrainingConfig)
D = TypeVar("D", bound=Dataset)


@dataclasses.dataclass(frozen=True)
class RunSpec(Generic[C]):
  """A run that was opened and checked; not one parameter is read.

  Attributes:
    config: final, what the data decide included.
    policy: the model to train.
    batch_shape: M, B, T: micro-batches, rows of each, tokens at most.
    live_reference: whether the run keeps a reference policy in memory.
    rollout: prompts and reward models of a method that samples, or None.
    value_model: a separate value model, or None.
    rows: what is trained on; a run that continues has to find it unchanged.
  """

  config: C
  policy: ModelSpec
  batch_shape: tuple[int, int, int]
  live_reference: bool = False
  rollout: RolloutSpec | None = None
  value_model: ModelSpec | None = None
  rows: object = ()

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.policy.mesh

  @property
  def models(self) -> dict[str, ModelSpec]:
    """Every model of the run, by the config field that names it."""
    found = {"policy": self.policy}
    if self.value_model:
      found["value_model"] = self.value_model
    if self.rollout:
      named = (
        ("reward_model", self.rollout.reward_models),
        ("test_reward_model", self.rollout.heldout_reward_models),
      )
      for name, specs in named:
        for i, spec in enumerate(specs):
          found[name if len(specs) == 1 else f"{name} {i + 1}"] = spec
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec(RunSpec[C], Generic[C, D]):
  """A run on a data set, its encoded rows included."""

  data: D


def open_mesh(config: TrainingConfig, *, fills_rows: bool = False) -> Mesh:
  """The mesh of `config.mesh`; says how it uses the devices if it has several.

  Args:
    config: of the run.
    fills_rows: whether its method adds empty rows where the mesh needs them.

  Raises:
    UserError: it needs other devices, or cannot split a pass evenly.
  """
  field = "config.micro_batch" if config.micro_batch else "config.batch_size"
  rows = 0 if fills_rows else config.micro_rows
  mesh = meshes.make_mesh(*config.mesh.sizes, rows=rows)
  meshes.check_rows(mesh, rows, field)
  devices, used = jax.device_count(), mesh.size
  if devices > 1 and hosts.is_lead():
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    count = f"{used}" if used == devices else f"{used} of {devices}"
    # What it would be if the rows had allowed it.
    whole = meshes.row_count(meshes.make_mesh(*config.mesh.sizes))
    why = ""
    if whole > meshes.row_count(mesh):
      why = f"; {field} gives {rows} rows, a multiple of {whole} uses more"
    print(f"mesh: {count} devices ({axes}){why}")
  return mesh


def check_folder(config: TrainingConfig, folder: pathlib.Path) -> None:
  """Refuses a folder that cannot become this run's; makes and loads nothing.

  Raises:
    UserError: it belongs to another config, is in use or cannot be written;
      or a tracker is not installed.
  """
  # What the data decide is not known yet.
  allowed = MAY_CHANGE + config.derived
  workdir.check_workdir(
    folder,
    to_mapping(config),
    may_change=allowed,
    config_class=type(config),
  )
  for name in metrics.TRACKERS:
    if getattr(config.metrics, name):
      metrics.check_tracker(name)


def open_workdir(
  config: TrainingConfig, folder: pathlib.Path
) -> workdir.Workdir:
  """The run's folder; a UserError where it belongs to another config."""
  return workdir.open_workdir(
    folder,
    to_mapping(config),
    # Other rows may make another number of steps.
    may_change=MAY_CHANGE
    + (config.derived if config.checkpoint.allow_other_data else ()),
    config_class=type(config),
  )


def reference_of(model: Model, params: Params) -> tuple[Model, Params]:
  """The policy as it is now, without adapters; its leaves are shared."""
  if model.lora:
    return model.without_lora(), lora.split(params)[1]
  return model, policy_of(params)


def digest_of(rows: object) -> str:
  """Tells encoded rows or prompts from others: a digest of their JSON text.

  Args:
    rows: a list or tuple of rows, or a dataclass of such columns.
  """
  total = hashlib.blake2b(digest_size=16)
  for part in _json_parts(rows):
    total.update(part.encode())
  return total.hexdigest()


def _json_parts(rows: object) -> Iterator[str]:
  # Row by row: the text of all rows takes more memory than they do.
  if isinstance(rows, list | tuple):
    for i, row in enumerate(rows):
      yield (", " if i else "[") + json.dumps(row, default=vars)
    yield "]"
  elif dataclasses.is_dataclass(rows):
    for i, (name, column) in enumerate(vars(rows).items()):
      yield f"{', ' if i else '{'}{json.dumps(name)}: "
      yield from _json_parts(column)
    yield "}"
  else:
    yield json.dumps(rows)


@contextlib.contextmanager
def open_run(
  spec: RunSpec[C],
  policy: Loaded,
  folder: pathlib.Path,
  extra_state: PyTree = None,  # a method's own
) -> Iterator[Run[C]]:
  """Opens the run's folder, restores or begins its state, opens its logs.

  Args:
    spec: of the run.
    policy: its parameters, and those of a value model under `value`; the
      first update consumes them.
    folder: a run that is there already continues.
    extra_state: what the method keeps in its state, before the first step.

  Yields:
    The run that its method is handed.

  Raises:
    UserError: the folder is of another config, or of other rows.
  """
  config, mesh, digest = spec.config, spec.mesh, digest_of(spec.rows)
  with (
    contextlib.closing(open_workdir(config, folder)) as run,
    contextlib.closing(
      checkpoint.Checkpointer(
        run.checkpoints,
        every_steps=config.checkpoint.every_steps,
        every_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
        keep_best=bool(config.checkpoint.keep_best),
      )
    ) as saver,
  ):
    environment.write(run.path)

    # The reference is the policy before training: the base under adapters,
    # which never changes, or a copy.
    reference = None
    if spec.live_reference:
      reference = reference_of(policy.model, policy.params)
      if not policy.model.lora:
        copy = jax.tree.map(lambda x: x.copy(), reference[1])
        reference = reference[0], copy
    trained, frozen = policy.params, {}
    if policy.model.lora:
      trained, frozen = lora.split(policy.params)

    # Where the run stands: restored, or new.
    o = config.optimizer
    optimizer = optim.make_optimizer(
      o.name,
      beta1=o.beta1,
      beta2=o.beta2,
      eps=o.eps,
      weight_decay=o.weight_decay,
      clip_norm=o.clip_norm,
      ratios=config.learning_rate_ratios,
    )

    def init(params: Params) -> TrainState:
      return optim.init_state(params, optimizer, o.ema, extra_state)

    # Shapes alone, so that a stored state is read straight onto its shardings.
    shapes = jax.eval_shape(init, trained)
    shardings = meshes.shardings(shapes, mesh)
    restored = saver.restore_latest(
      jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        shapes,
        shardings,
      )
    )
    if restored is None:
      # The given parameters become the state's: no second copy of them.
      begin = jax.jit(init, donate_argnums=0, out_shardings=shardings)
      state, done, files, counters = begin(trained), 0, None, {}
    else:
      for leaf in jax.tree.leaves(trained):
        leaf.delete()  # nor here
      state, done = restored.state, restored.step
      files, counters = restored.extra["files"], restored.extra["counters"]
      same = restored.extra.get("rows", digest) == digest
      if not same and not config.checkpoint.allow_other_data:
        field = "config.prompts" if spec.rollout else "config.data"
        raise UserError(
          f"{field} no longer gives the rows that {run.path} was trained on: a "
          "file has changed; restore it, start again in another --workdir, or "
          "continue with --config.checkpoint.allow_other_data=true"
        )

    # Logs, signals, profiler and screen, closed in the reverse order.
    with (
      contextlib.closing(
        metrics.MetricsLog(
          run.path,
          offsets=files,
          step=done,
          tensorboard=config.metrics.tensorboard,
          trackers={
            name: config.metrics.project
            for name in metrics.TRACKERS
            if getattr(config.metrics, name)
          },
          config=to_mapping(config),
        )
      ) as log,
      signals.catch_signals() as stop,
      contextlib.closing(
        profile.Profiler(run.profile, config.profile_steps)
      ) as profiler,
      console.Console(
        config.steps, f"{config.algorithm} {run.path.name}"
      ) as screen,
    ):
      # What the method is handed.
      recorder = Recorder(
        log=log,
        console=screen,
        saver=saver,
        stop=stop,
        profiler=profiler,
        done=done,
        total=config.steps,
        counters=dict(counters),
        every=config.metrics.every_steps,
        best_metric=config.best_metric,
        digest=digest,
        past=metrics.iterate_jsonl(run.path / metrics.METRICS),
      )
      opened = Run(
        config,
        policy.model,
        state,
        frozen,
        reference,
        mesh,
        recorder,
        optimizer,
        optim.make_schedule(
          o.schedule,
          peak=o.learning_rate,
          warmup_steps=o.warmup_steps,
          steps=config.steps,
          end_ratio=o.end_value_ratio,
        ),
        shardings,
      )
      yield opened
      # They hold the run, whose reference would stay in memory with them.
      opened.evaluators.clear()
      saver.wait()


def finish(
  run: Run[C], state: TrainState, policy: Loaded, folder: pathlib.Path
) -> int:
  """Writes `model/` and `report.html`, and marks the run as finished.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM, which end a
    run before it is finished.
  """
  stop = run.recorder.stop
  if hosts.agree(stop.requested):
    return stop.exit_status
  # From the log, because a resumed run has seen only its own part.
  last: JsonObject = {}  # the last value of every metric
  for row in metrics.iterate_jsonl(folder / metrics.METRICS):
    last |= row
  tokenizer, settings = policy.tokenizer, to_mapping(run.config)
  assert tokenizer is not None

  def also(place: pathlib.Path) -> None:
    tokenizer.save(place)
    card.write(place, config=settings, metrics=last)

  # All processes take part, because parameters may be spread over them.
  write.save(
    run.model,
    lora.join(state.eval_params, run.frozen),
    folder / "model",
    config=tokenizer.special_ids(),
    also=also,
  )
  if hosts.is_lead():
    page.write_report(folder)
  # The mark comes last: without it the same command writes all this again.
  workdir.mark_finished(
    folder,
    {
      "steps": run.config.steps,
      "metrics": last,
      "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    },
  )
  hosts.barrier("the run is finished", seconds=600)
  return 0
