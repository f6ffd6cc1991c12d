"""The named mesh, and how every array is sharded over it.

Four axes: `replica` (copies of the parameters), `fsdp` (parameters and rows
are split), `sequence` (parameters and the tokens of a row are split) and
`tensor` (heads and features are split). Rows of a batch are split over replica
and fsdp together. One device is a 1 x 1 x 1 x 1 mesh, so a laptop and a pod run
the same program.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxalign.core.types import Params
from jaxalign.errors import UserError

# By what they move: the devices of the last axis are the nearest neighbours.
AXES = ("replica", "fsdp", "sequence", "tensor")
Devices = Sequence[jax.Device] | None  # None = all of this run
AnyMesh = Mesh | AbstractMesh  # an abstract one has no devices
Axes = str | tuple[str, ...] | None  # what one dimension is split over
ROWS = ("replica", "fsdp")  # the axes over which a batch's rows are split
# Rows whose tokens are not split: of one token, in decoding, or an encoder's.
SHORT_ROWS = (*ROWS, "sequence")
# The axes over which parameters are split; what the devices of `fsdp` have
# stands together, see `scatter_tokens`.
PARTS = ("sequence", "fsdp")

# Layers by the axis of their kernel [in, out] that holds heads or features. A
# block then computes on its own heads and adds up once, after the second kernel
# (Shoeybi et al. 2019).
SPLIT_OUTPUTS = {
  *("query_key_value", "dense_h_to_4h", "q_proj", "k_proj", "v_proj"),
  *("gate_proj", "up_proj", "c_fc", "query_proj", "key_proj", "value_proj"),
  *("intermediate", "qkv_proj", "gate_up_proj"),
}
SPLIT_INPUTS = {
  *("dense", "dense_4h_to_h", "o_proj", "down_proj", "out_proj", "c_proj"),
  *("attention_output", "output"),
}


def make_mesh(
  replica: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  sequence: int = 1,
  *,
  rows: int = 0,
  devices: Devices = None,
) -> Mesh:
  """A mesh over the first `replica * fsdp * sequence * tensor` devices.

  Args:
    replica: copies of the parameters, >= 1, or -1 = all remaining devices.
    fsdp: parts that parameters and rows are split into, in the same way.
    tensor: parts that heads and features are split into, in the same way.
    sequence: parts that parameters and the tokens of a row are split into, in
      the same way.
    rows: of a batch; an axis of -1 takes fewer devices where these would not
      split evenly over all that remain. 0 = any number.
    devices: to choose from; those of `jax.experimental.topologies`, which need
      not be there, do for what is only compiled. None = all of this run.

  Raises:
    UserError: the sizes do not fit the available devices.
  """
  devices = jax.devices() if devices is None else devices
  processes = {device.process_index for device in devices}
  sizes = [replica, fsdp, sequence, tensor]
  # One size may be left open; integer division leaves surplus devices idle.
  if sizes.count(-1) == 1:
    rest = int(np.prod([s for s in sizes if s != -1]))
    axis = sizes.index(-1)
    most = sizes[axis] = max(1, len(devices) // rest)
    # Several processes have no fewer: each has to have its devices in the mesh.
    if AXES[axis] in ROWS and len(processes) == 1:
      parts = rest // (sequence * tensor)
      fitting = (n for n in range(most, 0, -1) if rows % (n * parts) == 0)
      sizes[axis] = next(fitting, most)
  count = int(np.prod(sizes))
  wanted = (
    f"{' x '.join(AXES)} = {' x '.join(map(str, sizes))} = {count} devices"
  )
  if min(sizes) < 1 or count > len(devices):
    raise UserError(
      f"config.mesh: {wanted}, but JAX has {len(devices)}; lower one of them, "
      "or set one to -1 to take what is left"
    )
  if len(processes) > 1 and count < len(devices):
    raise UserError(
      f"config.mesh: {wanted}, but a run on {len(processes)} hosts needs all "
      f"{len(devices)} of theirs; set one of them to -1 to take what is left"
    )
  return Mesh(_arrange(devices[:count], sizes), AXES)


def _arrange(devices, sizes: list[int]) -> np.ndarray:
  """The devices as `sizes`, neighbours on an axis near to each other.

  Slices, which a slower network joins, become copies of the parameters, or
  where `replica` is too small parts of `fsdp`.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  across = [1] * len(sizes)
  for axis in (0, 1):
    across[axis] = math.gcd(sizes[axis], slices // math.prod(across))
  if math.prod(across) != slices:
    raise UserError(
      f"config.mesh: replica x fsdp = {sizes[0]} x {sizes[1]} cannot be split "
      f"over {slices} slices; make replica {slices}, as the network between "
      "slices is too slow for the others"
    )
  within = [size // n for size, n in zip(sizes, across, strict=True)]
  try:
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
      )
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  except (ValueError, RuntimeError, AssertionError):
    # A part of a slice need not be a torus; any order is right.
    return np.array(devices).reshape(sizes)


def platform(mesh: Mesh) -> str:
  """What the mesh's devices are: "cpu", "gpu" or "tpu".

  A program is made for them, wherever it is compiled, so what depends on the
  platform goes by this and not by `jax.default_backend()`.
  """
  name = mesh.devices.flat[0].platform
  # Of a GPU that is not there, JAX knows the maker.
  return "gpu" if name in ("cuda", "rocm") else name


def replicated(mesh: AnyMesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
  """Rows of a batch, on array axis `axis`, split over replica and fsdp."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def put_rows(batch: PyTree, mesh: Mesh) -> PyTree:
  """Puts numpy rows `[M, B, ...]` on the devices, B split over the row axes.

  Leaves with fewer axes, such as a single number, are replicated.
  """
  return jax.tree.map(lambda x: put_whole(x, _of_rows(x, mesh)), batch)


def put_whole(tree: PyTree, where: NamedSharding) -> PyTree:
  """Puts numpy arrays, the same on every host, on the devices.

  Of several hosts each sends its own devices' part. `jax.device_put` would
  first have them compare the whole arrays.
  """
  if where.is_fully_addressable:
    return jax.device_put(tree, where)

  def place(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, x.__getitem__)

  return jax.tree.map(place, tree)


def row_shapes(batch: PyTree, mesh: Mesh) -> PyTree:
  """The shapes of `put_rows`, with their shardings; nothing is put anywhere."""

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_of_rows(x, mesh))

  return jax.tree.map(shape, batch)


def _of_rows(x: PyTree, mesh: Mesh) -> NamedSharding:
  return replicated(mesh) if np.ndim(x) < 2 else rows(mesh, 1)


def jit(fn: Callable, mesh: Mesh | None, **options: Any) -> jax.stages.Wrapped:
  """`jax.jit` with the mesh in force, which the constraints below go by."""
  if mesh is None:
    return jax.jit(fn, **options)

  @functools.wraps(fn)
  def on_mesh(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)

  return jax.jit(on_mesh, **options)


def _on_one_device() -> bool:
  """Whether no mesh is in force, or one of a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def splits_tokens() -> bool:
  """Whether the mesh in force splits the tokens of a row."""
  return jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1


def constrain(x: Array, *spec: Axes) -> Array:
  """Shards an array over the mesh in force, inside a program.

  Without a mesh in force, or with one device, nothing happens.

  Args:
    x: any array.
    *spec: the mesh axes of its leading dimensions, as in a `PartitionSpec`;
      those that a dimension does not divide evenly over are left out,
      `sequence` before the others, first to last.
  """
  if _on_one_device():
    return x
  sizes = jax.sharding.get_abstract_mesh().shape
  fits = [
    fitting(axes, n, sizes) for axes, n in zip(spec, x.shape, strict=False)
  ]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits))


def fitting(axes: Axes, dimension: int, sizes: Mapping[str, int]) -> Axes:
  """Those of the axes that a dimension divides evenly over; see `constrain`."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  shorter = tuple(name for name in names if name != "sequence")
  # Where it has one device it splits nothing, and is not spoken of.
  parts = math.prod(sizes[name] for name in names)
  if sizes["sequence"] == 1 or dimension % parts:
    names = shorter
  while dimension % math.prod(sizes[name] for name in names):
    names = names[1:]
  return names[0] if len(names) == 1 else names or None


def constrain_rows(tree: PyTree, axis: int = 0) -> PyTree:
  """Keeps rows on `axis` split over the mesh in force, all else whole.

  Called wherever rows cross the border of a layer. Where parameters are split
  over the same devices as rows, XLA would otherwise leave the parameters where
  they are and move the rows of the whole batch to every device.
  """
  spec = (*[None] * axis, ROWS)
  return jax.tree.map(lambda x: constrain(x, *spec), tree)


def constrain_tokens(x: Array) -> Array:
  """Keeps `[B, T, ...]` split by rows and tokens; see `constrain_rows`."""
  return constrain(x, ROWS, "sequence")


def scatter_tokens(x: Array, rows: Axes = ROWS) -> Array:
  """Gives embedded tokens `[B, T, D]` to the devices that hold them.

  Every device has looked up its part of the features. Said in steps of one axis
  each, as XLA would replicate the whole batch on its way from one sharding to
  the other.

  Args:
    x: the embedded tokens.
    rows: the axes that they are split over; with `ROWS`, tokens are split too.
  """
  x = constrain(x, "replica", None, PARTS)
  if splits_tokens():
    x = constrain(x, ROWS, None, "sequence")
  return constrain_tokens(x) if rows == ROWS else constrain(x, rows)


def gather_tokens(x: Array) -> Array:
  """Gives keys or values `[B, K, T, H]` of all tokens to each device.

  Their gradient is added up and scattered again.
  """
  if not splits_tokens():
    return x
  return _moved(x, (ROWS, "tensor"), (ROWS, "tensor", "sequence"))


def gathered(params: Params) -> Params:
  """Parameters split over `tensor` alone, inside a program.

  For a loop that reads all of them again and again, such as decoding: called
  before the loop, it moves them once. Their gradient is scattered again.
  """
  if _on_one_device():
    return params

  def place(path, leaf):
    spec = _wanted(path, leaf.ndim)
    whole = tuple(None if axes == PARTS else axes for axes in spec)
    return _moved(leaf, whole, spec)

  return jax.tree_util.tree_map_with_path(place, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: Array, to: tuple[Axes, ...], back: tuple[Axes, ...]) -> Array:
  """`x` sharded as `to`, its gradient as `back`."""
  del back
  return constrain(x, *to)


def _moved_forward(x, to, back):
  return _moved(x, to, back), None


def _moved_backward(to, back, saved, d):
  # The transposed constraint would have every device hold the whole sum. This
  # one lets it be reduced and scattered in one pass.
  del to, saved
  return (constrain(d, *back),)


_moved.defvjp(_moved_forward, _moved_backward)


def row_count(mesh: AnyMesh) -> int:
  """The number of parts that the rows of a batch are split into."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_rows(mesh: AnyMesh, count: int, field: str) -> None:
  """Raises a UserError unless `count` rows split evenly over the mesh."""
  parts = row_count(mesh)
  if count % parts:
    above = -(-count // parts) * parts
    nearest = f"{above - parts} or {above}" if count > parts else f"{above}"
    raise UserError(
      f"{field} gives {count} rows, which cannot be split evenly over "
      f"replica x fsdp = {parts} devices; make it {nearest}, or lower "
      "config.mesh (-1 takes as many devices as fit)"
    )


def check_tokens(mesh: AnyMesh, tokens: int, field: str) -> None:
  """Raises a UserError unless a row's tokens split over `sequence`."""
  parts = mesh.shape["sequence"]
  if tokens % parts:
    above = -(-tokens // parts) * parts
    raise UserError(
      f"config.mesh.sequence must divide {field}, which is {tokens}, got "
      f"{parts}; make it {math.gcd(tokens, parts)}, or {field} {above}"
    )


def check_heads(mesh: AnyMesh, heads: int, model: str) -> None:
  """Raises a UserError unless a model's heads split evenly over `tensor`."""
  parts = mesh.shape["tensor"]
  if heads % parts:
    fitting = [n for n in range(1, min(heads, parts) + 1) if heads % n == 0]
    raise UserError(
      f"config.mesh.tensor must divide the {heads} heads of {model}, got "
      f"{parts}; make it {fitting[-1]}"
    )


def shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
  """A sharding for every leaf of a parameter-like tree.

  It goes by the last names and the shape of a leaf, so it works for parameters,
  optimizer states and whole train states. A dimension that does not divide
  evenly is not split.
  """

  def place(path, leaf):
    wanted = _wanted(path, len(leaf.shape))
    fits = [
      fitting(axes, size, mesh.shape)
      for axes, size in zip(wanted, leaf.shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))

  return jax.tree_util.tree_map_with_path(place, tree)


def with_shardings(shapes: PyTree, mesh: Mesh) -> PyTree:
  """A tree of shapes, each with its sharding; see `shardings`."""

  def place(shape, where):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

  return jax.tree.map(place, shapes, shardings(shapes, mesh))


def put(tree: Params, mesh: Mesh) -> Params:
  """Puts the tree on the mesh; see `shardings`."""
  return jax.device_put(tree, shardings(tree, mesh))


def _wanted(path: tuple, ndim: int) -> tuple[Axes, ...]:
  """The axes that a leaf's dimensions are split over; () = none of them."""
  # Dict keys and fields of dataclasses have a name, list indices do not.
  names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
  # A leaf is known by its module and its own name: `dense`, `kernel`.
  owner, leaf = ["", "", *names][-2:]
  if leaf == "embedding" or (leaf == "kernel" and owner in SPLIT_INPUTS):
    wanted = ("tensor", PARTS)
  elif leaf == "kernel" and owner in SPLIT_OUTPUTS:
    wanted = (PARTS, "tensor")
  elif leaf in ("kernel", "lora_a", "lora_b"):
    wanted = (PARTS, None)  # other layers, and adapters, whose rank is small
  else:
    return ()  # biases and norms: small
  if ndim < 2:
    return ()  # factored optimizer statistics
  # Layers are stacked on leading axes, which are never split: a scan over them
  # would gather all layers on every device.
  return (*[None] * (ndim - 2), *wanted)
