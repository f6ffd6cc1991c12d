"""Where a run begins that takes the weights of another: `config.init_from`.

The weights are put into the new run's own folder, as a model's folder
`start/`, so that the run can go on whatever becomes of the other one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import TypeVar

import jax
from jaxtyping import PyTree

from jaxalign.config.sections import TrainingConfig
from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.models.hf import write
from jaxalign.parallel import hosts
from jaxalign.parallel.mesh import make_mesh
from jaxalign.runtime import checkpoint, files, workdir
from jaxalign.setup import models

C = TypeVar("C", bound=TrainingConfig)

FOLDER, NOTE = "start", "start.json"


@dataclasses.dataclass(frozen=True)
class Source:
  """The run that another one begins from.

  Attributes:
    folder: of the run.
    step: of the checkpoint that is taken; -1 = the run has none any more.
    finished: whether `model/` holds these weights.
    config: its config.json.
  """

  folder: pathlib.Path
  step: int
  finished: bool
  config: JsonObject


def find_run(
  source: str | pathlib.Path,
) -> tuple[pathlib.Path | None, int | None]:
  """The run that a folder is, or is a checkpoint of, and that one's step.

  Returns:
    (None, None) for anything else; the step is None for the newest.
  """
  place = pathlib.Path(source).absolute()
  if not place.is_dir():
    return None, None
  if place.parent.name == "checkpoints" and place.name.isdigit():
    return place.parent.parent, int(place.name)
  if place.name == "checkpoints":
    return place.parent, None
  is_run = (place / "checkpoints").is_dir() or (place / "model").is_dir()
  return (place if is_run else None), None


def find_source(
  config: TrainingConfig, folder: pathlib.Path | None = None
) -> Source:
  """The run that `config.init_from` names.

  Args:
    config: of the new run.
    folder: of the new run, if it has one.

  Raises:
    UserError: it is no run, the new run itself, or has nothing to begin from.
  """
  name = config.init_from
  place, step = find_run(pathlib.Path(name).expanduser())
  mapping = None if place is None else workdir.read_config(place)
  if not os.path.exists(os.path.expanduser(name)):
    raise UserError(f"config.init_from: {name} does not exist; check the path")
  if place is None or mapping is None:
    raise UserError(
      f"config.init_from must be a run's folder or one of its checkpoints, got "
      f"{name!r}; a model's folder or a hub id is config.policy"
    )
  if folder is not None and place == folder.absolute():
    raise UserError(
      f"config.init_from names the run's own folder {folder}; give another "
      "--workdir"
    )
  # A finished run's model is its last checkpoint, which may be deleted.
  finished = workdir.read_finished(place) is not None
  finished = finished and step is None and (place / "model").is_dir()
  newest = checkpoint.newest_whole(place / "checkpoints", step)
  if newest < 0 and not finished:
    raise UserError(
      f"config.init_from: {name} has neither a finished model/ nor a whole "
      "checkpoint; run it further first"
    )
  # The optimizer's state is in checkpoints alone, and is not of an average.
  if config.init_optimizer and newest < 0:
    raise UserError(
      f"config.init_optimizer needs a checkpoint, and {name} has none any "
      "more; leave it out"
    )
  if config.init_optimizer and mapping["optimizer"].get("ema"):
    raise UserError(
      f"config.init_optimizer: {name} is judged and exported by an average of "
      "its parameters (optimizer.ema), whose optimizer state does not exist; "
      "leave it out"
    )
  if config.init_optimizer:
    _check_optimizer(config, mapping, name)
  return Source(place, newest, finished, mapping)


def with_its_model(config: C, source: Source, source_config: C) -> C:
  """The config with the model of the run that it begins from.

  For what reads no parameter: of a run that is not finished it is the model
  that it began with.

  Args:
    config: of the new run.
    source: from `find_source`.
    source_config: that run's config.
  """
  model = source.folder / "model"
  changes = {"policy": source_config.policy, "init": source_config.init}
  if model.is_dir():
    changes["policy"] = str(model)
  return dataclasses.replace(config, init_from="", **changes)


def _check_optimizer(
  config: TrainingConfig, mapping: JsonObject, name: str
) -> None:
  """Refuses a state that is not of this run's optimizer, before it is read."""
  theirs, ours = mapping["optimizer"], config.optimizer
  pairs = {
    "lora.rank": (mapping["lora"]["rank"], 0),
    "optimizer.name": (theirs["name"], ours.name),
    "optimizer.clip_norm > 0": (theirs["clip_norm"] > 0, ours.clip_norm > 0),
  }
  other = [f"{k} was {a}, now {b}" for k, (a, b) in pairs.items() if a != b]
  if other:
    raise UserError(
      f"config.init_optimizer: {name} has another optimizer: "
      f"{'; '.join(other)}; set these alike or leave init_optimizer out"
    )


def is_copied(config: TrainingConfig, folder: pathlib.Path) -> bool:
  """Whether the new run's folder has its weights already."""
  note = folder / NOTE
  if not (note.exists() and (folder / FOLDER).is_dir()):
    return False
  return json.loads(note.read_text())["init_from"] == config.init_from


def copy(
  config: TrainingConfig,
  folder: pathlib.Path,
  source: Source,
  source_config: TrainingConfig,
) -> None:
  """Puts the weights into the new run's folder.

  Args:
    config: of the new run.
    folder: of the new run.
    source: from `find_source`.
    source_config: that run's config.

  Raises:
    UserError: the weights cannot be read, or are not those that this run began
      with at an earlier start.
  """
  place, note = folder / FOLDER, folder / NOTE
  folder.mkdir(parents=True, exist_ok=True)
  # Whole or absent: written under another name first.
  draft = folder / f".{FOLDER}"
  for old in (draft, place):
    shutil.rmtree(old, ignore_errors=True)
  if source.finished:
    # Not a second copy on disk, where the file system knows links.
    shutil.copytree(source.folder / "model", draft, copy_function=_link_or_copy)
  else:
    loaded = restore(source.folder, source_config, source.step)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    write.save(
      loaded.model,
      loaded.params,
      draft,
      config=tokenizer.special_ids(),
      also=tokenizer.save,
    )
  # A run that was begun keeps what it began with, or says that it cannot.
  digest = _digest(draft)
  begun = (folder / "config.json").exists() and note.exists()
  if begun and json.loads(note.read_text())["sha256"] != digest:
    shutil.rmtree(draft)
    raise UserError(
      f"{place} is gone, and {config.init_from} is no longer what the run "
      "began with; restore one of them, or begin again with --fresh"
    )
  draft.rename(place)
  values = {"init_from": config.init_from, "step": source.step}
  files.write_json(note, values | {"sha256": digest})


def remove(folder: pathlib.Path) -> None:
  """Takes the weights of a run that did not start out of its folder again."""
  if (folder / "config.json").exists():
    return
  shutil.rmtree(folder / FOLDER, ignore_errors=True)
  (folder / NOTE).unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # it was there before, with hidden files
    folder.rmdir()


def begin(config: TrainingConfig, folder: pathlib.Path) -> TrainingConfig:
  """The config whose policy is the copied weights.

  Raises:
    UserError: they are not what the run began with.
  """
  place = folder / FOLDER

  def check() -> bool:
    note = json.loads((folder / NOTE).read_text())
    if _digest(place) != note["sha256"]:
      raise UserError(
        f"{place} is not what the run began with; restore it, or begin again "
        "with --fresh"
      )
    return True

  # The lead alone reads all of it.
  hosts.from_lead(check, True)
  return dataclasses.replace(config, policy=str(place))


def read_optimizer(folder: pathlib.Path, shapes: PyTree) -> PyTree:
  """The optimizer state of the run that a run begins from.

  Args:
    folder: of the new run.
    shapes: its own optimizer state, `jax.ShapeDtypeStruct` with shardings.

  Raises:
    UserError: it is of another optimizer or model, or is gone.
  """
  note = json.loads((folder / NOTE).read_text())
  place, _ = find_run(note["init_from"])
  found = None
  if place is not None:
    found = checkpoint.read_part(
      place / "checkpoints",
      note["step"],
      {"opt_state": shapes},
      "leave config.init_optimizer out to begin without its state",
    )
  if found is None:
    raise UserError(
      f"config.init_optimizer: checkpoint {note['step']} of "
      f"{note['init_from']} is gone; begin again with --fresh"
    )
  return found["opt_state"]


def restore(
  run_folder: pathlib.Path, config: TrainingConfig, step: int | None
) -> models.Loaded:
  """The policy of a run with the parameters of one of its checkpoints.

  Args:
    run_folder: of the run.
    config: its config.
    step: of the checkpoint; None = the newest whole one.

  Returns:
    The model; what was trained are numpy arrays, which no device has to hold.

  Raises:
    UserError: no whole checkpoint, or one of another policy.
  """
  found = checkpoint.load(run_folder / "checkpoints", "params", step=step)
  if found is None:
    raise UserError(
      f"{run_folder} has neither a finished model/ nor a whole checkpoint; "
      "run it further first"
    )
  trained, _, step = found
  # A run with an average of its parameters is judged and exported by that.
  averaged = checkpoint.load(run_folder / "checkpoints", "ema", step=step)
  if averaged is not None and averaged[0]:
    trained = averaged[0]
  trained = policy_of(trained)  # without PPO's value model

  # The base model gives the architecture, and what a LoRA run left frozen.
  if config.init_from:  # the run may have been moved since
    config = dataclasses.replace(config, policy=str(run_folder / FOLDER))
  head = getattr(config, "head", "lm")
  # On a device of this process: of several, the lead alone is here.
  mesh = make_mesh(devices=jax.local_devices()[:1])
  opened = models.open_policy(config, mesh, head)
  opened = models.with_groups(opened, getattr(config, "groups", ()))
  if opened.model.lora is not None:
    trained = lora.join(trained, lora.split(opened.read())[1])
  if _sizes(trained) != _sizes(opened.model.shapes):
    raise UserError(
      f"{run_folder}: the checkpoint's parameters are not those of the "
      "config's policy; was the policy's folder replaced?"
    )
  tokenizer = opened.tokenizer
  if config.algorithm == "reward_model" and tokenizer is not None:
    tokenizer = models.with_reward_notes(tokenizer, config)
  return models.Loaded(opened.model, trained, tokenizer, str(run_folder))


def _sizes(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.shape, tree)


def _link_or_copy(source: str, target: str) -> None:
  # Models are written under another name and renamed, so a link stays as it is.
  try:
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)


def _digest(place: pathlib.Path) -> str:
  """Of a model's weight files."""
  total = hashlib.sha256()
  for path in sorted(place.glob("*.safetensors")):
    with open(path, "rb") as file:
      total.update(hashlib.file_digest(file, "sha256").digest())
  return total.hexdigest()
