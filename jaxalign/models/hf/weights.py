"""The tensors of a model folder, whatever files they are spread over.

Opening a file reads its header; a tensor's bytes are read by `read`, and of a
safetensors file only those of the part that is asked for.
"""

import dataclasses
import json
import math
import pathlib
import zipfile

import numpy as np

from jaxalign import paths
from jaxalign.errors import UserError
from jaxalign.models.hf import torch_zip
from jaxalign.models.hf.config_json import read_json
from jaxalign.models.hf.table import DTYPES

# File names, the preferred one first.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_HEADER = 100_000_000  # bytes; as the safetensors library


@dataclasses.dataclass(frozen=True)
class SafeTensor:
  """A tensor in a safetensors file.

  Attributes:
    name: in the file.
    shape: its axes.
    dtype: number format, as safetensors names it: "F32", "BF16", "I8", ...
    path: the file.
    offset: byte of the file at which it starts.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  path: paths.Folder
  offset: int

  @property
  def is_local(self) -> bool:
    """Whether the file is on this machine's file system."""
    return isinstance(self.path, pathlib.Path)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole tensor."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part of the tensor at `index`, a slice per axis; () = all of it.

    Returns:
      A view of the file, whose bytes are read when they are looked at; what
      lies between them is not read. From an object store the part's rows are
      read whole.
    """
    dtype = DTYPES[self.dtype]
    shape, skipped = self.shape, 0
    if index:
      # Only the part's rows are mapped: pages that were looked at count towards
      # the process's memory until their map is gone.
      start, stop, _ = index[0].indices(shape[0])
      shape = (max(stop - start, 0), *shape[1:])
      skipped = start * math.prod(shape[1:]) * dtype.itemsize
    offset, count = self.offset + skipped, math.prod(shape)
    if not count:  # nothing can be mapped
      rows = np.zeros(shape, dtype)
    elif self.is_local:
      rows = np.memmap(self.path, dtype, "r", offset, shape).view(np.ndarray)
    else:
      with self.path.open("rb") as file:
        file.seek(offset)
        raw = file.read(count * dtype.itemsize)
      rows = np.frombuffer(raw, dtype).reshape(shape)
    return rows[:, *index[1:]] if index else rows


FileTensor = SafeTensor | torch_zip.TorchTensor


def open_tensors(
  folder: pathlib.Path, names: tuple[str, ...] = MODEL_FILES
) -> dict[str, FileTensor]:
  """All tensors of a folder by name, from one file or from several.

  Args:
    folder: holds the files.
    names: `MODEL_FILES` or `ADAPTER_FILES`.

  Raises:
    UserError: no weights, or a file is missing or damaged.
  """
  place = paths.location(folder)
  for name in names:
    index = folder / f"{name}.index.json"
    # One file, or an index that names several.
    if (place / name).is_file():
      files = [place / name]
    elif index.is_file():
      files = _indexed_files(index)
    else:
      continue  # the next format
    # Names are unique over the files of a folder.
    tensors: dict[str, FileTensor] = {}
    for path in files:
      try:
        if name.endswith(".bin") and isinstance(path, pathlib.Path):
          tensors |= torch_zip.open_file(path)
        elif name.endswith(".bin"):
          raise UserError(
            f"{path}: from an object store only safetensors are read; convert "
            "a copy of the model with python -m jaxalign.convert"
          )
        else:
          tensors |= _open_safetensors(path)
      except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
          f"{path} cannot be read: {error}; copy the file again"
        ) from error
    return tensors
  raise UserError(
    f"{folder} has no weights; expected "
    + ", ".join(f"{name} or {name}.index.json" for name in names)
  )


def _indexed_files(index: pathlib.Path) -> list[paths.Folder]:
  """The files that a `*.index.json` names, all of them present."""
  folder = paths.location(index.parent)
  files = read_json(index).get("weight_map")
  if not isinstance(files, dict) or not files:
    raise UserError(f"{index} has no weight_map; download it again")
  found = [folder / str(file) for file in sorted(set(files.values()))]
  for path in found:
    # A name must not lead out of the folder.
    if path.parent != folder or not path.is_file():
      raise UserError(
        f"{path} is missing, though {index.name} names it; download it again"
      )
  return found


def _open_safetensors(path: paths.Folder) -> dict[str, FileTensor]:
  """The tensors of one file by name; reads only the header.

  A length, a JSON object and raw bytes. The safetensors library does not say
  where a tensor lies, and reads files of this machine alone.
  """
  size = paths.size(path)
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if length <= min(size, _MAX_HEADER) else b""
  start = 8 + length
  found: dict[str, FileTensor] = {}
  end = start  # of what the tensors so far fill
  try:
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    # Every byte must belong to one tensor, so that no cut goes unnoticed.
    for name, entry in sorted(
      entries.items(), key=lambda item: item[1]["data_offsets"]
    ):
      dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
      first, last = (start + int(offset) for offset in entry["data_offsets"])
      # The bytes of a format that is not read here are not known.
      known = DTYPES.get(dtype)
      wanted = math.prod(shape) * known.itemsize if known else last - first
      if first != end or last - first != wanted or min(shape, default=0) < 0:
        raise ValueError(f"{name} does not fill its place")
      found[name] = SafeTensor(name, shape, dtype, path, first)
      end = last
    if end != size:
      raise ValueError(f"the header describes {end} bytes")
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is truncated or not a safetensors file ({size} bytes: "
      f"{error}); download or copy it again"
    ) from error
  return found
