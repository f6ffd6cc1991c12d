"""A run as described: opened and checked, with no parameter read."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Generic, TypeVar

import jax
from jax.sharding import Mesh

from jaxalign.config.sections import TrainingConfig
from jaxalign.core.types import Params
from jaxalign.models import lora
from jaxalign.models.attention import Choice
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.mesh import Devices
from jaxalign.scoring.function import RewardFunction
from jaxalign.setup.example import example_of
from jaxalign.setup.models import ModelSpec, attention_of
from jaxalign.setup.rollout import RolloutSpec
from jaxalign.training.run import Dataset

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
      packed, less = "", "a smaller batch_size makes"
      if getattr(config, "packing", False):
        packed = " packed"
        less = "a smaller batch_size or max_length, or packing=false, makes"
      found.append(
        f"note: there are {rows}{packed} rows for an update of "
        f"batch_size={config.batch_size}, which takes them more than once; "
        f"{less} more updates"
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
  mesh = meshes.make_mesh(**sizes, rows=rows, devices=devices)
  meshes.check_rows(mesh, rows, field)
  meshes.check_tokens(mesh, config.max_length, "config.max_length")
  there = jax.device_count() if devices is None else len(devices)
  if there > 1 and hosts.is_lead():
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    share = f"{there}" if mesh.size == there else f"{mesh.size} of {there}"
    # What it would be if the rows had allowed it.
    whole = meshes.row_count(meshes.make_mesh(**sizes, devices=devices))
    why = ""
    if whole > meshes.row_count(mesh):
      why = f"; {field} gives {rows} rows, a multiple of {whole} uses more"
    print(f"mesh: {share} devices ({axes}){why}")
  return mesh


def digest_of_run(spec: RunSpec[C]) -> str:
  """Tells what a run reads from what others do: its rows, its functions' files.

  What these files import does not count.
  """
  digest = digest_of(spec.rows)
  return f"{digest} {digest_of(spec.files)}" if spec.files else digest


def digests_of_models(spec: RunSpec[C]) -> dict[str, str]:
  """Digests of the models that each start reads from files again.

  Models that are trained come from the checkpoint instead. The policy's files
  are read too where it is the reference or the base of adapters.
  """
  reread = spec.live_reference or bool(spec.policy.model.lora)
  found = {
    name: model.digest()
    for name, model in spec.models.items()
    if "reward_model" in name or (name == "policy" and reread)
  }
  return {name: digest for name, digest in found.items() if digest}


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
