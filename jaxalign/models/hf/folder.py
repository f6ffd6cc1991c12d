"""Model folders in Hugging Face's format, read and written without torch.

`open_pretrained` checks a folder and reads no parameter; `Pretrained.read`
reads tensor by tensor straight to where the parameters are kept; `save`
writes a folder that plain transformers loads.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import JsonObject, Params
from jaxalign.errors import UserError
from jaxalign.models.config import CausalConfig
from jaxalign.models.hf import hub, peft, place, table, weights
from jaxalign.models.hf.architectures import (
  ARCHITECTURES,
  Architecture,
  architecture,
)
from jaxalign.models.hf.config_json import Fields, read_config, read_json
from jaxalign.models.hf.weights import FileTensor, SafeTensor
from jaxalign.models.hf.write import save
from jaxalign.models.layers import ACTIVATIONS, LoraConfig
from jaxalign.models.lora import HEADS, LEAVES, check_targets, known
from jaxalign.models.model import Model

__all__ = [
  "Pretrained",
  "from_config",
  "generation_configs",
  "load",
  "open_pretrained",
  "save",
  "stored_dtype",
]

_PARAM_DTYPES = ("float32", "bfloat16", "float16")
# Formats that become parameters; others are quantised.
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A model folder that was checked; its parameters are still unread.

  Attributes:
    model: of the folder's config files.
    dtype: of the parameters, except adapters and drawn ones: those are
      float32, as they are small and trained.
    seed: of what is drawn.
    entries: our leaf -> its place in the files.
    tensors: our leaf -> its tensors in the files, one per layer if the leaf is
      stacked.
    drawn: the leaves that the files lack.
  """

  model: Model
  dtype: str
  seed: int
  entries: dict[str, table.Entry]
  tensors: dict[str, list[FileTensor]]
  drawn: list[str]

  @property
  def shapes(self) -> Params:
    """What `read` gives, as `jax.ShapeDtypeStruct`s."""
    found = {}
    for path, leaf in table.flatten(self.model.shapes).items():
      # What is trained beside a base in bfloat16: adapters and heads.
      trained = path.endswith(LEAVES) or (
        self.model.lora is not None and path.partition(".")[0] in HEADS
      )
      exact = path in self.drawn or trained
      dtype = jnp.dtype("float32" if exact else self.dtype)
      found[path] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    return table.unflatten(found)

  def read(self, shardings: Params | None = None) -> Params:
    """Reads the parameters, which takes the time.

    Args:
      shardings: a `Sharding` for every leaf of `model.shapes`; None = one
        device.
    """
    shapes = table.flatten(self.shapes)
    where = table.flatten(shardings) if shardings else {}
    leaves = {}
    if self.drawn:
      # One program, so that leaves which the files hold are never computed.
      def draw(key):
        every = table.flatten(self.model.init(key))
        return {path: every[path] for path in self.drawn}

      out = {path: where[path] for path in self.drawn} if where else None
      leaves = jax.jit(draw, out_shardings=out)(jax.random.key(self.seed))
    # One leaf after another: the host never holds two.
    for path, tensors in self.tensors.items():
      leaves[path] = place.place(
        tensors,
        self.entries[path].axes,
        shapes[path].shape,
        shapes[path].dtype,
        where.get(path),
      )
    # In the model's order, whichever way a leaf came.
    return table.unflatten({path: leaves[path] for path in shapes})


def load(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
) -> tuple[Model, Params]:
  """A model and its parameters on one device.

  Args and raises: as `open_pretrained`.
  """
  opened = open_pretrained(
    source, dtype=dtype, compute_dtype=compute_dtype, head=head
  )
  return opened.model, opened.read()


def open_pretrained(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
  lora: LoraConfig | None = None,
  remat: str = "none",
  seed: int = 0,
) -> Pretrained:
  """Opens a model folder: reads its config files and its weights' headers.

  Args:
    source: a folder with `config.json` and safetensors or `pytorch_model.bin`
      files; a folder with PEFT adapters, whose base is opened with them; or a
      hub id, see `hub.resolve`.
    dtype: of the parameters: "float32", "bfloat16" or "float16".
    compute_dtype: of the layers' arithmetic; None = `dtype`.
    head: "lm", "score_last", "score_eos", "score_mean" or "score_context";
      None = what the files hold. A score head that the files lack is drawn at
      random only when it is asked for here.
    lora: adapters to add, drawn at random; without targets, on those layers
      that the architecture names.
    remat: what the backward pass computes again, see `models.remat`.
    seed: of what is drawn.

  Raises:
    UserError: anything about the folder that keeps it from being loaded.
  """
  for name in (dtype, compute_dtype or dtype):
    if name not in _PARAM_DTYPES:
      raise UserError(
        f"dtype must be one of {', '.join(_PARAM_DTYPES)}, got {name!r}"
      )

  # The model, from config.json and adapter_config.json.
  folder, adapters = _folders(source)
  fields = read_config(folder)
  if fields.values.get("quantization_config"):
    raise UserError(
      f"{fields.where}: quantised weights are not supported; use a float32, "
      "float16 or bfloat16 copy of the model"
    )
  # A language model's folder becomes a score model only on request: a score
  # from drawn weights must never come unasked.
  may_draw_head = head is not None
  if head is None:
    head = fields.head
    if head == "lm" and adapters is not None and peft.is_scorer(adapters):
      head = fields.score_head
  model = from_config(fields, head, dtype=compute_dtype or dtype, remat=remat)
  tensors = weights.open_tensors(folder)
  model = _untied(model, tensors, fields.where)
  if adapters is not None:
    if lora is not None:
      raise UserError(
        f"{adapters} holds adapters already; merge them (python -m "
        "jaxalign.convert) before adding new ones"
      )
    model = Model.build(model.config, peft.read_config(adapters, model))
  elif lora is not None:
    targets = lora.targets or model.config.lora_targets
    lora = dataclasses.replace(lora, targets=targets)
    model = Model.build(model.config, lora)
    check_targets(model, "config.lora.targets")

  # The tensors, from the headers of the files.
  arch = architecture(model)
  entries = table.entries(arch.names(model.config), model.shapes)
  if adapters is not None:
    tensors |= weights.open_tensors(adapters, weights.ADAPTER_FILES)
    for path, entry in peft.entries(model).items():
      # A head is kept with the adapters, or is that of the base.
      if path not in entries or _find(entry.name, arch, tensors):
        entries[path] = entry

  # Each leaf's tensors, and the leaves that have none.
  matched: dict[str, list[FileTensor]] = {}
  drawn: list[str] = []
  for path, leaf in table.flatten(model.shapes).items():
    entry = entries.get(path)
    if entry is None or (
      may_draw_head
      and path.startswith(arch.HEADS)
      and not _find(entry.name, arch, tensors)
    ):
      drawn.append(path)  # adapters and heads
      continue
    expected = entry.file_shape(leaf.shape)
    matched[path] = []
    for name in entry.names(leaf.shape):
      tensor = _find(name, arch, tensors)
      if tensor is None and path.startswith(arch.HEADS):
        raise UserError(
          f"{adapters or folder}: tensor {name} of the score head is missing, "
          "and a drawn one would score at random; train one with "
          "configs/reward_model.py, or give the folder that holds it"
        )
      if tensor is None and name.startswith(peft.PREFIX):
        raise UserError(
          f"{adapters}: tensor {name} is missing; target_modules of "
          "adapter_config.json asks for it (the base may be another model)"
        )
      if tensor is None:
        raise UserError(
          f"{folder}: tensor {name} is missing; config.json asks for it (its "
          "sizes or architecture may be another model's)"
        )
      if tensor.shape != expected:
        raise UserError(
          f"{tensor.path}: {name} has shape {list(tensor.shape)}, config.json "
          f"asks for {list(expected)}; one of the two is another model's"
        )
      matched[path].append(tensor)
  # What no leaf has taken must be known to be of no use.
  used = {tensor.name for leaf in matched.values() for tensor in leaf}
  _refuse_unknown(folder, model, arch, tensors.keys() - used, tensors)
  return Pretrained(model, dtype, seed, entries, matched, drawn)


def _untied(
  model: Model, tensors: Mapping[str, FileTensor], where: str
) -> Model:
  """The model, with an output matrix of its own where the files hold one.

  Some trainers save another output matrix and leave `tie_word_embeddings` on;
  transformers 5 then reads it as well.
  """
  if model.config.head != "lm" or not getattr(model.config, "tied", False):
    return model
  arch = architecture(model)
  # Where the files would hold a separate output matrix.
  untied = Model.build(dataclasses.replace(model.config, tied=False))
  entries = table.entries(arch.names(untied.config), untied.shapes)
  output, embedding = (
    _find(entries[path].name, arch, tensors)
    for path in ("lm_head.embedding", "embedding.embedding")
  )
  if output is None or embedding is None or _equal(output, embedding):
    return model
  print(
    f"{where}: tie_word_embeddings is on, but {output.path.name} holds another "
    f"{output.name}, which is used"
  )
  return untied


def _equal(a: FileTensor, b: FileTensor) -> bool:
  """Whether two matrices hold the same numbers; some rows at a time."""
  # A part of a .bin file costs as much to read as all of it.
  whole = not isinstance(a, SafeTensor) or not isinstance(b, SafeTensor)
  # There two names often share one storage.
  if whole and a == dataclasses.replace(b, name=a.name):
    return True
  step = a.shape[0] if whole else 8192
  return a.shape == b.shape and all(
    np.array_equal(a.read(part), b.read(part))
    for start in range(0, a.shape[0], step)
    for part in [(slice(start, min(start + step, a.shape[0])),)]
  )


def from_config(fields: Fields, head: str, *, dtype: str, remat: str) -> Model:
  """The model that a `config.json` describes.

  Args:
    fields: of the file.
    head: "lm", "score_last", ...
    dtype: of the layers' arithmetic.
    remat: what the backward pass computes again, see `models.remat`.

  Raises:
    UserError: an unknown architecture or head, sizes that do not fit.
  """
  arch = ARCHITECTURES.get(fields.model_type)
  if arch is None:
    raise UserError(
      f"{fields.where}: model_type {fields.model_type!r} is not supported; "
      f"supported are {', '.join(sorted(ARCHITECTURES))}"
    )
  if head not in arch.CLASSES:
    hint = "" if head == "lm" else "; --config.head=auto takes its own"
    raise UserError(
      f"{fields.where}: head {head!r} does not exist for {fields.model_type}; "
      f"it has {', '.join(arch.CLASSES)}{hint}"
    )
  # Only a score head has a column for each group.
  groups = () if head == "lm" else fields.groups
  config = arch.from_hf(
    fields, head=head, groups=groups, dtype=dtype, remat=remat
  )

  fields.refuse_others()

  # Sizes that the layers would otherwise fail over in the middle of a trace.
  if config.activation not in ACTIVATIONS:
    raise UserError(
      f"{fields.where}: activation {config.activation!r} is not supported; "
      f"supported are {', '.join(ACTIVATIONS)}"
    )
  # Where head_dim is a field, heads need not share the width evenly.
  has_head_dim = "head_dim" in {f.name for f in dataclasses.fields(config)}
  width, heads = config.hidden_size, config.heads
  if not has_head_dim and width % heads:
    raise UserError(
      f"{fields.where}: hidden_size {width} cannot be split over {heads} heads"
    )
  rotated = int(config.head_dim * getattr(config, "rotary_fraction", 1))
  # An odd part is rounded up, which a whole head has no room for.
  if (
    hasattr(config, "rotary_base")
    and rotated % 2
    and rotated >= config.head_dim
  ):
    raise UserError(
      f"{fields.where}: all {rotated} features of a head are rotated in pairs; "
      "their number must be even"
    )
  if isinstance(config, CausalConfig) and heads % config.kv_heads:
    raise UserError(
      f"{fields.where}: num_attention_heads {heads} must be a multiple of "
      f"num_key_value_heads {config.kv_heads}"
    )
  return Model.build(config)


def generation_configs(
  source: str | pathlib.Path,
) -> tuple[JsonObject, JsonObject]:
  """A model's `generation_config.json`, {} if absent, and `config.json`.

  Of adapters those of their base.
  """
  place = _folders(source)[0]
  path = place / "generation_config.json"
  return read_json(path) if path.is_file() else {}, read_config(place).values


def stored_dtype(source: str | pathlib.Path) -> str:
  """Number format of a folder's largest tensor, one that `load` takes."""
  tensors = weights.open_tensors(_folders(source)[0])
  # Small tensors, such as norms, may be kept in another format.
  largest = max(tensors.values(), key=lambda tensor: math.prod(tensor.shape))
  return {"BF16": "bfloat16", "F16": "float16"}.get(largest.dtype, "float32")


def _folders(
  source: str | pathlib.Path,
) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The folder of the whole model, and that of adapters to it or None."""
  folder = hub.resolve(source)
  # A folder with a config.json is a whole model, whatever else it holds.
  if (folder / "config.json").is_file() or not peft.is_adapters(folder):
    return folder, None
  return hub.resolve(peft.base(folder)), folder


def _find(
  name: str, arch: Architecture, tensors: Mapping[str, FileTensor]
) -> FileTensor | None:
  """The tensor of this name, or of one that other files use for it.

  Some files hold the bare backbone (`AutoModel`), others wrap it as `model`
  (SuperHF's reward models).

  Raises:
    UserError: its numbers are quantised.
  """
  # PEFT's prefix is taken off, so that the aliases hold for adapters too.
  prefix = peft.PREFIX if name.startswith(peft.PREFIX) else ""
  name = name.removeprefix(prefix)
  # In full, without the backbone's prefix, and under `model`.
  bare = name.removeprefix(arch.BASE)
  names = [name] if bare == name else [name, bare, f"model.{bare}"]
  for theirs, other in arch.ALIASES:
    if name.startswith(theirs):
      names.append(other + name.removeprefix(theirs))
  for candidate in names:
    tensor = tensors.get(prefix + candidate)
    if tensor is None:
      continue
    if tensor.dtype not in _FLOATS:
      raise UserError(
        f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}; quantised "
        "weights are not supported, use a float32, float16 or bfloat16 copy"
      )
    return tensor
  return None


def _refuse_unknown(
  folder: pathlib.Path,
  model: Model,
  arch: Architecture,
  unused: set[str],
  tensors: Mapping[str, FileTensor],
) -> None:
  """An unknown tensor means that the model is not what config.json says."""
  # Buffers and the heads of other tasks are expected.
  ignored = re.compile("|".join(arch.IGNORED))
  unknown = sorted(name for name in unused if not ignored.search(name))
  if not unknown:
    return
  first = unknown[0]
  if first.startswith(peft.PREFIX):
    raise UserError(
      f"{tensors[first].path}: {first} has no place; adapters can be on "
      f"{known(model)}; merge others with peft and load the whole model"
    )
  raise UserError(
    f"{folder}: {len(unknown)} tensors have no place in the model of "
    f"config.json, the first is {first}; is it another model's file?"
  )
