"""`pytorch_model.bin` without torch: hand-made archives, good and evil."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.hf import torch_zip

DATA = np.arange(24, dtype=np.float32)


class Named:
  """Stands for a global; pickled by name, though nothing of it exists."""

  def __init__(self, module, name):
    self.module, self.name = module, name

  def __reduce__(self):
    raise AssertionError


class Pickler(pickle._Pickler):
  """Writes the opcodes that torch writes, without torch."""

  def save(self, obj, *args, **kwargs):
    if isinstance(obj, Named):
      line = f"{obj.module}\n{obj.name}\n".encode()
      return self.write(pickle.GLOBAL + line)
    if isinstance(obj, Call):
      self.save(obj.function)
      self.save(obj.arguments)
      return self.write(pickle.REDUCE)
    return super().save(obj, *args, **kwargs)

  def persistent_id(self, obj):
    if not isinstance(obj, Storage):
      return None
    kind = Named("torch", obj.kind)
    return ("storage", kind, obj.key, "cpu", DATA.size)


Storage = collections.namedtuple("Storage", "kind key")
Call = collections.namedtuple("Call", "function arguments")


def tensor(shape, strides, offset=0, kind="FloatStorage", key="0"):
  rebuild = Named("torch._utils", "_rebuild_tensor_v2")
  storage = Storage(kind, key)
  return Call(rebuild, (storage, offset, shape, strides, False, {}))


def write(path, table, order=b"little"):
  with zipfile.ZipFile(path, "w") as archive:
    with archive.open("archive/data.pkl", "w") as file:
      Pickler(file, 2).dump(table)
    archive.writestr("archive/byteorder", order)
    archive.writestr("archive/data/0", DATA.tobytes())
  return path


def test_tensors_are_views_of_a_storage(tmp_path):
  path = write(
    tmp_path / "a.bin",
    {
      "whole": tensor((4, 6), (6, 1)),
      "turned": tensor((6, 4), (1, 6)),
      "part": tensor((2, 3), (6, 1), offset=7),
      "spread": tensor((3, 2), (0, 1)),
      "scalar": tensor((), (), offset=5),
      "empty": tensor((0, 3), (3, 1)),
    },
  )
  found = torch_zip.open_file(path)
  whole = DATA.reshape(4, 6)
  expected = {
    "whole": whole,
    "turned": whole.T,
    "part": whole[1:3, 1:4],
    "spread": np.broadcast_to(DATA[:2], (3, 2)),
    "scalar": np.float32(5),
    "empty": np.zeros((0, 3)),
  }
  for name, array in expected.items():
    assert found[name].shape == np.shape(array)
    np.testing.assert_array_equal(found[name].read(), array)


@pytest.mark.parametrize(
  ("module", "name"),
  [
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("torch.jit", "_load"),
    ("collections", "OrderedDict.__init__"),
    ("numpy", "load"),
  ],
)
def test_code_is_refused_and_not_run(module, name, tmp_path):
  witness = tmp_path / "witness"
  call = Call(Named(module, name), (f"touch {witness}",))
  path = write(tmp_path / "a.bin", {"w": tensor((2,), (1,)), "x": call})
  with pytest.raises(UserError, match=f"{module}.{name}") as error:
    torch_zip.open_file(path)
  assert "\n" not in str(error.value)
  assert not witness.exists()


def test_a_real_pickle_of_a_call_is_refused(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path / 'witness'}",)

  path = tmp_path / "a.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))
  with pytest.raises(UserError, match="system"):
    torch_zip.open_file(path)
  assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
  ("table", "message"),
  [
    ({"w": tensor((4, 7), (6, 1))}, "missing or cut short"),
    ({"w": tensor((4,), (1,), key="1")}, "missing or cut short"),
    ({"w": tensor((4,), (-1,))}, "impossible axes"),
    ({"w": tensor((4, 2), (1,))}, "impossible axes"),
    ({"w": tensor(7, 1)}, "impossible axes"),
    ({"w": 3}, "is no tensor"),
    ([3], "no table of tensors"),
  ],
)
def test_impossible_tensors_are_refused(table, message, tmp_path):
  path = write(tmp_path / "a.bin", table)
  with pytest.raises(UserError, match=message):
    torch_zip.open_file(path)


def test_damaged_files_are_refused(tmp_path):
  path = write(tmp_path / "a.bin", {"w": tensor((4,), (1,))})
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match="truncated"):
    torch_zip.open_file(path)
  path = write(tmp_path / "b.bin", {"w": tensor((4,), (1,))}, b"big")
  with pytest.raises(UserError, match="big-endian"):
    torch_zip.open_file(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X")
  with pytest.raises(UserError, match="damaged pickle"):
    torch_zip.open_file(path)
