"""Puts tensors from files onto devices, some rows of a file at a time."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.models.hf.weights import FileTensor, SafeTensor

# Above this many bytes of this host's shards a leaf is filled on the devices,
# so that the host never holds all of it. On a CPU the host's array becomes the
# parameter, whatever its size.
STAGE_BYTES = 256 * 2**20
CPU_STAGE_BYTES = math.inf
# The most bytes of a file that are looked at together; the second number is for
# files on object stores, where every request takes its time.
BLOCK_BYTES = 8 * 2**20
REMOTE_BLOCK_BYTES = 64 * 2**20
# Below this size it does not matter how much of a leaf each host reads.
SMALL_BYTES = 2**20

Ends = Sequence[tuple[int, int]]  # (start, stop) of each axis


def place(
  tensors: Sequence[FileTensor],
  axes: tuple[int, ...],
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
  """One parameter from its tensors in the files.

  A host reads what its own devices need and no more. Of several hosts each
  reads whole rows, its share of them, which the devices then exchange: a shard
  that splits the rows themselves would have every host touch every page of the
  files, and a copy on each host would have each read all of it.

  Args:
    tensors: the layers of a stacked leaf, or the one tensor of another.
    axes: order of a tensor's axes in ours, () = the same.
    shape: of the whole parameter, with the layer axis if it is stacked.
    dtype: of the parameter.
    sharding: of the parameter; None = the default device.
  """
  stacked = len(shape) > len(tensors[0].shape)
  # Axis i of ours is axis order[i] in the file, whose first axis is its rows.
  order = axes or tuple(range(len(tensors[0].shape)))
  rows = order.index(0) + stacked
  if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
    divides = shape[rows] % sharding.mesh.size == 0
    if divides and math.prod(shape) * dtype.itemsize > SMALL_BYTES:
      by_rows, gathered = _by_rows(sharding, rows)
      array = _fill(tensors, order, shape, dtype, by_rows)
      # In two moves, as XLA would replicate the whole array for both at once.
      return jax.device_put(jax.device_put(array, gathered), sharding)
  return _fill(tensors, order, shape, dtype, sharding)


def _by_rows(
  sharding: NamedSharding, rows: int
) -> tuple[NamedSharding, NamedSharding]:
  """Axis `rows` split over all devices, and over those that hold one copy.

  The mesh axes are ordered so that the first becomes the second by a gathering,
  and the second becomes `sharding` when one axis moves to another dimension.
  """
  mesh = sharding.mesh
  spec = [((a,) if isinstance(a, str) else a or ()) for a in sharding.spec]
  spec += [()] * (rows + 1 - len(spec))
  own = spec[rows]
  moved = [name for axes in spec for name in axes if name not in own]
  copies = [name for name in mesh.axis_names if name not in (*own, *moved)]
  front = [None] * rows
  return (
    NamedSharding(mesh, PartitionSpec(*front, (*own, *moved, *copies))),
    NamedSharding(mesh, PartitionSpec(*front, (*own, *moved) or None)),
  )


def _fill(
  tensors: Sequence[FileTensor],
  order: tuple[int, ...],
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """The parameter, each device's shard read from the files."""
  # What this host's devices hold of it, and the box around all of that. The
  # first axis is that of the layers; a leaf that is not stacked is one layer.
  stacked = len(shape) > len(order)
  layered = shape if stacked else (1, *shape)
  whole = tuple(slice(None) for _ in shape)
  if sharding is None:
    indices = {None: whole}
    platform = jax.default_backend()
  else:
    indices = sharding.addressable_devices_indices_map(shape)
    platform = next(iter(indices)).platform
  shards: dict[jax.Device | None, Ends] = {}
  for device, index in indices.items():
    parts = index or whole
    parts = parts if stacked else (slice(None), *parts)
    shards[device] = tuple(
      part.indices(size)[:2] for part, size in zip(parts, layered, strict=True)
    )
  held = list(dict.fromkeys(shards.values()))
  box = [
    (min(start for start, _ in ends), max(stop for _, stop in ends))
    for ends in zip(*held, strict=True)
  ]

  # Arrays to fill: on the devices if they are large, else on the host, where
  # devices that hold the same shard share one.
  sizes = {
    ends: tuple(stop - start for start, stop in ends[not stacked :])
    for ends in held
  }
  total = dtype.itemsize * sum(math.prod(size) for size in sizes.values())
  staged = total > (CPU_STAGE_BYTES if platform == "cpu" else STAGE_BYTES)
  on_device = {
    device: jnp.zeros(sizes[ends], dtype, device=device)
    for device, ends in shards.items()
    if staged
  }
  on_host = {ends: _aligned(sizes[ends], dtype) for ends in held if not staged}

  # Some rows of a file at a time, for all shards that need them.
  rows = 1 + order.index(0)
  for layer in range(*box[0]):
    step = _rows_at_once(tensors[layer])
    for top in range(*box[rows], step):
      block = [(layer, layer + 1), *box[1:]]
      block[rows] = (top, min(top + step, box[rows][1]))
      parts = {ends: _overlap(ends, block) for ends in held}
      needed = [part[rows] for part in parts.values() if part]
      if not needed:
        continue
      block[rows] = (min(a for a, _ in needed), max(b for _, b in needed))
      index = tuple(slice(*block[1 + i]) for i in np.argsort(order))
      values = tensors[layer].read(index).transpose(order)[None]
      # Each shard's numbers, and their place in it.
      pieces = {
        ends: (values[_slices(part, block)], _slices(part, ends))
        for ends, part in parts.items()
        if part
      }
      for ends, array in on_host.items():
        if ends in pieces:
          piece, at = pieces[ends]
          if not stacked:
            piece, at = piece[0], at[1:]
          # unsafe: numbers may lose bits
          np.copyto(array[at], piece, casting="unsafe")
      for device, array in on_device.items():
        if shards[device] in pieces:
          piece, at = pieces[shards[device]]
          starts = np.array([part.start for part in at], np.int32)
          if not stacked:
            piece, starts = piece[0], starts[1:]
          piece = np.ascontiguousarray(piece.astype(dtype))
          on_device[device] = _set_block(
            array, *jax.device_put((piece, starts), device)
          )
      # Transfers run ahead of us and would pile up their host copies.
      jax.block_until_ready(list(on_device.values()))

  arrays = list(on_device.values()) or [
    jax.device_put(on_host[ends], device) for device, ends in shards.items()
  ]
  if sharding is None:
    return arrays[0]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _rows_at_once(tensor: FileTensor) -> int:
  """How many rows of a tensor to read together, >= 1."""
  # Any part of a .bin file costs as much to read as all of it.
  if not isinstance(tensor, SafeTensor):
    return max(tensor.shape[0], 1)
  row = max(tensor.nbytes // max(tensor.shape[0], 1), 1)
  most = BLOCK_BYTES if tensor.is_local else REMOTE_BLOCK_BYTES
  return max(most // row, 1)


def _overlap(
  a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]
) -> Ends:
  """What two boxes share; () = nothing."""
  ends = tuple(
    (max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True)
  )
  return ends if all(start < stop for start, stop in ends) else ()


def _slices(ends: Ends, within: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
  """Where a box is in an array of a larger one."""
  return tuple(
    slice(start - corner, stop - corner)
    for (start, stop), (corner, _) in zip(ends, within, strict=True)
  )


@jax.jit(donate_argnums=0)
def _set_block(array, piece, starts):
  # `array` is donated, so the block is written in place.
  return jax.lax.dynamic_update_slice(array, piece, [*starts])


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array that JAX's CPU backend uses without copying it."""
  # XLA's CPU backend takes over buffers that start at a multiple of 64 bytes.
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
