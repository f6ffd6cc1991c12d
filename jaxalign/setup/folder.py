"""A run's folder: whose it is, what goes on in it, how it is extended."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from jaxalign import cli, paths
from jaxalign.config import to_mapping
from jaxalign.config.changes import LENGTH, MAY_CHANGE
from jaxalign.config.sections import TrainingConfig
from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.parallel import hosts
from jaxalign.runtime import (
  checkpoint,
  metrics,
  workdir,
)
from jaxalign.runtime.files import flatten
from jaxalign.setup.models import ModelSpec
from jaxalign.setup.optimizer import schedule_of
from jaxalign.setup.spec import (
  RunSpec,
  adapter_line,
  count,
  digest_of_run,
  digests_of_models,
  policy_attention,
)

C = TypeVar("C", bound=TrainingConfig)


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
  hosts.check_number()
  values = {f"config.{k}": v for k, v in flatten(to_mapping(config)).items()}
  values |= {f"--{name}": flag for name, flag in flags.items()}
  hosts.check_same(
    values
    | {
      "--workdir": str(paths.location(folder.absolute())),
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
      f"--extend: {paths.location(folder)} holds no run; "
      + (f"did you mean {found}?" if found else "name its folder by --workdir")
    )


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
    ("folder", f"{paths.location(folder)} ({state})"),
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
  spec: RunSpec[C],
  digest: str,
  digests: Mapping[str, str],
  extra: JsonObject,
  folder: pathlib.Path,
) -> None:
  """Refuses to go on on other rows, or with other models or functions.

  Args:
    spec: of the run as it is now.
    digest: its own, see `digest_of_run`.
    digests: of its models, see `digests_of_models`.
    extra: of the checkpoint to go on from.
    folder: the run's, for the message.

  Raises:
    UserError: they differ, and `checkpoint.allow_other_data` is off.
  """
  old, place = extra.get("rows", digest), paths.location(folder)
  if spec.config.checkpoint.allow_other_data:
    return
  # Checkpoints of earlier versions say nothing of the models.
  before = extra.get("models", {})
  for name, now in digests.items():
    if before.get(name, now) != now:
      raise UserError(
        f"config.{name} is no longer the model that {place} began with: a "
        "file has changed; restore it, start again in another --workdir, or "
        "continue with --config.checkpoint.allow_other_data=true"
      )
  if old == digest:
    return
  field = "config.prompts" if spec.rollout else "config.data"
  what = f"{field} no longer gives the rows of {place}: a file"
  if old.partition(" ")[0] == digest.partition(" ")[0]:
    what = f"the file of a reward function or of a judge of {place}"
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
  old, place = workdir.read_config(folder), paths.location(folder)
  assert old is not None, folder
  before, now = old["steps"], config.steps
  if now < before:
    raise UserError(
      f"--extend: config.steps must be >= {before}, the length of the run in "
      f"{place}, got {now}; raise config.steps, or config.epochs where steps "
      "follow from the data"
    )
  if now == before:
    return before
  finished = workdir.read_finished(folder) is not None
  saves = folder / "checkpoints"
  newest = checkpoint.newest_whole(saves)
  if finished and newest < 0:
    raise UserError(
      f"--extend: {place} is finished and has no checkpoint left to go on "
      f"from; begin another run with --init_from={place}"
    )
  if newest >= 0:
    extra = checkpoint.read_extra(saves, newest)
    digests = digest_of_run(spec), digests_of_models(spec)
    check_unchanged(spec, *digests, extra, folder)
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
    f"{paths.location(folder)}: extended from {before} to {now} steps, {done} "
    f"are done; the {shape} learning rate was {was:.3g} at step "
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
