"""The named mesh and where every array lies on it.

Three axes: `replica` (copies of the parameters), `fsdp` (parameters and rows
are split) and `tensor` (heads and features are split). Rows of a batch are
split over replica and fsdp together. One device is a 1 x 1 x 1 mesh, so a
laptop and a pod run the same program.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxalign.core.types import Params
from jaxalign.errors import UserError

AXES = ("replica", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh  # what needs no devices takes either
ROWS = ("replica", "fsdp")  # the axes over which a batch's rows are split

# Which axis of a kernel [in, out] the heads or features lie on.
SPLIT_OUTPUTS = {
  *("query_key_value", "dense_h_to_4h", "q_proj", "k_proj", "v_proj"),
  *("gate_proj", "up_proj", "c_fc", "query_proj", "key_proj", "value_proj"),
  "intermediate",
}
SPLIT_INPUTS = {
  *("dense", "dense_4h_to_h", "o_proj", "down_proj", "out_proj", "c_proj"),
  *("attention_output", "output"),
}


def make_mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh over the first `replica * fsdp * tensor` devices.

  Args:
    replica: copies of the parameters, >= 1, or -1 for what is left.
    fsdp: parts that parameters and rows are split into, likewise.
    tensor: parts that heads and features are split into, likewise.

  Raises:
    UserError: the sizes do not fit the devices that are there.
  """
  devices = jax.devices()
  sizes = [replica, fsdp, tensor]
  if sizes.count(-1) == 1:
    rest = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = max(1, len(devices) // rest)
  count = int(np.prod(sizes))
  if min(sizes) < 1 or count > len(devices):
    raise UserError(
      f"config.mesh: replica x fsdp x tensor = {' x '.join(map(str, sizes))} "
      f"= {count} devices, but {len(devices)} are there; lower one of them, "
      "or set one to -1 to take what is left"
    )
  return Mesh(np.array(devices[:count]).reshape(sizes), AXES)


def replicated(mesh: AnyMesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
  """Rows of a batch, on array axis `axis`, split over replica and fsdp."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def constrain_rows(tree: Any, axis: int = 0) -> Any:
  """Inside a program: rows on `axis` stay split over the mesh in force.

  What is gathered by index would otherwise lie on every device, and every
  device would compute all of it.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  spec = PartitionSpec(*[None] * axis, ROWS)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def row_count(mesh: AnyMesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_rows(mesh: AnyMesh, count: int, field: str) -> None:
  """UserError unless `count` rows can be split evenly over the mesh."""
  parts = row_count(mesh)
  if count % parts:
    raise UserError(
      f"{field} gives {count} rows, which cannot be split evenly over "
      f"replica x fsdp = {parts} devices; make it a multiple of {parts} or "
      "change config.mesh"
    )


def shardings(tree: Any, mesh: AnyMesh) -> Any:
  """A sharding for every leaf of a parameter-like tree.

  Works for parameters, optimizer states and whole train states, since it
  goes by a leaf's last names and its shape. A dimension that does not divide
  evenly stays whole.
  """

  def place(path, leaf):
    names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
    return NamedSharding(mesh, _spec(names, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, tree)


def put(tree: Params, mesh: Mesh) -> Params:
  """The tree laid out on the mesh."""
  return jax.device_put(tree, shardings(tree, mesh))


def _spec(names: list[str], shape: tuple[int, ...], mesh: AnyMesh):
  owner = names[-2] if len(names) > 1 else ""
  leaf = names[-1] if names else ""
  if leaf == "embedding" or (leaf == "kernel" and owner in SPLIT_INPUTS):
    wanted = ("tensor", "fsdp")
  elif leaf == "kernel" and owner in SPLIT_OUTPUTS:
    wanted = ("fsdp", "tensor")
  elif leaf in ("kernel", "lora_a", "lora_b"):
    wanted = ("fsdp", None)
  else:
    return PartitionSpec()  # biases and norms: small
  if len(shape) < 2:
    return PartitionSpec()  # factored optimizer statistics
  fits = [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(wanted, shape[-2:], strict=True)
  ]
  return PartitionSpec(*[None] * (len(shape) - 2), *fits)
