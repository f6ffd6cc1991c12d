"""Reads and writes the safetensors format, one tensor at a time.

The library's numpy front end has no bfloat16 and hands out whole files; the
format is a length, a JSON header and raw bytes, so both directions are short.
Reading uses plain reads instead of a memory map, because mapped pages count
towards the process's memory and stay there.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxalign.errors import UserError, explained

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the reference reader has the same limit


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file, read when asked for.

  Attributes:
    shape: its axes.
    dtype: the file's number format, as safetensors names it; formats that
      numpy cannot hold (F8_E4M3, ...) are told apart only on reading.
    where: the file, for messages.
    read: returns the whole tensor.
  """

  shape: tuple[int, ...]
  dtype: str
  where: str
  read: Callable[[], np.ndarray]


def open_file(path: pathlib.Path) -> dict[str, Stored]:
  """The tensors of one file; reads the header alone.

  Raises:
    UserError: not a safetensors file, or a truncated one.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
      raise UserError(
        f"{path} is truncated or not a safetensors file ({size} bytes, header "
        f"of {length}); download or copy it again"
      )
    header = file.read(length)
  failed = f"{path} has a damaged safetensors header: "
  kinds = (ValueError, KeyError, TypeError, AttributeError)
  with explained(*kinds, by=lambda why: failed + why):
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    tensors = {
      name: _stored(path, 8 + length, size, name, entry)
      for name, entry in entries.items()
    }
  return tensors


def _stored(
  path: pathlib.Path, base: int, size: int, name: str, entry: dict[str, Any]
) -> Stored:
  shape = tuple(int(n) for n in entry["shape"])
  begin, end = (base + int(n) for n in entry["data_offsets"])
  if end > size:
    raise UserError(
      f"{path} is truncated: {name} ends at byte {end}, the file at {size}; "
      "download or copy it again"
    )
  kind = entry["dtype"]
  dtype = DTYPES.get(kind)
  if dtype and end - begin != math.prod(shape) * dtype.itemsize:
    raise UserError(
      f"{path}: {name} has {end - begin} bytes, its shape {shape} in {kind} "
      f"needs {math.prod(shape) * dtype.itemsize}"
    )

  def read() -> np.ndarray:
    assert dtype is not None, kind
    count = math.prod(shape)
    return np.fromfile(path, dtype, count, offset=begin).reshape(shape)

  return Stored(shape, kind, str(path), read)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A file to be written: where each tensor's bytes go.

  Attributes:
    header: everything before the first tensor.
    offsets: tensor name -> byte at which it starts.
    tensor_bytes: all tensors together.
  """

  header: bytes
  offsets: dict[str, int]
  tensor_bytes: int


def layout(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
  """Plans a file for tensors given as `{name: (shape, dtype)}`."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offsets, end = {}, 0
  for name, (shape, dtype) in tensors.items():
    offsets[name] = end
    end += math.prod(shape) * dtype.itemsize
    entries[name] = {
      "dtype": NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [offsets[name], end],
    }
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
  header = len(text).to_bytes(8, "little") + text
  base = len(header)
  return Layout(header, {n: base + at for n, at in offsets.items()}, end)
