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
from typing import Any

import jax

from jaxalign.core.types import Params


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one of our leaves stands in a Hugging Face file.

  Attributes:
    name: the tensor's name; `{i}` stands for the layer of a stacked leaf.
    axes: order of the tensor's axes in ours, as in `numpy.transpose`; empty
      where both agree. A stacked leaf's layer axis is not counted.
  """

  name: str
  axes: tuple[int, ...] = ()


_LEAVES = {
  "kernel": ("weight", (1, 0)),
  "scale": ("weight", ()),
  "embedding": ("weight", ()),
  "bias": ("bias", ()),
}

ADAPTERS = ("lora_a", "lora_b")


def flatten(params: Params) -> dict[str, Any]:
  """A nested dict as `{"blocks.dense.kernel": leaf, ...}`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {".".join(k.key for k in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> Params:
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
  """The entry of every leaf of a model, adapters left out.

  Args:
    names: our dotted path -> theirs. The path of a module with a string
      covers its leaves by the rule above; the path of a leaf with an `Entry`
      is taken as it is and goes first.
    shapes: the model's tree, see `Model.shapes`.
  """
  found = {}
  for path in flatten(shapes):
    module, _, leaf = path.rpartition(".")
    if leaf in ADAPTERS:
      continue
    if path in names:
      entry = names[path]
      assert isinstance(entry, Entry), path
      found[path] = entry
    else:
      suffix, axes = _LEAVES[leaf]
      found[path] = Entry(f"{names[module]}.{suffix}", axes)
  return found


def theirs(entry: Entry, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
  """The number of layers (0 = not stacked) and the file tensors' shape."""
  layers = shape[0] if "{i}" in entry.name else 0
  ours = shape[1:] if layers else shape
  if not entry.axes:
    return layers, ours
  inverse = sorted(range(len(ours)), key=entry.axes.__getitem__)
  return layers, tuple(ours[axis] for axis in inverse)


def layer_names(entry: Entry, layers: int) -> list[str]:
  """The tensor names of a leaf, one a layer."""
  if not layers:
    return [entry.name]
  return [entry.name.replace("{i}", str(i)) for i in range(layers)]
