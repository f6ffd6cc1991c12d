"""Reads `pytorch_model.bin` without torch and without running its code.

Such a file is a zip archive: a pickle that describes the tensors, and one
member of raw bytes for each storage. A pickle may name any function to be
called; the unpickler here knows the three that describe tensors, answers the
storage types with number formats, and refuses every other name.
"""

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.hf.table import DTYPES

_STORAGES = {
  "DoubleStorage": "F64",
  "FloatStorage": "F32",
  "HalfStorage": "F16",
  "BFloat16Storage": "BF16",
  "LongStorage": "I64",
  "IntStorage": "I32",
  "ShortStorage": "I16",
  "CharStorage": "I8",
  "ByteStorage": "U8",
  "BoolStorage": "BOOL",
}
_MAX_PICKLE = 256 * 2**20  # bytes; real ones are below one megabyte


@dataclasses.dataclass(frozen=True)
class TorchTensor:
  """A tensor in a torch file: a view of a storage.

  Attributes:
    name: in the file.
    shape: its axes.
    dtype: number format, as safetensors names it: "F32", "BF16", "I8", ...
    path: the file.
    member: name of the storage in the archive.
    offset: elements of the storage before the tensor's first one.
    strides: elements of the storage from one index to the next, per axis.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  path: pathlib.Path
  member: str
  offset: int
  strides: tuple[int, ...]

  @property
  def extent(self) -> int:
    """Elements of the storage from the tensor's first to its last one."""
    if not math.prod(self.shape):
      return 0
    steps = zip(self.shape, self.strides, strict=True)
    return 1 + sum((n - 1) * step for n, step in steps)

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part of the tensor at `index`, a slice per axis; () = all of it.

    Raises:
      UserError: the bytes are damaged.
    """
    dtype = DTYPES[self.dtype]
    # All of it is read whatever the index is: zipfile then compares the
    # member's checksum.
    try:
      with (
        zipfile.ZipFile(self.path) as archive,
        archive.open(self.member) as file,
      ):
        file.seek(self.offset * dtype.itemsize)
        raw = np.frombuffer(file.read(self.extent * dtype.itemsize), dtype)
    except (OSError, zipfile.BadZipFile) as error:
      raise UserError(
        f"{self.path}: {self.name} is damaged: {error}; download it again"
      ) from error
    # A view by strides: a transposed tensor is stored in its old order.
    strides = tuple(step * dtype.itemsize for step in self.strides)
    tensor = np.lib.stride_tricks.as_strided(raw, self.shape, strides)
    return tensor[(*index, ...)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
  kind: str
  key: str


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
  # What the pickle passed, checked in `_tensor`.
  storage: Any
  offset: Any
  shape: Any
  strides: Any


def _rebuild_tensor(storage, offset, shape, strides, *_):
  # The rest is requires_grad and hooks, which weights do not need.
  return _View(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_):
  return tensor


class _Unpickler(pickle.Unpickler):
  """Builds dicts, numbers, strings and `_View`s, and nothing else."""

  ALLOWED = {  # noqa: RUF012
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  }

  def __init__(self, file: io.BytesIO, where: str):
    super().__init__(file, encoding="utf-8")
    self.where = where

  def find_class(self, module: str, name: str) -> object:
    """What a name in the pickle stands for, if it is on the short list."""
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) in self.ALLOWED:
      return self.ALLOWED[module, name]
    raise UserError(
      f"{self.where} asks to call {module}.{name}, which no table of weights "
      "needs; refused without running it. Use a safetensors copy"
    )

  def persistent_load(self, pid: Any) -> _Storage:
    """A storage, from `("storage", type, key, device, size)`."""
    # `kind` is what `find_class` answered for the storage's type.
    tag, kind, key, *_ = pid
    if tag != "storage" or kind not in DTYPES or not isinstance(key, str):
      raise UserError(f"{self.where} refers to an unknown object {pid!r}")
    return _Storage(kind, key)


def open_file(path: pathlib.Path) -> dict[str, TorchTensor]:
  """The tensors of one file by name; reads only the pickle.

  Raises:
    UserError: not a torch zip file, truncated, or its pickle wants anything
      but tensors.
  """
  if not zipfile.is_zipfile(path):
    raise UserError(
      f"{path} is truncated, or older than torch 1.6's format; download it "
      "again or use a safetensors copy"
    )
  # The archive: one pickle that describes the tensors, one member a storage.
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    # All members are in one folder, whose name depends on the saver.
    root = next((n for n in members if n.endswith("/data.pkl")), None)
    if root is None or members[root].file_size > _MAX_PICKLE:
      raise UserError(f"{path} is not a file of torch tensors")
    prefix = root.removesuffix("data.pkl")
    # Older files lack this member and are taken as little-endian.
    order = prefix + "byteorder"
    if order in members and archive.read(order) != b"little":
      raise UserError(f"{path} is in big-endian order, which is not supported")
    # In memory, so that a damaged archive fails here and not in the pickle.
    data = io.BytesIO(archive.read(root))

  # The pickle, with a short list of what it may name.
  try:
    views = _Unpickler(data, str(path)).load()
  except UserError:
    raise
  except Exception as error:  # a damaged pickle may fail in any way
    raise UserError(f"{path} has a damaged pickle: {error!r}") from error
  if not isinstance(views, dict):
    raise UserError(f"{path} holds no table of tensors")
  return {
    str(name): _tensor(path, prefix, members, str(name), view)
    for name, view in views.items()
  }


def _tensor(
  path: pathlib.Path,
  prefix: str,
  members: dict[str, zipfile.ZipInfo],
  name: str,
  view: object,
) -> TorchTensor:
  """What a pickle says of one tensor, checked against the archive."""
  if not isinstance(view, _View) or not isinstance(view.storage, _Storage):
    raise UserError(
      f"{path}: {name} is no tensor; a table of tensors is needed"
    )
  # A pickle may hold anything here, so nothing is taken on trust.
  axes = (view.shape, view.strides)
  if (
    not all(isinstance(axis, tuple) for axis in axes)
    or len(view.shape) != len(view.strides)
    or not all(
      isinstance(n, int) and n >= 0
      for n in (view.offset, *view.shape, *view.strides)
    )
  ):
    raise UserError(f"{path}: {name} has impossible axes")
  # Storages are members of the archive; torch never compresses them.
  kind, member = view.storage.kind, f"{prefix}data/{view.storage.key}"
  tensor = TorchTensor(
    name, view.shape, kind, path, member, view.offset, view.strides
  )
  # The tensor must end within its storage.
  info = members.get(member)
  size = (tensor.offset + tensor.extent) * DTYPES[kind].itemsize
  if (
    info is None
    or info.compress_type != zipfile.ZIP_STORED
    or size > info.file_size
  ):
    raise UserError(
      f"{path}: the bytes of {name} are missing or cut short; download it again"
    )
  return tensor
