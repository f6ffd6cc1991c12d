"""The safetensors reader and the layout that the writer follows."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from jaxalign.errors import UserError
from jaxalign.models.hf import safetensors, table, write


def write_file(path, tensors):
  plan = safetensors.layout({n: (a.shape, a.dtype) for n, a in tensors.items()})
  with path.open("wb") as file:
    file.write(plan.header)
    for name, array in tensors.items():
      assert file.tell() == plan.offsets[name]
      file.write(array.tobytes())
  return path


@pytest.fixture
def tensors():
  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  return {
    "full": values,
    "half": values.astype(np.float16),
    "brain": values.astype(ml_dtypes.bfloat16),
    "whole": values.astype(np.int64),
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
  }


def test_what_is_written_is_read(tensors, tmp_path):
  found = safetensors.open_file(write_file(tmp_path / "a", tensors))
  assert set(found) == set(tensors)
  for name, array in tensors.items():
    assert found[name].shape == array.shape
    assert found[name].read().dtype == array.dtype
    np.testing.assert_array_equal(found[name].read(), array)


def test_the_library_reads_what_is_written(tensors, tmp_path):
  path = write_file(tmp_path / "a", tensors)
  with safe_open(path, "numpy") as file:
    assert set(file.keys()) == set(tensors)
    np.testing.assert_array_equal(file.get_tensor("full"), tensors["full"])
    assert file.metadata() == {"format": "pt"}


def test_every_cut_is_noticed(tensors, tmp_path):
  path = write_file(tmp_path / "a", tensors)
  whole = path.read_bytes()
  for size in (0, 4, 100, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match="truncated"):
      safetensors.open_file(path)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8"),
    ({"dtype": "F32", "shape": [2]}, "damaged"),
    ([], "damaged"),
  ],
)
def test_wrong_headers_are_refused(entry, message, tmp_path):
  text = json.dumps({"w": entry}).encode()
  path = tmp_path / "a"
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
  with pytest.raises(UserError, match=message):
    safetensors.open_file(path)


def test_files_are_split_at_the_limit():
  """Tensors of 16, 16, 24 and 4 bytes, at most 40 a file: 2 + 2."""
  shape = lambda *n: np.empty(n, np.float32)
  shapes = {
    "blocks": {"a": {"kernel": shape(2, 2, 2)}},
    "b": {"scale": shape(6)},
    "c": {"scale": shape(1)},
  }
  names = {"blocks.a": "l.{i}.a", "b": "b", "c": "c"}
  entries = table.entries(names, shapes)
  order = {p: entries[p] for p in ("blocks.a.kernel", "b.scale", "c.scale")}
  plan = write.plan_files(order, shapes, np.dtype(np.float32), 40)
  first, second = "model-00001-of-00002", "model-00002-of-00002"
  assert {n: f.removesuffix(".safetensors") for n, f in plan.files.items()} == {
    "l.0.a.weight": first,
    "l.1.a.weight": first,
    "b.weight": second,
    "c.weight": second,
  }


def test_axes_are_undone():
  entry = table.Entry("conv.{i}", (2, 1, 0))
  assert table.theirs(entry, (5, 3, 4, 7)) == (5, (7, 4, 3))
  assert table.layer_names(entry, 2) == ["conv.0", "conv.1"]
  assert table.theirs(table.Entry("e", ()), (5, 3)) == (0, (5, 3))
