"""Puts tensors from files onto devices, one layer at a time."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.hf.safetensors import Stored

# Above this many bytes a stacked leaf is filled on the device layer by layer,
# so that the host never holds all of it.
STAGE_BYTES = 256 * 2**20


def place(
  sources: Sequence[Stored],
  axes: tuple[int, ...],
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: jax.sharding.Sharding | None = None,
  stage_bytes: int | None = None,
) -> jax.Array:
  """One parameter from its file tensors.

  Args:
    sources: the layers of a stacked leaf, or the one tensor of another.
    axes: order of a tensor's axes in ours, () = the same.
    shape: of the whole parameter, with the layer axis if it is stacked.
    dtype: of the parameter.
    sharding: where it goes; None = the default device.
    stage_bytes: None = `STAGE_BYTES`, and no limit on a CPU, where the staged
      array becomes the parameter.
  """
  stacked = len(shape) > len(sources[0].shape)
  if sharding is None:
    indices = {None: tuple(slice(None) for _ in shape)}
    platform = jax.default_backend()
  else:
    indices = sharding.addressable_devices_indices_map(shape)
    platform = next(iter(indices)).platform
  ranges = {d: _ranges(index, shape) for d, index in indices.items()}
  size = dtype.itemsize * max(_size(r) for r in ranges.values())
  if stage_bytes is None:
    stage_bytes = size if platform == "cpu" else STAGE_BYTES
  if stacked and size > stage_bytes:
    parts = _fill_devices(sources, axes, dtype, ranges)
  else:
    parts = _fill_host(sources, axes, dtype, ranges, stacked)
  if sharding is None:
    return parts[0]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _ranges(index, shape) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _size(ranges) -> int:
  return int(np.prod([stop - start for start, stop in ranges]))


def _fill_host(sources, axes, dtype, ranges, stacked) -> list[jax.Array]:
  """One host array for each distinct shard, each file tensor read once."""
  shards = {r: _aligned([b - a for a, b in r], dtype) for r in ranges.values()}
  for layer, source in enumerate(sources):
    tensor = _read(source, axes)
    for where, shard in shards.items():
      if stacked:
        (start, stop), *where = where
        if not start <= layer < stop:
          continue
        shard = shard[layer - start]
      piece = tensor[tuple(slice(a, b) for a, b in where)]
      np.copyto(shard, piece, casting="unsafe")
  return [jax.device_put(shards[r], device) for device, r in ranges.items()]


def _fill_devices(sources, axes, dtype, ranges) -> list[jax.Array]:
  """Zeros on every device, overwritten in place by one layer after another."""
  arrays = {
    device: jnp.zeros([b - a for a, b in r], dtype, device=device)
    for device, r in ranges.items()
  }
  for layer, source in enumerate(sources):
    tensor = _read(source, axes)
    for device, (first, *rest) in ranges.items():
      if first[0] <= layer < first[1]:
        piece = tensor[tuple(slice(a, b) for a, b in rest)].astype(dtype)
        piece = jax.device_put(np.ascontiguousarray(piece), device)
        index = jax.device_put(np.int32(layer - first[0]), device)
        arrays[device] = _set_layer(arrays[device], piece, index)
    # Transfers run ahead of us and would pile up their host copies.
    jax.block_until_ready(list(arrays.values()))
  return list(arrays.values())


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(array, piece, index):
  return jax.lax.dynamic_update_index_in_dim(array, piece, index, 0)


def _read(source: Stored, axes: tuple[int, ...]) -> np.ndarray:
  tensor = source.read()
  return tensor.transpose(axes) if axes else tensor


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array that JAX's CPU backend takes over uncopied."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
