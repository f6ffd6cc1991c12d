"""A program of a run, as it is compiled: a function and its shapes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.extend as jex
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxalign.core import memory
from jaxalign.parallel import mesh as meshes

Batch = TypeVar("Batch")  # a pytree of numpy arrays


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function of a run with the largest arguments it is called with.

  Nothing in it holds memory on a device, and its devices need not be there.

  Attributes:
    name: `update`, `sample`, `score reward_model`, ...; one of each in a run.
    function: jitted; the very function that the run calls.
    arguments: arrays as `jax.ShapeDtypeStruct`s with their shardings.
    calls: how often a step of the run calls it; a fraction for what is not
      called in every step. 0 = only for batches of another layout.
    iterations: of its loop whose length only a run decides: tokens that are
      decoded. 0 = it has no such loop.
    keywords: static arguments.
  """

  name: str
  function: jax.stages.Wrapped
  arguments: tuple[PyTree, ...]
  calls: int | float = 1
  iterations: int = 0
  keywords: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def named(self, name: str, share: int | float = 1) -> "Program":
    """The same under another name, called in a share of the steps."""
    return dataclasses.replace(self, name=name, calls=share * self.calls)

  def trace(self) -> jax.stages.Traced:
    """The program as a jaxpr, in `.jaxpr`."""
    return self.function.trace(*self.arguments, **self.keywords)

  def lower(self) -> jax.stages.Lowered:
    """The program for its devices' compiler; `.compile()` is next."""
    return self.trace().lower()


def largest(batches: Sequence[Batch]) -> Batch:
  """The batch with the most numbers; the last of equal ones."""

  def size(batch: Batch) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(batch))

  return max(reversed(batches), key=size)


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on one device; 0 if it waits in the host's memory."""
  return 0 if memory.is_on_host(leaf) else fetched_bytes(leaf)


def fetched_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on one device, once it is there."""
  shape = leaf.shape
  if leaf.sharding is not None:
    shape = leaf.sharding.shard_shape(shape)
  # Random keys have a type without a size of its own; they are small.
  return math.prod(shape) * getattr(leaf.dtype, "itemsize", 4)


def jaxprs_of(params: dict[str, object]) -> list[jex.core.Jaxpr]:
  """The bodies that a primitive's parameters hold."""
  found = []
  for value in params.values():
    for each in value if isinstance(value, tuple | list) else [value]:
      if isinstance(each, jex.core.ClosedJaxpr):
        found.append(each.jaxpr)
      elif isinstance(each, jex.core.Jaxpr):
        found.append(each)
  return found


def key_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """The shape of a random key, which every device has."""
  key = jax.eval_shape(jax.random.key, 0)
  where = meshes.replicated(mesh)
  return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=where)
