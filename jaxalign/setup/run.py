"""From a described run to a running one, and from its end to a folder."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxalign import cli
from jaxalign.config import to_mapping
from jaxalign.config.changes import LENGTH, MAY_CHANGE
from jaxalign.config.sections import TrainingConfig
from jaxalign.core import optim
from jaxalign.core.types import JsonObject, Params, TrainState
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.attention import Choice
from jaxalign.models.heads import policy_of
from jaxalign.models.hf import card, write
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.mesh import Devices
from jaxalign.report import page
from jaxalign.runtime import (
  checkpoint,
  console,
  environment,
  manifest,
  metrics,
  profile,
  signals,
  workdir,
)
from jaxalign.runtime.files import flatten
from jaxalign.scoring.function import RewardFunction
from jaxalign.setup import start
from jaxalign.setup.example import example_of
from jaxalign.setup.models import Loaded, ModelSpec, attention_of
from jaxalign.setup.rollout import RolloutSpec
from jaxalign.training.recorder import Recorder
from jaxalign.training.run import Dataset, Run

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
    files: digests of the files of users' functions, which have to stay as well.
  """

  config: C
  policy: ModelSpec
  batch_shape: tuple[int, int, int]
  live_reference: bool = False
  rollout: RolloutSpec | None = None
  value_model: ModelSpec | None = None
  rows: object = ()
  files: tuple[str, ...] = ()

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.policy.mesh

  def example(self) -> str:
    """The first text that is read, as the model sees it, on one line."""
    return example_of(
      self.rows,
      self.policy.tokenizer,
      self.policy.model.config.head,
      getattr(self.config, "encoding", ""),
      getattr(self.policy.model.config, "pad_id", -1),
    )

  def doubts(self) -> list[str]:
    """Why the run may learn next to nothing, a line each with the remedy."""
    config, found = self.config, []
    steps, warmup = config.steps, config.optimizer.warmup_steps
    if warmup and warmup >= steps:
      found.append(
        f"note: all {steps} steps are in optimizer.warmup_steps={warmup}, so "
        "the learning rate stays below its peak; lower it, or give more epochs "
        "or steps"
      )
    # Rows of a data set; with packing several texts each.
    rows = len(self.rows) if isinstance(self.rows, list) else config.batch_size
    if rows < config.batch_size and self.rollout is None:
      found.append(
        f"note: there are {rows} rows for an update of "
        f"batch_size={config.batch_size}, which takes them more than once; a "
        "smaller batch_size or max_length, or packing=false, makes more updates"
      )
    return found

  @property
  def models(self) -> dict[str, ModelSpec]:
    """Every model of the run, by the config field that names it."""
    found = {"policy": self.policy}
    if self.value_model:
      found["value_model"] = self.value_model
    for name, reward in self.rewards.items():
      if isinstance(reward, ModelSpec):  # not a function
        found[name] = reward
    return found

  @property
  def rewards(self) -> dict[str, ModelSpec | RewardFunction]:
    """Every reward model and function, by the config field that names it."""
    if self.rollout is None:
      return {}
    named = (
      ("reward_model", self.rollout.reward_models),
      ("test_reward_model", self.rollout.heldout_reward_models),
    )
    return {
      name if len(rewards) == 1 else f"{name} {i + 1}": reward
      for name, rewards in named
      for i, reward in enumerate(rewards)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec(RunSpec[C], Generic[C, D]):
  """A run on a data set, its encoded rows included."""

  data: D


def summary(
  spec: RunSpec[C],
  folder: pathlib.Path,
  *,
  extend: bool = False,
  fresh: bool = False,
) -> str:
  """What a run would be, for people: a line for each of its parts.

  Args:
    spec: of the run.
    folder: the run's.
    extend: whether a run is there that gets a new length.
    fresh: whether a run that is there is moved aside.

  Raises:
    UserError: the run cannot be extended.
  """
  config = spec.config
  done = checkpoint.last_step(folder / "checkpoints")
  before = check_extension(spec, folder) if extend else config.steps
  state = f"goes on after step {done}" if done else "new"
  if workdir.read_finished(folder) is not None:
    state = "finished; nothing would be done"
  if before < config.steps:
    state = f"goes on after step {done}, extended from {before} steps"
  if fresh and workdir.read_config(folder) is not None:
    state = "new; the run that is there would be moved aside"
  lines = [
    ("run", f"{config.algorithm}, {config.steps} steps"),
    ("folder", f"{folder} ({state})"),
  ]
  # The models, and what of the policy is trained.
  rewards = spec.rewards
  own = {k: model for k, model in spec.models.items() if k not in rewards}
  for name, model in (own | rewards).items():
    if not isinstance(model, ModelSpec):
      lines.append((name, f"{model.name}, a function"))
      continue
    size = count(model.model.shapes)
    lines.append((name, f"{model.tokenizer.name}, {size:,} parameters"))
    if model.model.lora:
      lines.append(("", adapter_line(model.model)))
  if spec.live_reference:
    lines.append(("reference", "the policy before training, kept in memory"))
  # Rows and devices.
  if spec.rollout:
    held_out = len(spec.rollout.eval_prompts)
    prompts = f"{len(spec.rollout.prompts)} of at most "
    prompts += f"{spec.rollout.prompt_length} tokens"
    aside = f", {held_out} more for evaluations" if held_out else ""
    lines.append(("prompts", prompts + aside))
  lines.append(("attention", str(policy_attention(spec))))
  micros, rows, tokens = spec.batch_shape
  passes = "one pass" if micros == 1 else f"{micros} passes"
  batch = f"{passes} of {rows} texts of at most {tokens} tokens"
  lines.append(("update", batch))
  axes = ", ".join(f"{name} {size}" for name, size in spec.mesh.shape.items())
  kind = spec.mesh.devices.flat[0].device_kind
  lines.append(("devices", f"{spec.mesh.size} x {kind} ({axes})"))
  width = max(len(name) for name, _ in lines)
  return "\n".join(f"{name:<{width}}  {words}" for name, words in lines)


def policy_attention(spec: RunSpec[C]) -> Choice:
  """The policy's attention, and what kept faster ones out."""
  config = spec.config
  return attention_of(
    spec.policy.model, spec.mesh, config.attention, config.max_length
  )


def adapter_line(model: Model) -> str:
  """What a model with adapters trains, for people."""
  trained = count(lora.split(model.shapes)[0])
  assert model.lora is not None
  return (
    f"LoRA on {', '.join(model.lora.targets)}: {trained:,} of "
    f"{count(model.shapes):,} parameters are trained"
  )


def count(shapes: Params) -> int:
  """The number of parameters in a tree of arrays or their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def open_mesh(
  config: TrainingConfig, devices: Devices = None, *, fills_rows: bool = False
) -> Mesh:
  """The mesh of `config.mesh`; says how it uses the devices if it has several.

  Args:
    config: of the run.
    devices: see `make_mesh`.
    fills_rows: whether its method adds empty rows where the mesh needs them.

  Raises:
    UserError: it needs other devices, or cannot split a pass evenly.
  """
  field = "config.micro_batch" if config.micro_batch else "config.batch_size"
  rows = 0 if fills_rows else config.micro_rows
  sizes = config.mesh.sizes
  mesh = meshes.make_mesh(*sizes, rows=rows, devices=devices)
  meshes.check_rows(mesh, rows, field)
  there = jax.device_count() if devices is None else len(devices)
  if there > 1 and hosts.is_lead():
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    share = f"{there}" if mesh.size == there else f"{mesh.size} of {there}"
    # What it would be if the rows had allowed it.
    whole = meshes.row_count(meshes.make_mesh(*sizes, devices=devices))
    why = ""
    if whole > meshes.row_count(mesh):
      why = f"; {field} gives {rows} rows, a multiple of {whole} uses more"
    print(f"mesh: {share} devices ({axes}){why}")
  return mesh


def check_hosts(
  config: TrainingConfig, folder: pathlib.Path, **flags: bool
) -> None:
  """Refuses hosts that were started with other flags, programs or devices.

  Args:
    config: of the run.
    folder: the run's.
    **flags: what else the command line says.

  Raises:
    UserError: what differs, and on which host.
  """
  if hosts.count() == 1:
    return
  values = {f"config.{k}": v for k, v in flatten(to_mapping(config)).items()}
  values |= {f"--{name}": flag for name, flag in flags.items()}
  hosts.check_same(
    values
    | {
      "--workdir": str(folder.absolute()),
      "the number of processes": hosts.count(),
      "the number of its devices": jax.local_device_count(),
      "the kind of its devices": jax.local_devices()[0].device_kind,
      "jax": jax.__version__,
      "jaxalign": cli.version(),
    },
    "start all hosts by the same command, on machines that are alike",
  )


def check_folder(
  config: TrainingConfig,
  folder: pathlib.Path,
  *,
  extend: bool = False,
  fresh: bool = False,
) -> None:
  """Refuses a folder that cannot become this run's; makes and loads nothing.

  Args:
    config: of the run.
    folder: the run's.
    extend: whether a run is there that gets a new length.
    fresh: whether a run that is there is moved aside.

  Raises:
    UserError: it belongs to another config, is in use or cannot be written;
      or a tracker is not installed.
  """
  for name in metrics.TRACKERS:
    if getattr(config.metrics, name):
      metrics.check_tracker(name)
  # What the data decide is not known yet.
  workdir.check_workdir(
    folder,
    None if fresh else to_mapping(config),
    rules=rules_of(config) + config.derived + (LENGTH if extend else ()),
    config_class=type(config),
  )
  if extend and workdir.read_config(folder) is None:
    near = sorted(folder.parent.glob(f"{folder.name}*/config.json"))
    found = " or ".join(f"--workdir={path.parent}" for path in near[:3])
    raise UserError(
      f"--extend: {folder} holds no run; "
      + (f"did you mean {found}?" if found else "name its folder by --workdir")
    )


def rules_of(config: TrainingConfig) -> tuple[str, ...]:
  """Which fields may differ from those of an earlier start."""
  # With `init_from` the policy is a folder in the run's own, which may move.
  return MAY_CHANGE + (("policy",) if config.init_from else ())


def open_workdir(
  config: TrainingConfig, folder: pathlib.Path
) -> workdir.Workdir:
  """The run's folder; a UserError where it belongs to another config."""
  return workdir.open_workdir(
    folder,
    to_mapping(config),
    # Other rows may make another number of steps.
    rules=rules_of(config)
    + (config.derived if config.checkpoint.allow_other_data else ()),
    config_class=type(config),
  )


def check_unchanged(
  spec: RunSpec[C], digest: str, extra: JsonObject, folder: pathlib.Path
) -> None:
  """Refuses to go on with a run on other rows, or with other functions.

  Args:
    spec: of the run as it is now.
    digest: its own, see `digest_of_run`.
    extra: of the checkpoint to go on from.
    folder: the run's, for the message.

  Raises:
    UserError: they differ, and `checkpoint.allow_other_data` is off.
  """
  old = extra.get("rows", digest)
  if old == digest or spec.config.checkpoint.allow_other_data:
    return
  field = "config.prompts" if spec.rollout else "config.data"
  what = f"{field} no longer gives the rows of {folder}: a file"
  if old.partition(" ")[0] == digest.partition(" ")[0]:
    what = f"the file of a reward function or of a judge of {folder}"
  raise UserError(
    f"{what} has changed; restore it, start again in another --workdir, or "
    "continue with --config.checkpoint.allow_other_data=true"
  )


def check_extension(spec: RunSpec[C], folder: pathlib.Path) -> int:
  """The length that a run has before `--extend`; changes nothing.

  Args:
    spec: its config differs from the run's in its length alone.
    folder: holds a run.

  Raises:
    UserError: the run would become shorter, has no checkpoint left, or would go
      on with other rows or functions.
  """
  config = spec.config
  old = workdir.read_config(folder)
  assert old is not None, folder
  before, now = old["steps"], config.steps
  if now < before:
    raise UserError(
      f"--extend: config.steps must be >= {before}, the length of the run in "
      f"{folder}, got {now}; raise config.steps, or config.epochs where steps "
      "follow from the data"
    )
  if now == before:
    return before
  finished = workdir.read_finished(folder) is not None
  saves = folder / "checkpoints"
  newest = checkpoint.newest_whole(saves)
  if finished and newest < 0:
    raise UserError(
      f"--extend: {folder} is finished and has no checkpoint left to go on "
      f"from; begin another run with --init_from={folder}"
    )
  if newest >= 0:
    body = manifest.read(saves / f"{newest:08d}")
    assert body is not None, newest
    check_unchanged(spec, digest_of_run(spec), body["extra"], folder)
  return before


def extend_run(spec: RunSpec[C], folder: pathlib.Path) -> bool:
  """Gives the run in a folder its new length, and says what its rate becomes.

  Called by the lead process alone.

  Args and raises: as `check_extension`.

  Returns:
    Whether there is anything to do.
  """
  # Nothing is changed before it is sure that the run can go on.
  config, before = spec.config, check_extension(spec, folder)
  now, finished = config.steps, workdir.read_finished(folder) is not None
  if now == before:
    return not finished
  done = before
  if not finished:
    done = checkpoint.last_step(folder / "checkpoints")
  # The rate of the last step done, and of the next.
  was, is_now, last = (
    np.asarray(schedule_of(dataclasses.replace(config, steps=steps))(i)).item()
    for steps, i in ((before, max(done - 1, 0)), (now, done), (now, now - 1))
  )
  shape = config.optimizer.schedule
  stretched = ""
  if shape != "constant":
    stretched = f", stretched over {now} steps and {last:.3g} at the last"
  print(
    f"{folder}: extended from {before} to {now} steps, {done} are done; the "
    f"{shape} learning rate was {was:.3g} at step "
    f"{max(done, 1)} and is {is_now:.3g} at step {done + 1}"
    f"{stretched}"
  )
  # The mark goes first: an unfinished run of the old length is finished again
  # by its command, a finished one of the new length would never be trained.
  workdir.mark_unfinished(folder)
  # KTO draws other mismatched pairs for another length.
  reference = folder / "reference.npz"
  if config.algorithm == "kto" and reference.exists():
    reference.rename(folder / f"reference-{before}.npz")
  workdir.open_workdir(
    folder,
    to_mapping(config),
    rules=rules_of(config) + LENGTH,
    config_class=type(config),
  ).close()
  return True


def schedule_of(config: TrainingConfig) -> optax.Schedule:
  """Step, counted from 0 -> learning rate."""
  o = config.optimizer
  return optim.make_schedule(
    o.schedule,
    peak=o.learning_rate,
    warmup_steps=o.warmup_steps,
    steps=config.steps,
    end_ratio=o.end_value_ratio,
  )


def reference_of(model: Model, params: Params) -> tuple[Model, Params]:
  """The policy as it is now, without adapters; its leaves are shared."""
  if model.lora:
    return model.without_lora(), lora.split(params)[1]
  return model, policy_of(params)


def rounded(params: Params, dtype: str) -> Params:
  """The parameters with their matrices in another format; norms stay exact.

  Args:
    params: arrays, or shapes with their shardings.
    dtype: "float32" leaves them as they are, whatever they are.
  """
  if dtype == "float32":
    return params

  def convert(path, leaf):
    if path[-1].key not in ("kernel", "embedding"):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(dtype=jnp.dtype(dtype))
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(convert, params)


def digest_of_run(spec: RunSpec[C]) -> str:
  """Tells what a run reads from what others do: its rows, its functions' files.

  What these files import does not count.
  """
  digest = digest_of(spec.rows)
  return f"{digest} {digest_of(spec.files)}" if spec.files else digest


def digest_of(rows: object) -> str:
  """Tells encoded rows or prompts from others: a digest of their JSON text.

  Args:
    rows: a list or tuple of rows, or a dataclass of such columns; what is no
      JSON, such as a date in a column of the data, counts by its `repr`.
  """
  total = hashlib.blake2b(digest_size=16)
  for part in _json_parts(rows):
    total.update(part.encode())
  return total.hexdigest()


def _plain(x: object) -> object:
  return vars(x) if dataclasses.is_dataclass(x) else repr(x)


def _json_parts(rows: object) -> Iterator[str]:
  # Row by row: the text of all rows takes more memory than they do.
  if isinstance(rows, list | tuple):
    for i, row in enumerate(rows):
      yield (", " if i else "[") + json.dumps(row, default=_plain)
    yield "]"
  elif dataclasses.is_dataclass(rows):
    for i, (name, column) in enumerate(vars(rows).items()):
      yield f"{', ' if i else '{'}{json.dumps(name)}: "
      yield from _json_parts(column)
    yield "}"
  else:
    yield json.dumps(rows)


def optimizer_of(config: TrainingConfig) -> optax.GradientTransformation:
  """The optimizer, without its learning rate; see `schedule_of`."""
  o = config.optimizer
  return optim.make_optimizer(
    o.name,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
    ratios=config.learning_rate_ratios,
    mu_dtype=o.mu_dtype,
  )


def initializer(
  config: TrainingConfig,
  optimizer: optax.GradientTransformation,
  extra_state: PyTree,  # a method's own
) -> Callable[[Params], TrainState]:
  """Trained parameters -> the state before the first step."""
  return functools.partial(
    optim.init_state,
    optimizer=optimizer,
    ema_decay=config.optimizer.ema,
    extra_state=extra_state,
  )


def describe_run(
  spec: RunSpec[C],
  params: Params,
  extra_state: PyTree = None,  # a method's own
) -> Run[C]:
  """The run before it is opened: its state is shapes, and it has no recorder.

  Its programs can be traced and compiled, for devices that are not there too.

  Args:
    spec: of the run.
    params: those of the policy and, under `value`, of a value model; arrays, or
      shapes with their shardings.
    extra_state: what the method keeps in its state, before the first step.

  Returns:
    The run; base parameters under adapters and the reference are those of
    `params`.
  """
  config, model, mesh = spec.config, spec.policy.model, spec.mesh
  trained, frozen = lora.split(params) if model.lora else (params, {})
  optimizer = optimizer_of(config)
  init = initializer(config, optimizer, extra_state)
  state = meshes.with_shardings(jax.eval_shape(init, trained), mesh)
  reference = None
  if spec.live_reference:
    reference, parts = reference_of(model, params)
    # Under adapters it is the base itself, and no copy.
    dtype = "float32" if model.lora else config.precision.reference
    reference = reference, rounded(parts, dtype)
  return Run(
    config,
    model,
    state,
    frozen,
    reference,
    mesh,
    object.__new__(Recorder),  # blank: nothing is recorded
    optimizer,
    schedule_of(config),
    jax.tree.map(operator.attrgetter("sharding"), state),
  )


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
  config, digest = spec.config, digest_of_run(spec)
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
    opened = describe_run(spec, policy.params, extra_state)
    if opened.reference and not policy.model.lora:
      model, params = opened.reference
      opened.reference = model, jax.tree.map(lambda x: x.copy(), params)
    trained = policy.params
    if policy.model.lora:
      trained, _ = lora.split(policy.params)

    # Where the run stands: restored, or new. A stored state is read straight
    # onto its shardings.
    shapes = opened.state
    restored = saver.restore_latest(shapes)
    if restored is None:
      # The given parameters become the state's: no second copy of them.
      init = initializer(config, opened.optimizer, extra_state)
      begin = jax.jit(init, donate_argnums=0, out_shardings=opened.shardings)
      opened.state, done, files, counters = begin(trained), 0, None, {}
      if config.init_optimizer:
        known = start.read_optimizer(run.path, shapes.opt_state)
        opened.state = dataclasses.replace(opened.state, opt_state=known)
    else:
      for leaf in jax.tree.leaves(trained):
        leaf.delete()  # nor here
      opened.state, done = restored.state, restored.step
      files, counters = restored.extra["files"], restored.extra["counters"]
      check_unchanged(spec, digest, restored.extra, run.path)
    if hosts.is_lead():
      begins = f"{config.steps} step{'s' * (config.steps != 1)}"
      if done:
        begins = f"goes on after step {done} of {config.steps}"
      print(f"{run.path}: {begins}", flush=True)
      if policy.model.lora:
        print(adapter_line(policy.model))
      choice = policy_attention(spec)
      # On a CPU there is no choice.
      if choice.reason or choice.kind != "dense":
        print(f"attention: {choice}")

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
        config.steps,
        f"{config.algorithm} {run.path}",
        done=done,
        stop=stop,
      ) as screen,
    ):
      # What the method is handed.
      opened.recorder = Recorder(
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
      yield opened
      # They hold the run, whose reference would stay in memory with them.
      opened.evaluators.clear()
      saver.wait()


def finish(
  run: Run[C], state: TrainState, policy: Loaded, folder: pathlib.Path
) -> int:
  """Writes `model/` and `report.html`, and marks the run as finished.

  A run that was asked to stop gets its report alone. Both say what they left
  and what can be done with it.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM, which end a
    run before it is finished.
  """
  stop, steps = run.recorder.stop, run.config.steps
  if stop.agree():
    if hosts.is_lead():
      saved = run.recorder.saved
      print(
        f"stopped after step {saved} of {steps}, which is saved in "
        f"{folder / 'checkpoints'}"
        if saved
        else "stopped before the first step was done; nothing is saved"
      )
      print(f"report: {page.write_report(folder)}")
      print("the same command goes on from there", flush=True)
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
      "steps": steps,
      "metrics": last,
      "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    },
  )
  hosts.barrier("the run is finished", seconds=600)
  if hosts.is_lead():
    print(f"model: {folder / 'model'}\nreport: {folder / 'report.html'}")
    print(f"next: {next_command(run.model, folder)}", flush=True)
  return 0


def next_command(model: Model, folder: pathlib.Path) -> str:
  """What to type after a finished run: a talk with what it trained."""
  name = shlex.quote(str(folder))
  if model.config.head == "lm":
    return f"python -m jaxalign.chat {name}"
  return f"python -m jaxalign.chat lab --best_of=16 --reward_model={name}"
