"""Writes a model as a folder that plain transformers loads."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import paths
from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.config import CausalConfig
from jaxalign.models.hf import table
from jaxalign.models.hf.architectures import architecture
from jaxalign.models.hf.config_json import (
  REGRESSION,
  JsonObject,
  read_config,
  read_json,
)
from jaxalign.models.lora import WEIGHTS, merged
from jaxalign.models.model import Model

SHARD_BYTES = 5_000_000_000  # as transformers 4 does by default


def save(
  model: Model,
  params: Params,
  folder: str | pathlib.Path,
  *,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  config: JsonObject | None = None,
  also: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes `config.json` and safetensors; every process calls it.

  The folder is written under another name and renamed at the end, so it is
  whole or absent. One parameter at a time is on the host, of one layer where
  parameters are spread over several hosts.

  Args:
    model: its adapters, if it has any, are merged into the weights.
    params: its parameters, on one device or sharded.
    folder: replaced if it holds a model, refused if it holds other files.
    dtype: of the file's tensors; None = that of the parameters.
    shard_bytes: the most bytes of tensors in one file.
    config: further fields of `config.json`, such as `pad_token_id`.
    also: writes more files (tokenizer, model card) into the folder that it
      is given, before the renaming.

  Raises:
    UserError: the folder holds other files, or cannot be written.
  """
  # Planning each tensor's place, from the shapes alone.
  leaves = table.flatten(params)
  number = jnp.dtype(dtype or leaves["embedding.embedding"].dtype)
  entries = table.entries(architecture(model).names(model.config), model.shapes)
  plan = plan_files(entries, model.shapes, number, shard_bytes)
  # A generator: a leaf comes to the host when its turn to be written comes.
  tensors = ((path, _merged(model, leaves, path)) for path in plan.entries)
  if jax.process_index() > 0:
    # Only the first process writes; the others take part in the gathering.
    for path, leaf in tensors:
      for _ in _on_host(leaf, stacked=plan.entries[path].stacked):
        pass
    return
  with replacing(pathlib.Path(folder)) as new:
    values = config_values(model, str(number)) | (config or {})
    _set_pad(values, model)
    write_json(new / "config.json", values)
    # Several files need an index that says which of them holds a tensor.
    if len(plan.headers) > 1:
      total = {"total_size": plan.tensor_bytes}
      index = {"metadata": total, "weight_map": plan.files}
      write_json(new / "model.safetensors.index.json", index)
    write_tensors(tensors, plan, new)
    if also is not None:
      also(new)


def config_values(model: Model, dtype: str) -> JsonObject:
  """What `config.json` says of a model whose file tensors have this dtype."""
  arch, config = architecture(model), model.config
  values = {
    "architectures": [arch.CLASSES[config.head]],
    "model_type": arch.MODEL_TYPE,
    **arch.to_hf(config),
    "dtype": dtype,
  }
  if isinstance(config, CausalConfig):
    known = 0 <= config.pad_id < config.vocab_size
    # null where there is none: absent means another id to some architectures.
    values["pad_token_id"] = config.pad_id if known else None
  if config.head != "lm":
    # transformers counts the labels in this table; a score is one label.
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


def _set_pad(values: JsonObject, model: Model) -> None:
  """Keeps the score of a classifier where transformers reads it.

  It passes over the pad token at a text's end, whatever the tokenizer says.
  """
  config = model.config
  if not isinstance(config, CausalConfig) or config.head != "score_last":
    return
  ends = values.get("eos_token_id")
  ends = ends if isinstance(ends, list) else [ends]
  if 0 <= config.pad_id < config.vocab_size:
    values["pad_token_id"] = config.pad_id
  elif values.get("pad_token_id") in ends:
    values["pad_token_id"] = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which tensor goes into which file, and where.

  The format is a length, a JSON header and raw bytes. The safetensors library
  writes a file only from all of its tensors at once, which would put a whole
  file on the host; so the headers are made here and tensors follow one by one.

  Attributes:
    entries: our leaf -> its entry.
    dtype: of all tensors.
    headers: file name -> everything before its first tensor.
    files: tensor name -> file name.
    offsets: tensor name -> byte of its file at which it starts.
    tensor_bytes: all tensors together.
  """

  entries: dict[str, table.Entry]
  dtype: np.dtype
  headers: dict[str, bytes]
  files: dict[str, str]
  offsets: dict[str, int]
  tensor_bytes: int


def plan_files(
  entries: dict[str, table.Entry],
  shapes: Params,
  dtype: np.dtype,
  shard_bytes: int = SHARD_BYTES,
  stem: str = "model",
) -> Plan:
  """Spreads tensors over files of at most `shard_bytes` each."""
  # Placing the tensors one after another.
  leaves = table.flatten(shapes)
  kind = next(name for name, known in table.DTYPES.items() if known == dtype)
  # One dict per file: tensor name -> its entry in the header.
  shards: list[dict[str, JsonObject]] = [{}]
  size = total = 0
  for path, entry in entries.items():
    shape = entry.file_shape(leaves[path].shape)
    tensor_bytes = math.prod(shape) * dtype.itemsize
    for name in entry.names(leaves[path].shape):
      # A tensor that is larger than the limit has a file of its own.
      if shards[-1] and size + tensor_bytes > shard_bytes:
        shards.append({})
        size = 0
      ends = [size, size + tensor_bytes]
      shards[-1][name] = {
        "dtype": kind,
        "shape": list(shape),
        "data_offsets": ends,
      }
      size += tensor_bytes
      total += tensor_bytes

  # Writing the headers. Their file names hold the number of files, which is
  # known only now.
  headers, files, offsets = {}, {}, {}
  for number, shard in enumerate(shards, 1):
    file = f"{stem}.safetensors"
    if len(shards) > 1:
      file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    fields = {"__metadata__": {"format": "pt"}, **shard}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    headers[file] = len(text).to_bytes(8, "little") + text
    for name, fields in shard.items():
      files[name] = file
      offsets[name] = len(headers[file]) + fields["data_offsets"][0]
  return Plan(entries, dtype, headers, files, offsets, total)


def write_tensors(
  leaves: Iterable[tuple[str, jax.Array | np.ndarray]],
  plan: Plan,
  folder: pathlib.Path,
) -> None:
  """Writes leaves, given as (path, array), to their places in the files."""
  with contextlib.ExitStack() as stack:
    files = {}
    for name, header in plan.headers.items():
      files[name] = stack.enter_context((folder / name).open("wb"))
      files[name].write(header)
    for path, leaf in leaves:
      entry = plan.entries[path]
      # The file has one tensor for each layer of a stacked leaf.
      layers = _on_host(leaf, stacked=entry.stacked)
      for name, tensor in zip(entry.names(leaf.shape), layers, strict=True):
        if entry.axes:  # argsort undoes a transposition
          tensor = tensor.transpose(np.argsort(entry.axes))
        file = files[plan.files[name]]
        file.seek(plan.offsets[name])
        # As bytes: a bfloat16 array has no buffer that `write` accepts.
        raw = np.ascontiguousarray(tensor, plan.dtype).view(np.uint8)
        file.write(raw.data)
    # On the disk before the folder is renamed.
    for file in files.values():
      file.flush()
      os.fsync(file.fileno())


def _merged(
  model: Model, leaves: dict[str, jax.Array | np.ndarray], path: str
) -> jax.Array | np.ndarray:
  """A leaf, its adapter merged in."""
  leaf = leaves[path]
  module, _, name = path.rpartition(".")
  a = leaves.get(f"{module}.lora_a")
  if model.lora and a is not None and name in WEIGHTS:
    leaf = merged(leaf, a, leaves[f"{module}.lora_b"], model.lora.scale, name)
  return leaf


def _on_host(
  leaf: jax.Array | np.ndarray, *, stacked: bool
) -> Iterator[np.ndarray]:
  """The tensors of a leaf, one after another; every process takes part."""
  if not stacked:
    yield fetch(leaf)
  elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    # All layers of a large model are too much for each host.
    for layer in range(len(leaf)):
      yield fetch(leaf[layer])
  else:
    yield from fetch(leaf)


def fetch(leaf: jax.Array | np.ndarray) -> np.ndarray:
  """A whole array on this host, gathered if it is sharded over several."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(jax.device_get(leaf))


def check_target(folder: pathlib.Path) -> None:
  """UserError if `folder` is a file or holds something other than a model."""
  paths.refuse_remote(folder, "a model's folder", "write it here and copy it")
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; name a folder to write the model to")
  if not folder.is_dir() or not any(folder.iterdir()):
    return
  # A run has a config.json too, which names its method and no architecture.
  has_config = (folder / "config.json").is_file()
  if has_config and "algorithm" in read_json(folder / "config.json"):
    raise UserError(
      f"{folder} holds a run, not a model; name a new or empty folder"
    )
  is_model = has_config and read_config(folder).model_type
  if not is_model and not (folder / "adapter_config.json").is_file():
    raise UserError(
      f"{folder} holds files that are not a model; name a new or empty folder"
    )


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder that takes `folder`'s place when the block succeeds.

  Raises:
    UserError: `folder` is a file or holds something other than a model, or
      the disk is full.
  """
  check_target(folder)
  # In the same parent: a renaming cannot cross file systems.
  new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
  old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
  try:
    new.mkdir(parents=True)
    yield new
    # A folder cannot be renamed onto another one, so the old one steps aside.
    if folder.is_dir():
      folder.rename(old)
    try:
      new.rename(folder)
    except BaseException:
      # Also after an interrupt: the old model gets its name back.
      if old.is_dir():
        old.rename(folder)
      raise
  except OSError as error:
    raise UserError(
      f"{folder} cannot be written: {error.strerror}; what it held is kept; "
      "give it room, or name another folder"
    ) from error
  finally:
    # After a success `new` is gone, and `old` is what it replaced.
    shutil.rmtree(new, ignore_errors=True)
    # Interrupted between the two renamings, the old folder is all there is.
    if folder.is_dir():
      shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
      old.rename(folder)


def write_json(path: pathlib.Path, values: JsonObject) -> None:
  """An object as indented JSON with a final newline."""
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
