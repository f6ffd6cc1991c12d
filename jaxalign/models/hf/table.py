"""How our parameters and Hugging Face's tensor names match.

An architecture lists its modules once; the leaves follow from the layer
kinds, because both sides name them by one rule:

  ours              theirs
  kernel [in, out]  weight [out, in]
  scale [D]         weight [D]
  embedding [V, D]  weight [V, D]
  bias [out]        bias [out]
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import ml_dtypes
import numpy as np

from jaxalign.core.types import Params
from jaxalign.models.lora import LEAVES

T = TypeVar("T")

# Number formats by the name that safetensors gives them.
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
_LEAF_RULES = {
  "kernel": ("weight", (1, 0)),
  "scale": ("weight", ()),
  "embedding": ("weight", ()),
  "bias": ("bias", ()),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one of our leaves is in a Hugging Face file.

  Attributes:
    name: the tensor's name; `{i}` stands for the layer of a stacked leaf.
    axes: order of the tensor's axes in ours, as in `numpy.transpose`; empty
      where both agree. A stacked leaf's layer axis is not counted.
  """

  name: str
  axes: tuple[int, ...] = ()

  @property
  def stacked(self) -> bool:
    """Whether the leaf holds all layers on its first axis."""
    return "{i}" in self.name

  def names(self, shape: tuple[int, ...]) -> list[str]:
    """Tensors of a leaf of this shape: one per layer, or the one it has."""
    if not self.stacked:
      return [self.name]
    return [self.name.replace("{i}", str(i)) for i in range(shape[0])]

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that each tensor of a leaf of this shape has in the file."""
    ours = shape[1:] if self.stacked else shape
    if not self.axes:
      return ours
    # The inverse of the transposition that reading applies.
    return tuple(ours[self.axes.index(axis)] for axis in range(len(ours)))


def flatten(params: Params) -> dict[str, T]:
  """A nested dict as `{"blocks.dense.kernel": leaf, ...}`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {".".join(k.key for k in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, object]) -> Params:
  """The inverse of `flatten`."""
  params: Params = {}
  for path, leaf in leaves.items():
    *parents, name = path.split(".")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return params


def entries(
  names: Mapping[str, str | Entry], shapes: Params
) -> dict[str, Entry]:
  """The entry of every leaf of a model, except those of adapters.

  Args:
    names: our dotted path -> theirs. The path of a module with a string
      covers its leaves by the rule above; the path of a leaf with an `Entry`
      takes precedence.
    shapes: the model's tree, see `Model.shapes`.
  """
  # Starting from our tree, so no leaf can be forgotten: an unknown one fails.
  matched = {}
  for path in flatten(shapes):
    module, _, leaf = path.rpartition(".")
    if leaf in LEAVES:
      continue
    entry = names.get(path)
    if not isinstance(entry, Entry):
      # By the rule: the module's name, then `weight` or `bias`.
      suffix, axes = _LEAF_RULES[leaf]
      entry = Entry(f"{names[module]}.{suffix}", axes)
    matched[path] = entry
  return matched
