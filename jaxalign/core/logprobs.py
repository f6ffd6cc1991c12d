"""Log-probabilities without ever holding `[B, T, V]` logits.

Hidden states pass through the output matrix in chunks. Positions that count
are moved to the front first and chunks in which nothing counts are skipped: a
completion-only loss pays for the completion alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Unembed = Callable[[Array], Array]  # hidden [..., D] -> float32 logits [..., V]


def over_counted(
  fn: Callable[..., Any],
  mask: Bool[Array, "B T"],
  *arrays: Array,
  tokens_a_chunk: int = 512,
) -> Any:
  """`fn` of the positions where `mask` is True, zero elsewhere.

  Args:
    fn: takes chunks `[B, C, ...]` of the arrays, returns a pytree of `[B, C]`.
    mask: True = evaluate here.
    *arrays: `[B, T, ...]`; each position is treated on its own.
    tokens_a_chunk: about how many positions are evaluated at once.

  Returns:
    The pytree of `[B, T]` values, in place. Differentiable; a chunk's
    intermediates are recomputed in the backward pass.
  """
  rows, length = mask.shape
  columns = max(1, min(length, tokens_a_chunk // rows))
  order = jnp.argsort(~mask, axis=1, stable=True)
  front = [_take(x, order) for x in (mask, *arrays)]
  pad = -length % columns
  chunks = [_chunks(x, pad, columns) for x in front]
  shape = jax.eval_shape(fn, *[x[0] for x in chunks[1:]])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

  @jax.checkpoint
  def body(_, chunk):
    counted, *values = chunk
    out = jax.lax.cond(
      counted.any(), lambda v: fn(*v), lambda v: zeros, tuple(values)
    )
    return None, jax.tree.map(lambda x: jnp.where(counted, x, 0), out)

  _, out = jax.lax.scan(body, None, tuple(chunks))
  back = jnp.argsort(order, axis=1)

  def place(x):
    x = jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length]
    return _take(x, back)

  return jax.tree.map(place, out)


def weighted_nll(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  unembed: Unembed,
  *,
  tokens_a_chunk: int = 512,
) -> Float[Array, ""]:
  """Σ −w log p(target), in nats; positions of weight 0 cost nothing.

  Cheaper than a sum over `target_logprobs`: as the weights are known here,
  d logits = w (softmax − one-hot) is at hand with the logits, and
  differentiating this makes a chunk's gradients at once, instead of keeping
  its logits or computing them again. Three products with the output matrix
  are left of four.

  Args:
    hidden: the state *before* each target, i.e. already shifted by one.
    targets: ids.
    weights: w, say 1 / tokens of the whole batch; no gradient flows into it.
    unembed: the model's output matrix; what it closes over gets gradients.
    tokens_a_chunk: positions whose logits are held at once, a device.
  """
  parts = _row_parts(weights.shape[0])
  hidden, targets, weights = (
    x.reshape(parts, -1, *x.shape[2:]) for x in (hidden, targets, weights)
  )
  size = min(tokens_a_chunk, weights.shape[1])
  applies = {}
  for n in {size, _tail(size)}:
    example = jnp.zeros((n, hidden.shape[-1]), hidden.dtype)
    applies[n], matrix = jax.closure_convert(unembed, example)
  apply = lambda h, *matrix: applies[len(h)](h, *matrix)
  return _weighted_nll(apply, size, matrix, hidden, targets, weights)


def _tail(size: int) -> int:
  """Positions in the smaller chunks that take what whole ones leave."""
  return max(1, size // 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_nll(apply, size, matrix, hidden, targets, weights):
  def body(h, t, w, total):
    return total + _chunk_nll(apply(h, *matrix), t, w)[0]

  total = jnp.zeros(weights.shape[0])
  total, _ = _over_chunks(body, size, hidden, targets, weights, total)
  return total.sum()


def _weighted_nll_forward(apply, size, matrix, hidden, targets, weights):
  def body(h, t, w, carry):
    total, d_matrix = carry
    logits, pull = jax.vjp(lambda h, m: apply(h, *m), h, matrix)
    nll, d_logits = _chunk_nll(logits, t, w)
    d_h, more = pull(d_logits)
    return (total + nll, jax.tree.map(jnp.add, d_matrix, more)), d_h

  # Each device sums up its own rows' gradients; they meet after the loop.
  parts = weights.shape[0]
  zeros = [jnp.zeros((parts, *m.shape), m.dtype) for m in matrix]
  carry = jnp.zeros(parts), zeros
  (total, d_matrix), d_hidden = _over_chunks(
    body, size, hidden, targets, weights, carry, jnp.zeros_like(hidden)
  )
  return total.sum(), ([d.sum(0) for d in d_matrix], d_hidden)


def _weighted_nll_backward(apply, size, saved, d):
  del apply, size
  scaled = jax.tree.map(lambda x: x * d.astype(x.dtype), saved)
  return *scaled, None, None


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


def _chunk_nll(logits: Array, targets: Array, w: Array) -> tuple[Array, Array]:
  """Σ −w log p(target) of a chunk `[C, V]`, and its gradient by the logits."""
  top = logits.max(axis=-1, keepdims=True)
  e = jnp.exp(logits - top)
  total = e.sum(axis=-1, keepdims=True)
  nll = jnp.log(total[:, 0]) + top[:, 0] - _select(logits, targets)
  hit = jnp.arange(logits.shape[-1]) == targets[:, None]
  d_logits = jnp.where(w[:, None] == 0, 0, w[:, None] * (e / total - hit))
  return jnp.where(w == 0, 0, w * nll).sum(), d_logits


def _over_chunks(body, size, hidden, targets, weights, carry, d_hidden=None):
  """Folds `body` over each part's counted positions, `size` at a time.

  With `d_hidden`, body also returns a chunk's gradient by its hidden states,
  which is written into it.
  """
  length = weights.shape[1]
  order = jnp.argsort(weights == 0, axis=1, stable=True)
  order = jnp.pad(order, [(0, 0), (0, size)], constant_values=length)
  take = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))
  take_or_0 = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))
  place = jax.vmap(lambda x, at, y: x.at[at].set(y, mode="drop"))

  def step(i, state, start, size):
    carry, d_hidden = state
    at = jax.lax.dynamic_slice_in_dim(order, start + i * size, size, axis=1)
    chunk = take(hidden, at), take(targets, at), take_or_0(weights, at)
    out = jax.vmap(body)(*chunk, carry)
    if d_hidden is None:
      return out, None
    return out[0], place(d_hidden, at, out[1])

  # Whole chunks, and up to half of one in quarters: three tokens too many
  # should not cost as much as five hundred.
  count, tail = (weights != 0).sum(axis=1).max(), _tail(size)
  whole = (count + size // 2) // size
  rest = jnp.maximum(count - whole * size, 0)
  state = carry, d_hidden
  for times, start, n in (
    (whole, 0, size),
    ((rest + tail - 1) // tail, whole * size, tail),
  ):
    run = functools.partial(step, start=start, size=n)
    state = jax.lax.fori_loop(0, times, run, state)
  return state


def _row_parts(rows: int) -> int:
  """Over how many devices the rows lie on the mesh in force; 1 without one."""
  shape = jax.sharding.get_abstract_mesh().shape
  parts = shape.get("replica", 1) * shape.get("fsdp", 1)
  return parts if rows % parts == 0 else 1


def target_logprobs(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
) -> Float[Array, "B T"]:
  """The log p(target) at temperature 1 from the states that predict it.

  Args:
    hidden: the state *before* each target, i.e. already shifted by one.
    targets: ids.
    mask: True = wanted; other positions are 0.
    unembed: the model's output matrix.
  """

  def fn(h, t):
    return _select(jax.nn.log_softmax(unembed(h)), t)

  return over_counted(fn, mask, hidden, targets)


def logprobs_and_kl(
  hidden: Float[Array, "B T D"],
  prior: Float[Array, "B T E"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
  prior_unembed: Unembed,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """The log p(target) and the exact KL(prior ‖ policy) at each position.

  KL = Σ_v p₀(v) (log p₀(v) − log p(v)) over the whole vocabulary, in nats.
  No gradient flows into the prior.
  """

  def fn(h, h0, t):
    logp = jax.nn.log_softmax(unembed(h))
    logp0 = jax.lax.stop_gradient(jax.nn.log_softmax(prior_unembed(h0)))
    prior_p = jnp.exp(logp0)
    # 0 log 0 = 0: an id that cannot occur (logit -inf) adds nothing.
    terms = jnp.where(prior_p > 0, prior_p * (logp0 - logp), 0)
    return _select(logp, t), terms.sum(axis=-1)

  return over_counted(fn, mask, hidden, prior, targets)


def logprobs_and_entropy(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """The log p(target) and the entropy −Σ_v p(v) log p(v), in nats."""

  def fn(h, t):
    logp = jax.nn.log_softmax(unembed(h))
    return _select(logp, t), _entropy(logp)

  return over_counted(fn, mask, hidden, targets)


def reverse_kl(
  hidden: Float[Array, "B T D"],
  prior: Float[Array, "B T E"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
  prior_unembed: Unembed,
) -> Float[Array, "B T"]:
  """The exact KL(policy ‖ prior) at each position, in nats.

  Σ_v p(v) (log p(v) − log p₀(v)); no gradient flows into the prior.
  """

  def fn(h, h0):
    logp = jax.nn.log_softmax(unembed(h))
    logp0 = jax.lax.stop_gradient(jax.nn.log_softmax(prior_unembed(h0)))
    p = jnp.exp(logp)
    return jnp.where(p > 0, p * (logp - logp0), 0).sum(axis=-1)

  return over_counted(fn, mask, hidden, prior)


def _entropy(logp: Array) -> Array:
  p = jnp.exp(logp)
  return -jnp.where(p > 0, p * logp, 0).sum(axis=-1)


def _select(logp: Array, targets: Array) -> Array:
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def _take(x: Array, order: Array) -> Array:
  index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _chunks(x: Array, pad: int, columns: int) -> Array:
  x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  x = x.reshape(x.shape[0], -1, columns, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)
