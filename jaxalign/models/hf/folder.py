"""Model folders in Hugging Face's format, read and written without torch.

`load` reads tensor by tensor straight to where the parameters live; `save`
writes a folder that plain transformers loads.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.hf import hub, peft, place, table, weights
from jaxalign.models.hf.architectures import ARCHITECTURES, architecture
from jaxalign.models.hf.fields import Fields, read_config
from jaxalign.models.hf.safetensors import Stored
from jaxalign.models.hf.write import save
from jaxalign.models.layers import ACTIVATIONS, LoraConfig
from jaxalign.models.lora import LEAVES, check_targets, known
from jaxalign.models.model import Model

__all__ = ["describe", "load", "prepare", "save", "stored_dtype"]

_DTYPES = ("float32", "bfloat16", "float16")


def load(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
  lora: LoraConfig | None = None,
  shardings: Callable[[Params], Params] | None = None,
  remat: bool = False,
  seed: int = 0,
  stage_bytes: int | None = None,
) -> tuple[Model, Params]:
  """A model and its parameters.

  Args:
    source: a folder with `config.json` and safetensors or `pytorch_model.bin`
      files; a folder with PEFT adapters, whose base is loaded with them; or a
      hub id, see `hub.resolve`.
    dtype: of the parameters: "float32", "bfloat16" or "float16". Adapters and
      a head that is drawn are float32 always: small, and what is trained.
    compute_dtype: of the layers' arithmetic; None = `dtype`.
    head: "lm", "score_last", "score_eos", "score_mean" or "score_context";
      None = what the files hold. A score head that the files lack is drawn at
      random only when it is asked for here.
    lora: adapters to add, drawn afresh.
    shardings: model shapes -> a `Sharding` for every leaf; None = one device.
    remat: recompute activations in the backward pass.
    seed: of what is drawn.
    stage_bytes: see `place.place`.

  Raises:
    UserError: anything about the folder that keeps it from being loaded.
  """
  model, read = prepare(
    source,
    dtype=dtype,
    compute_dtype=compute_dtype,
    head=head,
    lora=lora,
    shardings=shardings,
    remat=remat,
    seed=seed,
    stage_bytes=stage_bytes,
  )
  return model, read()


def prepare(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
  lora: LoraConfig | None = None,
  shardings: Callable[[Params], Params] | None = None,
  remat: bool = False,
  seed: int = 0,
  stage_bytes: int | None = None,
) -> tuple[Model, Callable[[], Params]]:
  """A model, and what reads its parameters, which takes the time.

  Everything that is wrong with a folder shows here, from its config files and
  the headers of its weights.

  Args and raises: as `load`.
  """
  if dtype not in _DTYPES:
    raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
  model = describe(
    source, dtype=compute_dtype or dtype, head=head, lora=lora, remat=remat
  )
  folder, adapters = _folders(source)
  arch, tensors = architecture(model), weights.open_folder(folder)
  entries = table.entries(arch.names(model.config), model.shapes)
  if adapters is not None:
    tensors |= weights.open_adapters(adapters)
    entries |= {
      path: entry
      for path, entry in peft.entries(model).items()
      if path not in entries or _has(entry, arch, tensors)
    }
  found, drawn = _match(folder, model, entries, tensors, bool(head or adapters))

  def read() -> Params:
    where = table.flatten(shardings(model.shapes)) if shardings else {}
    params = _draw(model, drawn, where, seed)
    shapes = table.flatten(model.shapes)
    for path, stored in found.items():
      axes, shape = entries[path].axes, shapes[path].shape
      spot, number = where.get(path), jnp.dtype(dtype)
      if path.endswith(LEAVES):
        number = jnp.dtype("float32")
      params[path] = place.place(stored, axes, shape, number, spot, stage_bytes)
    return table.unflatten({path: params[path] for path in shapes})

  return model, read


def describe(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  head: str | None = None,
  lora: LoraConfig | None = None,
  remat: bool = False,
) -> Model:
  """The model of a folder's config files; reads no weights.

  Args:
    source: as in `load`.
    dtype: compute dtype.
    head: as in `load`.
    lora: as in `load`.
    remat: as in `load`.

  Raises:
    UserError: as `load`, as far as the config shows it.
  """
  if dtype not in _DTYPES:
    raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
  folder, adapters = _folders(source)
  fields = read_config(folder)
  if fields.values.get("quantization_config"):
    raise UserError(
      f"{fields.where}: quantised weights are not supported; use a float32, "
      "float16 or bfloat16 copy of the model"
    )
  if head is None:
    head = fields.head
    if head == "lm" and adapters is not None and peft.is_scorer(adapters):
      head = fields.score_head
  model = assemble(fields, head, dtype=dtype, remat=remat)
  if adapters is not None:
    if lora is not None:
      raise UserError(
        f"{adapters} holds adapters already; merge them (python -m "
        "jaxalign.convert) before adding new ones"
      )
    return Model.build(model.config, peft.read_config(adapters, model))
  model = Model.build(model.config, lora) if lora else model
  check_targets(model, "config.lora.targets")
  return model


def assemble(fields: Fields, head: str, *, dtype: str, remat: bool) -> Model:
  """The model of a config file's values.

  Args:
    fields: of a `config.json`.
    head: "lm", "score_last", ...
    dtype: compute dtype.
    remat: as in `load`.

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
    raise UserError(
      f"{fields.where}: head {head!r} does not exist for {fields.model_type}; "
      f"it has {', '.join(arch.CLASSES)}"
    )
  groups = () if head == "lm" else fields.groups
  config = arch.from_hf(
    fields, head=head, groups=groups, dtype=dtype, remat=remat
  )
  _check_sizes(fields.where, config)
  return Model.build(config)


def _check_sizes(where: str, config: Any) -> None:
  """What the layers would otherwise stumble over in the middle of a trace."""
  if config.activation not in ACTIVATIONS:
    raise UserError(
      f"{where}: activation {config.activation!r} is not supported; supported "
      f"are {', '.join(ACTIVATIONS)}"
    )
  own_width = "head_dim" in {f.name for f in dataclasses.fields(config)}
  width, heads = config.hidden_size, config.heads
  if not own_width and width % heads:
    raise UserError(
      f"{where}: hidden_size {width} cannot be split over {heads} heads"
    )
  rotated = int(config.head_dim * getattr(config, "rotary_fraction", 1))
  # An odd part is rounded up, which a whole head has no room for.
  if (
    hasattr(config, "rotary_base")
    and rotated % 2
    and rotated >= config.head_dim
  ):
    raise UserError(
      f"{where}: all {rotated} features of a head are rotated in pairs; their "
      "number must be even"
    )
  if heads % getattr(config, "kv_heads", heads):
    raise UserError(
      f"{where}: num_attention_heads {heads} must be a multiple of "
      f"num_key_value_heads {config.kv_heads}"
    )


def stored_dtype(source: str | pathlib.Path) -> str:
  """Number format of a folder's largest tensor, one that `load` takes."""
  tensors = weights.open_folder(_folders(source)[0])
  largest = max(tensors.values(), key=lambda stored: math.prod(stored.shape))
  return {"BF16": "bfloat16", "F16": "float16"}.get(largest.dtype, "float32")


def _folders(
  source: str | pathlib.Path,
) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The folder of the whole model, and that of adapters to it or None."""
  folder = hub.resolve(source)
  if (folder / "config.json").is_file() or not peft.is_adapters(folder):
    return folder, None
  return hub.resolve(peft.base(folder)), folder


def _match(
  folder: pathlib.Path,
  model: Model,
  entries: dict[str, table.Entry],
  tensors: dict[str, Stored],
  draw_head: bool,
) -> tuple[dict[str, list[Stored]], list[str]]:
  """Each leaf's file tensors, and the leaves that are to be drawn."""
  arch = architecture(model)
  found, drawn = {}, []
  for path, leaf in table.flatten(model.shapes).items():
    entry = entries.get(path)
    if entry is None or (
      draw_head
      and path.startswith(arch.HEADS)
      and not _has(entry, arch, tensors)
    ):
      drawn.append(path)
    else:
      found[path] = _sources(folder, arch, entry, leaf.shape, tensors)
  _refuse_extra(folder, model, tensors, found)
  return found, drawn


def _candidates(name: str, arch: ModuleType) -> list[str]:
  """Names under which a tensor may stand, the usual one first.

  Some files hold the bare backbone (`AutoModel`), others wrap it as `model`
  (SuperHF's reward models).
  """
  prefix = peft.PREFIX if name.startswith(peft.PREFIX) else ""
  name = name.removeprefix(prefix)
  bare = name.removeprefix(arch.BASE)
  names = [name] if bare == name else [name, bare, f"model.{bare}"]
  for theirs, other in arch.ALIASES:
    if name.startswith(theirs):
      names.append(other + name.removeprefix(theirs))
  return [prefix + name for name in names]


def _has(entry: table.Entry, arch: ModuleType, tensors) -> bool:
  names = _candidates(entry.name, arch)
  return any(name in tensors for name in names)


def _sources(
  folder: pathlib.Path,
  arch: ModuleType,
  entry: table.Entry,
  shape: tuple[int, ...],
  tensors: dict[str, Stored],
) -> list[Stored]:
  """The layers of a leaf, or its one tensor; shapes checked."""
  layers, expected = table.theirs(entry, shape)
  sources = []
  for name in table.layer_names(entry, layers):
    stored = weights.find(tensors, _candidates(name, arch))
    if stored is None:
      raise UserError(
        f"{folder}: tensor {name} is missing; config.json asks for it (its "
        "sizes or architecture may be another model's)"
      )
    if stored.shape != expected:
      raise UserError(
        f"{stored.where}: {name} has shape {list(stored.shape)}, config.json "
        f"asks for {list(expected)}; one of the two is another model's"
      )
    sources.append(stored)
  return sources


def _refuse_extra(folder, model, tensors, found) -> None:
  """An unknown tensor means that the model is not what config.json says."""
  used = {id(stored) for sources in found.values() for stored in sources}
  ignored = re.compile("|".join(architecture(model).IGNORED))
  extra = [
    name
    for name, stored in tensors.items()
    if id(stored) not in used and not ignored.search(name)
  ]
  if not extra:
    return
  first = min(extra)
  if first.startswith(peft.PREFIX):
    raise UserError(
      f"{tensors[first].where}: {first} has no place; adapters can be on "
      f"{known(model)}; merge others with peft and load the whole model"
    )
  raise UserError(
    f"{folder}: {len(extra)} tensors have no place in the model of "
    f"config.json, the first is {first}; is it another model's file?"
  )


def _draw(model, paths, where, seed) -> dict[str, Any]:
  """Random leaves: adapters, and a score head that the files lack."""
  if not paths:
    return {}

  def make(key):
    leaves = table.flatten(model.init(key))
    return {path: leaves[path] for path in paths}

  shardings = {path: where[path] for path in paths} if where else None
  return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
