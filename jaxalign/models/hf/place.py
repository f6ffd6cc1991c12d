"""Puts tensors from files onto devices, one layer at a time."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.hf.weights import FileTensor

# Above this many bytes a stacked leaf is filled on the device layer by layer,
# so that the host never holds all of it.
STAGE_BYTES = 256 * 2**20


def place(
  tensors: Sequence[FileTensor],
  axes: tuple[int, ...],
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: jax.sharding.Sharding | None = None,
  stage_bytes: int | None = None,
) -> jax.Array:
  """One parameter from its tensors in the files.

  A host reads the smallest box of each tensor that covers the shards of its
  own devices, so the hosts of a run do not each read every file in full.

  Args:
    tensors: the layers of a stacked leaf, or the one tensor of another.
    axes: order of a tensor's axes in ours, () = the same.
    shape: of the whole parameter, with the layer axis if it is stacked.
    dtype: of the parameter.
    sharding: of the parameter; None = the default device.
    stage_bytes: a stacked leaf with larger shards is filled on the devices;
      None = `STAGE_BYTES`, and no limit on a CPU, where the array on the host
      becomes the parameter.
  """
  # What this host's devices hold of the parameter.
  stacked = len(shape) > len(tensors[0].shape)
  whole = tuple(slice(None) for _ in shape)
  if sharding is None:
    indices = {None: whole}
    platform = jax.default_backend()
  else:
    indices = sharding.addressable_devices_indices_map(shape)
    platform = next(iter(indices)).platform

  # Each device's shard as (start, stop) per axis. The first axis is that of
  # the layers; a leaf that is not stacked is one layer.
  shards = {}
  for device, index in indices.items():
    ends = [
      s.indices(n)[:2] for s, n in zip(index or whole, shape, strict=True)
    ]
    shards[device] = tuple(ends if stacked else [(0, 1), *ends])
  sizes = {s: [stop - start for start, stop in s] for s in shards.values()}

  # The box to read, and each shard's place in a layer of it.
  box = [
    (min(start for start, _ in ends), max(stop for _, stop in ends))
    for ends in zip(*shards.values(), strict=True)
  ]
  places = {
    shard: tuple(
      slice(start - corner, stop - corner)
      for (start, stop), (corner, _) in zip(shard[1:], box[1:], strict=True)
    )
    for shard in sizes
  }
  # Axis i of ours is axis order[i] in the file; there the box is this.
  order = axes or tuple(range(len(box) - 1))
  index = tuple(slice(*box[1 + i]) for i in np.argsort(order))

  # Filling the shards: on the devices if they are large, else on the host.
  largest = dtype.itemsize * max(math.prod(size) for size in sizes.values())
  if stage_bytes is None:
    stage_bytes = largest if platform == "cpu" else STAGE_BYTES
  if stacked and largest > stage_bytes:
    # Zeros on every device, overwritten in place layer by layer.
    on_device = {
      device: jnp.zeros(sizes[shard], dtype, device=device)
      for device, shard in shards.items()
    }
    for layer in range(*box[0]):
      # A layer is read once for all devices of this host.
      values = tensors[layer].read(index).transpose(order)
      for device, shard in shards.items():
        first, last = shard[0]
        if first <= layer < last:
          piece = np.ascontiguousarray(values[places[shard]].astype(dtype))
          on_device[device] = _set_layer(
            on_device[device],
            jax.device_put(piece, device),
            jax.device_put(np.int32(layer - first), device),
          )
      # Transfers run ahead of us and would pile up their host copies.
      jax.block_until_ready(list(on_device.values()))
    arrays = list(on_device.values())
  else:
    # One array on the host for all devices that hold the same shard.
    on_host = {shard: _aligned(size, dtype) for shard, size in sizes.items()}
    for layer in range(*box[0]):
      values = tensors[layer].read(index).transpose(order)
      for shard, array in on_host.items():
        first, last = shard[0]
        if first <= layer < last:
          piece = values[places[shard]]
          # unsafe: numbers may lose bits
          np.copyto(array[layer - first], piece, casting="unsafe")
    # A leaf that is not stacked has one layer, which is the leaf.
    arrays = [
      jax.device_put(on_host[shard] if stacked else on_host[shard][0], device)
      for device, shard in shards.items()
    ]
  if sharding is None:
    return arrays[0]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@jax.jit(donate_argnums=0)
def _set_layer(array, piece, index):
  # `array` is donated, so the layer is written in place.
  return jax.lax.dynamic_update_index_in_dim(array, piece, index, 0)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array that JAX's CPU backend uses without copying it."""
  # XLA's CPU backend takes over buffers that start at a multiple of 64 bytes.
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
