"""Writes a model as a folder that plain transformers loads."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.hf import safetensors, table
from jaxalign.models.hf.architectures import architecture
from jaxalign.models.hf.fields import REGRESSION
from jaxalign.models.lora import WEIGHTS, merged
from jaxalign.models.model import Model

SHARD_BYTES = 5_000_000_000


def save(
  model: Model,
  params: Params,
  folder: str | pathlib.Path,
  *,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  config: dict[str, Any] | None = None,
  also: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes `config.json` and safetensors; every process calls it.

  The folder is written under another name and renamed at the end, so it is
  whole or absent. One parameter at a time is on the host.

  Args:
    model: its adapters, if it has any, are merged into the weights.
    params: its parameters, on one device or sharded.
    folder: replaced if it holds a model, refused if it holds other files.
    dtype: of the file's tensors; None = that of the parameters.
    shard_bytes: bytes of tensors above which another file is begun.
    config: further fields of `config.json`, such as `pad_token_id`.
    also: writes more files (tokenizer, model card) into the folder that it
      is given, before the renaming.

  Raises:
    UserError: the folder holds other files, or cannot be written.
  """
  leaves = table.flatten(params)
  number = jnp.dtype(dtype or leaves["embedding.embedding"].dtype)
  entries = table.entries(architecture(model).names(model.config), model.shapes)
  plan = plan_files(entries, model.shapes, number, shard_bytes)
  tensors = ((path, _host(model, leaves, path)) for path in plan.entries)
  if jax.process_index() > 0:
    for _ in tensors:  # takes part in the gathering
      pass
    return
  with replacing(pathlib.Path(folder)) as new:
    values = config_json(model, str(number)) | (config or {})
    write_json(new / "config.json", values)
    if len(plan.layouts) > 1:
      total = sum(layout.tensor_bytes for layout in plan.layouts.values())
      index = {"metadata": {"total_size": total}, "weight_map": plan.files}
      write_json(new / "model.safetensors.index.json", index)
    write_tensors(tensors, plan, new)
    if also is not None:
      also(new)


def config_json(model: Model, dtype: str) -> dict[str, Any]:
  """The `config.json` of a model whose file tensors have this dtype."""
  arch, config = architecture(model), model.config
  values = {
    "architectures": [arch.CLASSES[config.head]],
    "model_type": arch.MODEL_TYPE,
    **arch.to_hf(config),
    "dtype": dtype,
  }
  if config.head != "lm":
    names = config.groups or ("LABEL_0",)
    values["id2label"] = {str(i): name for i, name in enumerate(names)}
    values["label2id"] = {name: i for i, name in enumerate(names)}
  if config.groups:
    values["problem_type"] = REGRESSION
  if config.head in ("score_eos", "score_mean"):
    # transformers has no class that reads there; it loads these weights but
    # scores at the last token.
    values["jaxalign_head"] = config.head
  return values


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which tensor goes into which file, and where.

  Attributes:
    entries: our leaf -> its entry.
    dtype: of all tensors.
    files: tensor name -> file name.
    layouts: file name -> where its tensors stand.
  """

  entries: dict[str, table.Entry]
  dtype: np.dtype
  files: dict[str, str]
  layouts: dict[str, safetensors.Layout]


def plan_files(
  entries: dict[str, table.Entry],
  shapes: Params,
  dtype: np.dtype,
  shard_bytes: int = SHARD_BYTES,
  stem: str = "model",
) -> Plan:
  """Spreads tensors over files of at most `shard_bytes` each."""
  leaves = table.flatten(shapes)
  shards: list[dict[str, Any]] = [{}]
  size = 0
  for path, entry in entries.items():
    layers, shape = table.theirs(entry, leaves[path].shape)
    tensor_bytes = math.prod(shape) * dtype.itemsize
    for name in table.layer_names(entry, layers):
      if shards[-1] and size + tensor_bytes > shard_bytes:
        shards.append({})
        size = 0
      shards[-1][name] = (shape, dtype)
      size += tensor_bytes
  files = [f"{stem}.safetensors"]
  if len(shards) > 1:
    total = len(shards)
    numbers = range(1, total + 1)
    files = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in numbers]
  layouts = {
    file: safetensors.layout(shard)
    for file, shard in zip(files, shards, strict=True)
  }
  where = {
    name: file for file, layout in layouts.items() for name in layout.offsets
  }
  return Plan(entries, dtype, where, layouts)


def write_tensors(
  tensors: Iterable[tuple[str, np.ndarray]], plan: Plan, folder: pathlib.Path
) -> None:
  """Writes leaves, given as (path, array), to their places in the files."""
  with contextlib.ExitStack() as stack:
    files = {}
    for name, layout in plan.layouts.items():
      files[name] = stack.enter_context((folder / name).open("wb"))
      files[name].write(layout.header)
    for path, leaf in tensors:
      entry = plan.entries[path]
      layers, _ = table.theirs(entry, leaf.shape)
      names = table.layer_names(entry, layers)
      for name, tensor in zip(names, leaf if layers else [leaf], strict=True):
        if entry.axes:
          tensor = tensor.transpose(np.argsort(entry.axes))
        file = plan.files[name]
        files[file].seek(plan.layouts[file].offsets[name])
        raw = np.ascontiguousarray(tensor, plan.dtype).view(np.uint8)
        files[file].write(raw.data)
    for file in files.values():
      file.flush()
      os.fsync(file.fileno())


def _host(model: Model, leaves: dict[str, Any], path: str) -> np.ndarray:
  """A leaf on this host, its adapter merged in."""
  leaf = leaves[path]
  module, _, name = path.rpartition(".")
  a = leaves.get(f"{module}.lora_a")
  if model.lora and a is not None and name in WEIGHTS:
    leaf = merged(leaf, a, leaves[f"{module}.lora_b"], model.lora.scale, name)
  return fetch(leaf)


def fetch(leaf: Any) -> np.ndarray:
  """A whole array on this host, gathered from all of them if need be."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(jax.device_get(leaf))


def check_target(folder: pathlib.Path) -> None:
  """UserError if `folder` is a file or holds something other than a model."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; name a folder to write the model to")
  occupied = folder.is_dir() and any(folder.iterdir())
  if occupied and not any(
    (folder / name).is_file() for name in ("config.json", "adapter_config.json")
  ):
    raise UserError(
      f"{folder} holds files that are no model; name a new or empty folder"
    )


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder that takes `folder`'s place when the block is left well.

  Raises:
    UserError: `folder` is a file or holds something other than a model, or
      the disk is full.
  """
  check_target(folder)
  new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
  old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
  try:
    new.mkdir(parents=True)
    yield new
    if folder.is_dir():
      folder.rename(old)
    try:
      new.rename(folder)
    except BaseException:
      if old.is_dir():
        old.rename(folder)
      raise
  except OSError as error:
    raise UserError(
      f"{folder} cannot be written: {error.strerror}; what it held is kept; "
      "give it room, or name another folder"
    ) from error
  finally:
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """An object as indented JSON with a final newline."""
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
