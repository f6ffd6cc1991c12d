"""Arrays that wait in the host's memory while the devices do without them."""

import jax
from jaxtyping import Array, PyTree

_HOST = "pinned_host"  # what a device can read from and write to directly


class HostShape(jax.ShapeDtypeStruct):
  """The shape of an array that waits in the host's memory.

  Its sharding says so too, but not for a GPU that is not there: JAX knows no
  memory of it.
  """


def to_host(tree: PyTree) -> PyTree:
  """Copies arrays to the host's memory, each device's part for itself.

  Args:
    tree: arrays, or shapes with their shardings. Single numbers stay where
      they are.
  """

  def copy(x):
    if not x.ndim:
      return x
    where = x.sharding.with_memory_kind(_HOST)
    if isinstance(x, jax.ShapeDtypeStruct):
      return HostShape(x.shape, x.dtype, sharding=where)
    return jax.device_put(x, where)

  return jax.tree.map(copy, tree)


def is_on_host(leaf: Array | jax.ShapeDtypeStruct) -> bool:
  """Whether an array, or a shape with its sharding, is one of `to_host`."""
  if isinstance(leaf, HostShape):
    return True
  return getattr(leaf.sharding, "memory_kind", None) == _HOST


def fetch(tree: PyTree, after: Array | None = None) -> PyTree:
  """Copies arrays of `to_host` to the devices, inside a program.

  Args:
    tree: others stay as they are.
    after: a value of the program. The copies wait for it, so that they take no
      room while it is computed.
  """

  def move(x):
    if jax.typeof(x).memory_space != jax.memory.Space.Host:
      return x
    if after is not None:
      x, _ = jax.lax.optimization_barrier((x, after))
    return jax.device_put(x, jax.memory.Space.Device)

  return jax.tree.map(move, tree)
