"""Attention over whole texts: which kernel computes it, and how it is called.

Dense attention keeps `[B, N, T, T]` weights for the backward pass. A flash
kernel (Dao 2023) computes them again block by block and keeps one number a
query. Three are used here, and the dense form is their reference:

* `splash`, Pallas on TPUs. It skips the blocks that causality or a window
  leaves out.
* `cudnn`, cuDNN's flash attention through `jax.nn.dot_product_attention`. It
  takes any mask, as a `[B, 1, T, T]` bias.
* `triton`, Pallas on GPUs, for what cuDNN does not take: float32 and wide
  heads.

The kernels know two masks: tokens attend to earlier columns, of their own
segment. Windows are counted in columns, so the tokens of a text must stand next
to each other. Where two texts share a prompt, the kernel runs twice, and each
text takes its part of the run in which it and the prompt are one segment.
"""

import dataclasses
import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models.cache import attend
from jaxalign.models.config import CausalConfig
from jaxalign.parallel.mesh import ROWS, AnyMesh, row_count

KINDS = ("dense", "cudnn", "triton", "splash")
# What `auto` tries on each platform, in this order; then dense.
PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
SHORTEST = 128  # tokens of the shortest texts that a kernel is called for
WIDEST = 256  # features of the widest heads that kernels were compiled for
AMPERE = (8, 0)  # compute capability from which kernels on GPUs run
# JAX lets cuDNN have heads above 128 from Hopper on; its backward pass takes
# them on Hopper alone (cuDNN's table of supported heads).
HOPPER = (9, 0)
# Axes that split a kernel's heads, the preferred ones first.
HEADS = (("tensor", "sequence"), ("tensor",))
INTERPRET = False  # tests set it: the kernels then run on any platform

_log = logging.getLogger(__name__)

# (queries, keys, values, segment ids) -> attended values, of one device's rows
# and heads.
Kernel = Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Mask:
  """What decides which kernels can compute a call; all know segments.

  Attributes:
    windows: whether a layer sees fewer tokens than a text has.
    capped: whether a tanh bounds the logits.
    shared_prompt: whether texts of a row share a prompt.
    past: whether keys of a cache are read as well.
    length: T, columns of a row.
  """

  windows: bool = False
  capped: bool = False
  shared_prompt: bool = False
  past: bool = False
  length: int = SHORTEST


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of `KINDS`, and what kept the faster ones out ("" = nothing)."""

  kind: str
  reason: str = ""

  def __str__(self) -> str:
    return f"{self.kind}, as {self.reason}" if self.reason else self.kind


def choose(
  asked: str,
  platform: str,
  dtype: str,
  head_dim: int,
  mask: Mask,
  capability: tuple[int, int] = (0, 0),
) -> Choice:
  """The fastest attention that can compute a mask on a platform.

  Args:
    asked: one of `KINDS`, or "auto".
    platform: "cpu", "gpu" or "tpu", of the devices that the program is compiled
      for.
    dtype: of queries, keys and values.
    head_dim: H, features of a head.
    mask: what is masked.
    capability: of the GPU, its compute capability.

  Returns:
    What was asked for, or dense attention where that cannot be.
  """
  if asked == "dense":
    return Choice("dense")
  usable = PREFERRED.get(platform, ())
  if asked != "auto" and asked not in usable:
    return Choice("dense", f"{asked} does not run on a {platform}")
  reasons: list[str] = []
  for kind in usable if asked == "auto" else (asked,):
    reason = refusal(kind, dtype, head_dim, mask, capability)
    if not reason:
      return Choice(kind, "; ".join(reasons))
    reasons.append(reason)
  return Choice("dense", "; ".join(reasons))


def refusal(
  kind: str,
  dtype: str,
  head_dim: int,
  mask: Mask,
  capability: tuple[int, int] = HOPPER,
) -> str:
  """Why a kernel cannot compute a mask; "" = it can. Args as `choose`."""
  if mask.past:
    return f"{kind} reads no cache"
  if mask.length < SHORTEST:
    return f"{kind} pays from {SHORTEST} tokens on"
  if kind in ("cudnn", "triton") and capability < AMPERE:
    return f"{kind} needs an NVIDIA GPU of compute capability 8.0 or above"
  if head_dim > WIDEST:
    return f"{kind} takes heads of up to {WIDEST} features, not {head_dim}"
  if kind == "cudnn":
    widest = WIDEST if capability == HOPPER else WIDEST // 2
    if dtype not in ("bfloat16", "float16"):
      return f"cudnn takes bfloat16, not {dtype}"
    if head_dim > widest or head_dim % 8:
      return (
        f"cudnn takes heads of 8, 16, ... {widest} features on this GPU, not "
        f"{head_dim}"
      )
  if kind == "triton" and mask.windows:
    return "triton knows no window"
  if kind in ("cudnn", "triton") and mask.capped:
    return f"{kind} does not cap logits"
  if kind == "splash" and mask.windows and mask.shared_prompt:
    return "splash counts a window in columns, which a shared prompt shifts"
  return ""


def kind_of_call(config: CausalConfig, mask: Mask) -> str:
  """The attention of one call of a model: `config.attention`, or "dense".

  It says once why a kernel cannot compute a mask. Nothing is said of short
  texts and of calls that read a cache, which are dense everywhere.

  Args:
    config: of the model.
    mask: what the call masks.
  """
  kind = config.attention
  if kind == "dense" or mask.past or mask.length < SHORTEST:
    return "dense"
  reason = refusal(kind, config.dtype, config.head_dim, mask)
  # A kernel would compute on every device of `sequence` what one can.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("sequence", 1) > 1 and not reason:
    parts = _size(mesh, HEADS[0])
    if config.kv_heads % parts:
      reason = f"sequence x tensor = {parts} does not divide their heads"
  if reason:
    _say_once(f"attention: some texts are read by the dense form, as {reason}")
  return "dense" if reason else kind


@functools.cache
def _say_once(line: str) -> None:
  _log.warning("%s", line)


def sees_part(windows: Sequence[int] | None, length: int) -> bool:
  """Whether a layer sees fewer than `length` tokens; see `CausalConfig`."""
  return any(0 < window < length for window in windows or ())


def attend_text(
  kind: str,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  mask: Bool[Array, "B T T"],
  segment_ids: Int[Array, "B T"],
  prompt_segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
  cap: float = 0.0,
  window: Int[Array, ""] | None = None,
  windows: Sequence[int] | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q kᵀ · scale) v within the texts of each row, by a kernel.

  Args:
    kind: one of `KINDS`, which can compute the mask; see `kind_of_call`.
    q: queries; N = R K query heads share K key heads in runs of R.
    k: keys.
    v: values.
    mask: what the segments and the window say, True = attended to. cuDNN reads
      it; the Pallas kernels read what it was made of.
    segment_ids: see `CausalLM.__call__`.
    prompt_segment_ids: likewise; at most two texts share a prompt p, and they
      are the segments p + 1 and p + 2.
    scale: as `cache.attend`.
    cap: as `cache.attend`.
    window: of this layer, 0 = all; a traced number, one of `windows`.
    windows: of all layers; None = no layer has one.
  """
  if kind == "dense":
    return attend(q, [(k, v, mask)], scale=scale, cap=cap)
  # As in the dense form; the kernels multiply by nothing.
  q = q * jnp.asarray(scale, q.dtype)
  if kind == "cudnn":
    return _on_mesh(_cudnn, q, k, v, mask)
  if prompt_segment_ids is None:
    return _by_window(kind, q, k, v, segment_ids, cap, window, windows)
  # Once with the prompt and its first text as one segment, once with its
  # second. Causality keeps the prompt from reading either.
  place = segment_ids - prompt_segment_ids  # 0: no text shares, or the prompt

  def with_text(number):
    ids = jnp.where(place == number, prompt_segment_ids, segment_ids)
    return _by_window(kind, q, k, v, ids, cap, window, windows)

  second = (place == 2)[:, :, None, None]
  return jnp.where(second, with_text(2), with_text(1))


def _by_window(kind, q, k, v, segment_ids, cap, window, windows):
  """The Pallas kernel of a layer; `window` is traced, a kernel's is static."""
  length = q.shape[1]
  sizes = tuple(dict.fromkeys(windows or (0,)))
  kernels = []
  for size in sizes:
    size = size if size < length else 0
    if kind == "splash":
      kernel = functools.partial(_splash, window=size, cap=cap)
    else:
      assert size == 0, size
      kernel = _triton
    kernels.append(functools.partial(_on_mesh, kernel))
  # Layers that differ are branches, whose residuals share their memory.
  if len({size if size < length else 0 for size in sizes}) == 1:
    return kernels[0](q, k, v, segment_ids)
  which = jnp.argmax(jnp.asarray(sizes) == window)
  return jax.lax.switch(which, kernels, q, k, v, segment_ids)


def _on_mesh(
  kernel: Kernel, q: Array, k: Array, v: Array, per_row: Array
) -> Array:
  """Runs a kernel on each device's own rows and heads.

  The compiler cannot split a kernel by itself. Rows or heads that do not split
  evenly are computed by every device.
  """
  # Of the arrays that the program is given, where no mesh is in force.
  mesh = jax.sharding.get_abstract_mesh()
  mesh = jax.typeof(q).sharding.mesh if mesh.empty else mesh
  if mesh.empty or mesh.size == 1:
    return kernel(q, k, v, per_row)
  rows = ROWS if q.shape[0] % row_count(mesh) == 0 else None
  # A kernel reads whole texts. Where tokens are split, heads are split instead
  # (DeepSpeed-Ulysses, Jacobs 2023): each device gets all tokens of its heads.
  heads = next(
    (axes for axes in HEADS if k.shape[1] % _size(mesh, axes) == 0), None
  )
  queries = PartitionSpec(rows, None, heads)
  keys = PartitionSpec(rows, heads)
  run = jax.shard_map(
    kernel,
    mesh=mesh,
    in_specs=(queries, keys, keys, PartitionSpec(rows)),
    out_specs=queries,
    check_vma=False,  # kernels do not say over which axes their results vary
  )
  return run(q, k, v, per_row)


def _size(mesh: AnyMesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[name] for name in axes)


def _splash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segment_ids: Int[Array, "B T"],
  *,
  window: int,
  cap: float,
) -> Float[Array, "B T N H"]:
  # Imported where they run: JAX calls these modules experimental.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length = q.shape[1]
  # Blocks are multiples of 128; larger ones do more for each byte that is read.
  padded = -(-length // 128) * 128
  block = next(size for size in (512, 256, 128) if padded % size == 0)
  shape = (padded, padded)
  if window:
    mask = masks.LocalMask(shape, (window - 1, 0), 0)
  else:
    mask = masks.CausalMask(shape)
  blocks = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * q.shape[2]),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=blocks,
    attn_logits_soft_cap=cap or None,
    interpret=INTERPRET,
  )
  # [N, T, H] for each row.
  q = _padded(jnp.swapaxes(q, 1, 2), 2, padded)
  k, v = _padded(k, 2, padded), _padded(v, 2, padded)
  ids = _padded(segment_ids, 1, padded)
  out = jnp.asarray(jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids)))
  return jnp.swapaxes(out[:, :, :length], 1, 2)


def _triton(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
  with warnings.catch_warnings():
    # From 0.11 on JAX deprecates the module in favour of tokamax, whose one
    # call cannot do segments on TPUs; see docs/design/011-attention.md.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import attention as triton

  length, heads = q.shape[1:3]
  # Blocks as large as the shared memory of an A6000 (99 KiB) holds them, found
  # by compiling for it; powers of two.
  bytes_a_token = q.dtype.itemsize * (1 << (q.shape[3] - 1).bit_length())
  forward = max(16, min(128, 2**14 // bytes_a_token))
  backward = max(16, min(32, 2**13 // bytes_a_token))
  padded = -(-length // forward) * forward
  # It knows no shared key heads, and wants [B, T, N, H].
  repeats = heads // k.shape[1]
  k, v = (
    _padded(jnp.swapaxes(jnp.repeat(x, repeats, axis=1), 1, 2), 1, padded)
    for x in (k, v)
  )
  out = triton.mha(
    _padded(q, 1, padded),
    k,
    v,
    _padded(segment_ids, 1, padded),
    1.0,
    True,
    triton.BlockSizes(forward, forward, *[backward] * 4),
    interpret=INTERPRET,
  )
  return out[:, :length]


def _cudnn(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  mask: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
  if jax.default_backend() != "gpu" and not INTERPRET:
    _assume_cudnn()
  length = q.shape[1]
  # Training with a mask needs an even length.
  even = length + length % 2
  k, v = (_padded(jnp.swapaxes(x, 1, 2), 1, even) for x in (k, v))
  mask = _padded(_padded(mask, 1, even), 2, even)
  out = jax.nn.dot_product_attention(
    _padded(q, 1, even),
    k,
    v,
    mask=mask[:, None],
    scale=1.0,
    is_causal=True,  # the mask says so too, but so it skips half of the blocks
    implementation="xla" if INTERPRET else "cudnn",
  )
  return out[:, :length]


def _padded(x: Array, axis: int, size: int) -> Array:
  """Zeros at the end of an axis, which no earlier column attends to."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


@functools.cache
def _assume_cudnn() -> None:
  """Lets cuDNN's attention be compiled for a GPU that is not there.

  JAX asks the GPU of its own process for its capability and for cuDNN's
  version, and refuses without. `refusal` has gone by the GPU that is compiled
  for. What is compiled in such a process is never run in it.
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  def version() -> int:
    return 91000

  def at_least(capability: str) -> bool:
    return parse_capability(capability) <= HOPPER

  def equal(capability: str) -> bool:
    del capability  # only cards that this version does not know are asked for
    return False

  cudnn.check_cudnn_version = version
  cudnn.check_compute_capability = at_least
  cudnn.is_cuda_compute_capability_equal = equal


def parse_capability(text: str) -> tuple[int, int]:
  """A compute capability as numbers: "8.6" is (8, 6), "" is (0, 0)."""
  found = re.fullmatch(r"(\d+)\.(\d+)", text)
  return (int(found[1]), int(found[2])) if found else (0, 0)
