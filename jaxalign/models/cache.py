"""Keys and values, and the attention that reads them.

A row attends to several parts at once: its own tokens, the prompt that it
shares with the other samples of that prompt, and a prefix that all prompts
share. What is shared is stored once: row b of B reads group b // (B // G), and
its keys are loaded once for all the rows that share them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Decoding unrolls the layers of models up to this depth, and scans those of
# deeper ones: an unrolled program of 80 layers takes too long to compile.
UNROLLED = 32

Layers = Float[Array, "*L G K C H"] | tuple[Float[Array, "G K C H"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
  """Keys and values of all layers, kept for G groups of rows.

  Stacked on a layer axis, or a tuple with one array per layer: a decoding loop
  that unrolls the layers takes them apart once, because slicing out a layer at
  every step copies it.
  """

  k: Layers  # keys, already rotated to their positions
  v: Layers
  positions: Int[Array, "G C"]  # position of each key in its text
  mask: Bool[Array, "G C"]  # True = a real key, attended to

  def unstack(self) -> "KV":
    """The same with one array per layer, or `self` beyond `UNROLLED` layers."""
    if len(self.k) > UNROLLED:
      return self
    return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))


NEGATIVE = -1e30  # left out; finite, so that leaving out all gives no NaN


def attend(
  q: Float[Array, "B T N H"],
  parts: Sequence[tuple[Array, Array, Array]],
  *,
  scale: float,
  cap: float = 0.0,
) -> Float[Array, "B T N H"]:
  """softmax(q kᵀ · scale) v over the keys of all parts together.

  Args:
    q: queries; N = R K query heads share K key heads in runs of R.
    parts: `(k, v, mask)` with k and v `[G, K, C, H]`, G dividing B, and mask
      bool, broadcastable to `[B, T, C]`; True = attended to.
    scale: multiplies the dot products, usually 1 / sqrt(H).
    cap: above 0, the products x become cap tanh(x / cap) (Gemma 2).

  Returns:
    The attended values, in q's dtype; softmax in float32.
  """
  rows, length, heads, width = q.shape
  # Queries are scaled instead of logits: fewer numbers where C > H.
  q = q * jnp.asarray(scale, q.dtype)
  logits = [_logits(q, k, mask, cap) for k, _, mask in parts]
  # One softmax over all parts, then a sum of values part by part: the keys are
  # never copied into one array.
  values = [v for _, v, _ in parts]
  joined = jnp.concatenate(logits, axis=-1)
  if q.dtype == joined.dtype:
    out = _weighted_sum(jax.nn.softmax(joined, axis=-1), values)
  else:
    out = _rounded_softmax_sum(joined, values)
  assert out.dtype == q.dtype, (out.dtype, q.dtype)
  return out.reshape(rows, length, heads, width)


def _weighted_sum(
  weights: Float[Array, "B K R T C"], values: Sequence[Array]
) -> Float[Array, "B T K R H"]:
  """Σ weights · value over the values of all parts."""
  out, start = jnp.zeros((), weights.dtype), 0
  for v in values:
    size = v.shape[2]
    out = out + _mix(weights[..., start : start + size], v)
    start += size
  return out


@jax.custom_vjp
def _rounded_softmax_sum(
  logits: Float[Array, "B K R T C"], values: Sequence[Array]
) -> Float[Array, "B T K R H"]:
  """`_weighted_sum` of a float32 softmax that is rounded to the values' type.

  For its gradient it keeps the float32 weights alone. Autodiff would keep the
  rounded ones as well, which are a third of what attention keeps.
  """
  return _rounded_softmax_sum_forward(logits, values)[0]


def _rounded_softmax_sum_forward(logits, values):
  weights = jax.nn.softmax(logits, axis=-1)
  out = _weighted_sum(weights.astype(values[0].dtype), values)
  return out, (weights, values)


def _rounded_softmax_sum_backward(saved, d):
  weights, values = saved
  rounded = weights.astype(d.dtype)
  # Transposes, as a vjp would compute the sum once more and drop it.
  of_weights = jax.linear_transpose(lambda w: _weighted_sum(w, values), rounded)
  of_values = jax.linear_transpose(lambda v: _weighted_sum(rounded, v), values)
  (d_weights,), (d_values,) = of_weights(d), of_values(d)
  # Through the softmax, in the order of jax.nn.softmax.
  scaled = d_weights.astype(weights.dtype) * weights
  total = scaled.sum(axis=-1, keepdims=True)
  return scaled - weights * total, d_values


_rounded_softmax_sum.defvjp(
  _rounded_softmax_sum_forward, _rounded_softmax_sum_backward
)


def _logits(
  q: Array, k: Array, mask: Array, cap: float
) -> Float[Array, "B K R T C"]:
  rows, length, heads, width = q.shape
  groups, kv_heads = k.shape[:2]
  # Rows of a group are consecutive, so a reshape separates the two axes.
  shape = (groups, rows // groups, length, kv_heads, heads // kv_heads, width)
  # g groups, s rows of a group, k key heads, r query heads of a key head.
  x = jnp.einsum(
    "gstkrh,gkch->gskrtc",
    q.reshape(shape),
    k,
    preferred_element_type=jnp.float32,
  )
  x = x.reshape(rows, *x.shape[2:])
  x = cap * jnp.tanh(x / cap) if cap else x
  # [B, T, C] to [B, 1, 1, T, C]: all heads have the same mask.
  return jnp.where(mask[:, None, None], x, NEGATIVE)


def _mix(weights: Array, v: Array) -> Float[Array, "B T K R H"]:
  rows, groups = weights.shape[0], v.shape[0]
  shape = (groups, rows // groups, *weights.shape[1:])
  # The letters are those of `_logits`.
  out = jnp.einsum("gskrtc,gkch->gstkrh", weights.reshape(shape), v)
  return out.reshape(rows, *out.shape[2:])
