"""The tensors of a model folder, whatever files they are spread over.

Opening a file reads its header; a tensor's bytes are read by `read`, and of a
safetensors file only those of the part that is asked for.
"""

import dataclasses
import pathlib
import zipfile

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxalign.errors import UserError
from jaxalign.models.hf import torch_zip
from jaxalign.models.hf.config_json import read_json

# File names, the preferred one first.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True)
class SafeTensor:
  """A tensor in a safetensors file.

  Attributes:
    name: in the file.
    shape: its axes.
    dtype: number format, as safetensors names it: "F32", "BF16", "I8", ...
    path: the file.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  path: pathlib.Path

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part of the tensor at `index`, a slice per axis; () = all of it."""
    # The file is opened for each read: the library maps it into memory, and
    # pages of an open map count towards the process's memory.
    with safe_open(self.path, "np") as file:
      return file.get_slice(self.name)[index]


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
  for name in names:
    index = folder / f"{name}.index.json"
    # One file, or an index that names several.
    if (folder / name).is_file():
      paths = [folder / name]
    elif index.is_file():
      paths = _indexed_files(index)
    else:
      continue  # the next format
    # Names are unique over the files of a folder.
    tensors: dict[str, FileTensor] = {}
    for path in paths:
      try:
        if name.endswith(".bin"):
          tensors |= torch_zip.open_file(path)
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


def _indexed_files(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that a `*.index.json` names, all of them present."""
  files = read_json(index).get("weight_map")
  if not isinstance(files, dict) or not files:
    raise UserError(f"{index} has no weight_map; download it again")
  paths = [index.parent / str(file) for file in sorted(set(files.values()))]
  for path in paths:
    # A name must not lead out of the folder.
    if path.parent != index.parent or not path.is_file():
      raise UserError(
        f"{path} is missing, though {index.name} names it; download it again"
      )
  return paths


def _open_safetensors(path: pathlib.Path) -> dict[str, FileTensor]:
  try:
    # The library checks the header, and that it accounts for every byte.
    with safe_open(path, "np") as file:
      slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
      return {
        name: SafeTensor(name, tuple(s.get_shape()), s.get_dtype(), path)
        for name, s in slices.items()
      }
  except SafetensorError as error:
    raise UserError(
      f"{path} is truncated or not a safetensors file ({path.stat().st_size} "
      f"bytes: {error}); download or copy it again"
    ) from error
