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

from jaxalign.errors import UserError, explained
from jaxalign.models.hf.safetensors import DTYPES, Stored

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
  kind: str
  key: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
  storage: Any  # what the pickle passed; checked when the tensor is used
  offset: Any
  shape: Any
  strides: Any


def _rebuild_tensor(storage, offset, shape, strides, *_):
  return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_):
  return tensor


class _Unpickler(pickle.Unpickler):
  """Builds dicts, numbers, strings and `_Tensor`s, and nothing else."""

  ALLOWED = {  # noqa: RUF012
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  }

  def __init__(self, file: io.BytesIO, where: str):
    super().__init__(file, encoding="utf-8")
    self.where = where

  def find_class(self, module: str, name: str) -> Any:
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
    tag, kind, key, *_ = pid
    if tag != "storage" or kind not in DTYPES or not isinstance(key, str):
      raise UserError(f"{self.where} refers to an unknown object {pid!r}")
    return _Storage(kind, key)


def open_file(path: pathlib.Path) -> dict[str, Stored]:
  """The tensors of one file; their bytes are read when asked for.

  Raises:
    UserError: not a torch zip file, truncated, or its pickle wants anything
      but tensors.
  """
  if not zipfile.is_zipfile(path):
    raise UserError(
      f"{path} is truncated, or older than torch 1.6's format; download it "
      "again or use a safetensors copy"
    )
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    root = next((n for n in members if n.endswith("/data.pkl")), None)
    if root is None or members[root].file_size > _MAX_PICKLE:
      raise UserError(f"{path} is not a file of torch tensors")
    prefix = root.removesuffix("data.pkl")
    order = prefix + "byteorder"
    if order in members and archive.read(order) != b"little":
      raise UserError(f"{path} is in big-endian order, which is not supported")
    data = io.BytesIO(archive.read(root))
  failed = f"{path} has a damaged pickle: "
  # A damaged pickle may fail in any way.
  with explained(Exception, by=lambda why: failed + why):
    table = _Unpickler(data, str(path)).load()
  if not isinstance(table, dict):
    raise UserError(f"{path} holds no table of tensors")
  return {
    str(name): _stored(path, prefix, members, str(name), value)
    for name, value in table.items()
  }


def _stored(path, prefix, members, name: str, value: Any) -> Stored:
  if not isinstance(value, _Tensor) or not isinstance(value.storage, _Storage):
    raise UserError(
      f"{path}: {name} is no tensor; a table of tensors is needed"
    )
  kind = value.storage.kind
  dtype = DTYPES[kind]
  axes = (value.shape, value.strides)
  if (
    not all(isinstance(axis, tuple) for axis in axes)
    or len(value.shape) != len(value.strides)
    or not all(
      isinstance(n, int) and n >= 0
      for n in (value.offset, *value.shape, *value.strides)
    )
  ):
    raise UserError(f"{path}: {name} has impossible axes")
  steps = zip(value.shape, value.strides, strict=True)
  extent = 1 + sum((n - 1) * step for n, step in steps)
  extent = extent if math.prod(value.shape) else 0
  member = members.get(f"{prefix}data/{value.storage.key}")
  if (
    member is None
    or member.compress_type != zipfile.ZIP_STORED
    or (value.offset + extent) * dtype.itemsize > member.file_size
  ):
    raise UserError(
      f"{path}: the bytes of {name} are missing or cut short; download it again"
    )

  def read() -> np.ndarray:
    failed = lambda why: f"{path}: {name} is damaged: {why}; download it again"
    with (
      explained(OSError, zipfile.BadZipFile, by=failed),
      zipfile.ZipFile(path) as archive,
      archive.open(member) as file,
    ):
      file.seek(value.offset * dtype.itemsize)
      raw = np.frombuffer(file.read(extent * dtype.itemsize), dtype)
    strides = tuple(step * dtype.itemsize for step in value.strides)
    return np.lib.stride_tricks.as_strided(raw, value.shape, strides)

  return Stored(tuple(value.shape), kind, str(path), read)
