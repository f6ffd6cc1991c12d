"""Reading tensors from safetensors files, and the files that are written."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxalign.errors import UserError
from jaxalign.models.hf import table, weights, write


@pytest.fixture
def tensors():
  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  return {
    "full": values,
    "half": values.astype(np.float16),
    "brain": values.astype(ml_dtypes.bfloat16),
    "whole": values.astype(np.int64),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
  }


@pytest.fixture
def path(tensors, tmp_path):
  save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path / "model.safetensors"


def test_what_is_stored_is_read(tensors, path):
  found = weights.open_tensors(path.parent)
  assert set(found) == set(tensors)
  for name, array in tensors.items():
    assert found[name].shape == array.shape
    assert found[name].read().dtype == array.dtype
    np.testing.assert_array_equal(found[name].read(), array)


@pytest.mark.parametrize("name", ["full", "half", "brain", "whole"])
def test_a_part_is_read(tensors, path, name):
  tensor = weights.open_tensors(path.parent)[name]
  for index in (np.s_[0:2, 0:3], np.s_[1:2, 0:3], np.s_[0:2, 1:3]):
    part = tensor.read(index)
    assert part.dtype == tensors[name].dtype
    np.testing.assert_array_equal(part, tensors[name][index])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_is_written(tensors, dtype, tmp_path):
  leaves = {"a.kernel": tensors["full"], "b.scale": tensors["full"][0]}
  names = {"a": "theirs.a", "b": "theirs.b"}
  shapes = table.unflatten(leaves)
  entries = table.entries(names, shapes)
  plan = write.plan_files(entries, shapes, jnp.dtype(dtype))
  write.write_tensors(leaves.items(), plan, tmp_path)
  with safe_open(tmp_path / "model.safetensors", "numpy") as file:
    assert set(file.keys()) == {"theirs.a.weight", "theirs.b.weight"}
    found = file.get_tensor("theirs.a.weight")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, tensors["full"].T)
    assert file.metadata() == {"format": "pt"}


def test_every_cut_is_noticed(path):
  whole = path.read_bytes()
  for size in (0, 4, 100, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match="truncated"):
      weights.open_tensors(path.parent)


@pytest.mark.parametrize(
  "entry",
  [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2]},
    [],
  ],
)
def test_wrong_headers_are_refused(entry, path):
  text = json.dumps({"w": entry}).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
  with pytest.raises(UserError, match="not a safetensors file") as error:
    weights.open_tensors(path.parent)
  assert "\n" not in str(error.value)


def test_files_are_split_at_the_limit():
  """Tensors of 16, 16, 24 and 4 bytes, at most 40 a file: 2 + 2."""
  shapes = {
    "blocks": {"a": {"kernel": np.empty((2, 2, 2), np.float32)}},
    "b": {"scale": np.empty(6, np.float32)},
    "c": {"scale": np.empty(1, np.float32)},
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
  sizes = [len(header) for header in plan.headers.values()]
  starts = [0, 16, 0, 24]
  ends = zip(plan.files, starts, (0, 0, 1, 1), strict=True)
  assert plan.offsets == {n: sizes[file] + start for n, start, file in ends}


def test_axes_are_undone():
  entry = table.Entry("conv.{i}", (2, 1, 0))
  assert entry.file_shape((5, 3, 4, 7)) == (7, 4, 3)
  assert entry.names((2, 3, 4, 7)) == ["conv.0", "conv.1"]
  plain = table.Entry("e", ())
  assert plain.file_shape((5, 3)) == (5, 3)
  assert plain.names((5, 3)) == ["e"]
