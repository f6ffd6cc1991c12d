"""The tensors of a model folder, whatever files they are spread over."""

import pathlib
import zipfile
from collections.abc import Mapping, Sequence

from jaxalign.errors import UserError, explained
from jaxalign.models.hf import safetensors, torch_zip
from jaxalign.models.hf.fields import read_json
from jaxalign.models.hf.safetensors import Stored

FLOATS = ("F64", "F32", "F16", "BF16")

_READERS = {
  "model.safetensors": safetensors.open_file,
  "pytorch_model.bin": torch_zip.open_file,
}
_ADAPTERS = {
  "adapter_model.safetensors": safetensors.open_file,
  "adapter_model.bin": torch_zip.open_file,
}


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a folder, single or sharded; reads headers alone.

  Raises:
    UserError: no weights, or a shard is missing or damaged.
  """
  for name, reader in _READERS.items():
    if (folder / name).is_file():
      return _open(folder / name, reader)
    index = folder / f"{name}.index.json"
    if index.is_file():
      return _open_shards(index, reader)
  raise UserError(
    f"{folder} has no weights; expected "
    + ", ".join(f"{name} or {name}.index.json" for name in _READERS)
  )


def open_adapters(folder: pathlib.Path) -> dict[str, Stored]:
  """The tensors of a folder of PEFT adapters."""
  for name, reader in _ADAPTERS.items():
    if (folder / name).is_file():
      return _open(folder / name, reader)
  raise UserError(f"{folder} has none of {', '.join(_ADAPTERS)}")


def _open_shards(index: pathlib.Path, reader) -> dict[str, Stored]:
  files = read_json(index).get("weight_map")
  if not isinstance(files, dict) or not files:
    raise UserError(f"{index} has no weight_map; download it again")
  tensors = {}
  for file in sorted(set(files.values())):
    path = index.parent / file
    if path.parent != index.parent or not path.is_file():
      raise UserError(
        f"{path} is missing, though {index.name} names it; download it again"
      )
    tensors.update(_open(path, reader))
  return tensors


def _open(path: pathlib.Path, reader) -> dict[str, Stored]:
  failed = lambda why: f"{path} cannot be read: {why}; copy the file anew"
  with explained(OSError, zipfile.BadZipFile, by=failed):
    return reader(path)


def find(
  tensors: Mapping[str, Stored], candidates: Sequence[str]
) -> Stored | None:
  """The first candidate name that exists, checked to be readable numbers."""
  for name in candidates:
    stored = tensors.get(name)
    if stored is None:
      continue
    if stored.dtype not in FLOATS:
      raise UserError(
        f"{stored.where}: {name} is stored as {stored.dtype}; quantised "
        "weights are not supported, use a float32, float16 or bfloat16 copy"
      )
    return stored
  return None
