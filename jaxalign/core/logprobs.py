"""Log-probabilities without ever holding `[B, T, V]` logits.

Hidden states pass through the output matrix in chunks that hold only the
positions that count, so a loss on completions does not pay for the prompts.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Unembed = Callable[[Array], Array]  # hidden [..., D] -> float32 logits [..., V]


def over_counted(
  fn: Callable[..., PyTree],
  mask: Bool[Array, "B T"],
  *arrays: Array,
  tokens_a_chunk: int = 512,
) -> PyTree:
  """Evaluates `fn` at the positions where `mask` is True; zero elsewhere.

  Args:
    fn: takes chunks `[C, ...]` of the arrays, returns a pytree of `[C]`; what
      it closes over gets gradients.
    mask: True = evaluate here.
    *arrays: `[B, T, ...]`; each position is treated by itself.
    tokens_a_chunk: positions evaluated at once on each device.

  Returns:
    The pytree of `[B, T]` values, in place. Differentiable; a chunk's
    intermediates are recomputed in the backward pass.
  """
  # One part per device, so that no chunk mixes the positions of two devices.
  parts = _parts(mask.shape[0])
  flat = [_split(x, parts) for x in (mask, *arrays)]
  size = min(tokens_a_chunk, flat[0].shape[1])
  apply, closed = _hoist(fn, size, flat[1:])
  # A custom gradient, because autodiff of a loop of unknown length is not
  # possible, and it would keep every chunk's logits.
  out = _counted(apply, size, closed, *flat)
  return jax.tree.map(lambda x: _join(x, parts, mask.shape), out)


def _hoist(fn, size, arrays):
  """Turns what `fn` closes over into its first argument; returns both.

  A custom gradient gives gradients to arguments alone.
  """
  # One conversion per chunk size: `closure_convert` fixes the shapes.
  converted, closed = {}, []
  for n in {size, _tail(size)}:
    example = [jnp.zeros((n, *x.shape[2:]), x.dtype) for x in arrays]
    converted[n], closed = jax.closure_convert(fn, *example)
  return lambda closed, *xs: converted[len(xs[0])](*xs, *closed), closed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _counted(apply, size, closed, mask, *arrays):
  def body(counted, chunk, carry):
    out = apply(closed, *chunk)
    return carry, jax.tree.map(lambda x: jnp.where(counted, x, 0), out)

  # Zeros of the results' types, for the positions that do not count.
  chunk = [x[0, :size] for x in arrays]
  shapes = jax.eval_shape(apply, closed, *chunk)
  zeros = jax.tree.map(lambda s: jnp.zeros(mask.shape, s.dtype), shapes)
  return _over_chunks(body, size, mask, arrays, (), zeros)[1]


def _counted_forward(apply, size, closed, mask, *arrays):
  return _counted(apply, size, closed, mask, *arrays), (closed, mask, arrays)


def _counted_backward(apply, size, saved, d):
  # The same chunks again, each with its share of the incoming gradient.
  closed, mask, arrays = saved

  def body(counted, chunk, d_closed):
    *chunk, d = chunk
    # The forward pass kept the inputs alone, so the chunk is run again.
    _, pull = jax.vjp(apply, closed, *chunk)
    more, *found = pull(jax.tree.map(lambda x: jnp.where(counted, x, 0), d))
    return jax.tree.map(jnp.add, d_closed, more), _of_floats(chunk, found)

  # Each device sums up its own rows' gradients; they meet after the loop.
  carry = [jnp.zeros((len(mask), *x.shape), x.dtype) for x in closed]
  zeros = _of_floats(arrays, map(jnp.zeros_like, arrays))
  d_closed, found = _over_chunks(body, size, mask, (*arrays, d), carry, zeros)
  return [_sum_parts(x) for x in d_closed], None, *found


def _of_floats(arrays, gradients):
  """The gradients; None where an array has none, because it holds integers."""
  return [
    d if jnp.issubdtype(x.dtype, jnp.floating) else None
    for x, d in zip(arrays, gradients, strict=True)
  ]


_counted.defvjp(_counted_forward, _counted_backward)


def weighted_nll(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  unembed: Unembed,
  *,
  tokens_a_chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
  """Σ −w log p(target), in nats; positions of weight 0 cost nothing.

  Cheaper than a sum over `target_logprobs`. The weights are known here, so the
  gradient d logits = w (softmax − one-hot) can be computed while a chunk's
  logits exist, and they need not be kept or computed twice. That saves one of
  four products with the output matrix.

  Args:
    hidden: the state *before* each target, i.e. already shifted by one.
    targets: ids.
    weights: w, say 1 / tokens of the whole batch; no gradient flows into it.
    unembed: the model's output matrix; what it closes over gets gradients.
    tokens_a_chunk: positions whose logits are held at once on each device.

  Returns:
    The sum, and log p(target) at each position of another weight than 0, to
    look at: it has no gradient.
  """
  # As in `over_counted`: one part per device.
  shape, parts = weights.shape, _parts(weights.shape[0])
  hidden, targets, weights = (
    _split(x, parts) for x in (hidden, targets, weights)
  )
  size = min(tokens_a_chunk, weights.shape[1])
  apply, matrix = _hoist(unembed, size, [hidden])
  total, logps = _weighted_nll(apply, size, matrix, hidden, targets, weights)
  return total, _join(logps, parts, shape)


def _tail(size: int) -> int:
  """Positions in a smaller chunk, which takes what whole ones leave."""
  return max(1, size // 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_nll(apply, size, matrix, hidden, targets, weights):
  def body(w, chunk, total):
    h, t = chunk
    nll, logp, _ = _chunk_nll(apply(matrix, h), t, w)
    return total + nll, logp

  carry = jnp.zeros(weights.shape[0])
  chunks, logps = (hidden, targets), jnp.zeros(weights.shape)
  total, logps = _over_chunks(body, size, weights, chunks, carry, logps)
  return total.sum(), logps


def _weighted_nll_forward(apply, size, matrix, hidden, targets, weights):
  def body(w, chunk, carry):
    total, d_matrix = carry
    h, t = chunk
    logits, pull = jax.vjp(apply, matrix, h)
    nll, logp, d_logits = _chunk_nll(logits, t, w)
    more, d_h = pull(d_logits)
    return (total + nll, jax.tree.map(jnp.add, d_matrix, more)), (logp, d_h)

  # Each device sums up its own rows' gradients; they meet after the loop.
  parts = weights.shape[0]
  zeros = [jnp.zeros((parts, *m.shape), m.dtype) for m in matrix]
  carry = jnp.zeros(parts), zeros
  chunks = hidden, targets
  placed = jnp.zeros(weights.shape), jnp.zeros_like(hidden)
  (total, d_matrix), (logps, d_hidden) = _over_chunks(
    body, size, weights, chunks, carry, placed
  )
  return (total.sum(), logps), ([_sum_parts(d) for d in d_matrix], d_hidden)


def _weighted_nll_backward(apply, size, saved, d):
  del apply, size
  # The forward pass computed the gradients already; only scale them. What the
  # log-probs are used for has no gradient.
  d, _ = d
  scaled = jax.tree.map(lambda x: x * d.astype(x.dtype), saved)
  # Targets and weights get no gradient.
  return *scaled, None, None


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


def _chunk_nll(logits: Array, targets: Array, w: Array):
  """Σ −w log p(target) of a chunk `[C, V]`, log p, and d/d logits of it."""
  # The softmax, shared by the loss and its gradient.
  top = logits.max(axis=-1, keepdims=True)
  e = jnp.exp(logits - top)
  total = e.sum(axis=-1, keepdims=True)
  nll = jnp.log(total[:, 0]) + top[:, 0] - _select(logits, targets)
  hit = jnp.arange(logits.shape[-1]) == targets[:, None]
  # `where`: a position of weight 0 may hold NaN.
  d_logits = jnp.where(w[:, None] == 0, 0, w[:, None] * (e / total - hit))
  nll = jnp.where(w == 0, 0, nll)
  return (w * nll).sum(), -nll, d_logits


def _over_chunks(body, size, weights, arrays, carry, placed):
  """Runs `body` over each part's counted positions, `size` at a time.

  Args:
    body: `(weights [C], arrays [C, ...], carry) -> (carry, values [C, ...])`.
    size: C of whole chunks; what they leave goes in smaller ones.
    weights: `[parts, N]`; 0 or False = does not count.
    arrays: a pytree of `[parts, N, ...]`.
    carry: with a leading axis of parts.
    placed: `[parts, N, ...]`, into which the values are written.
  """
  # Counted positions first, then the others; past the end an index that does
  # not exist, which reads as weight 0 and is not written.
  length = weights.shape[1]
  order = jnp.argsort(weights == 0, axis=1, stable=True)
  order = jnp.pad(order, [(0, 0), (0, size)], constant_values=length)
  take = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))
  take_or_0 = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))
  place = jax.vmap(lambda x, at, y: x.at[at].set(y, mode="drop"))

  # One chunk of every part: gather, run, add to the carry, scatter.
  def step(i, state, start, size):
    carry, placed = state
    at = jax.lax.dynamic_slice_in_dim(order, start + i * size, size, axis=1)
    chunk = jax.tree.map(lambda x: take(x, at), arrays)
    carry, values = jax.vmap(body)(take_or_0(weights, at), chunk, carry)
    return carry, jax.tree.map(lambda x, y: place(x, at, y), placed, values)

  # Whole chunks, then quarters for the rest, at most two: three tokens too
  # many should not cost as much as five hundred.
  count, tail = (weights != 0).sum(axis=1).max(), _tail(size)
  # A rest of half a chunk or more goes as a whole one.
  whole = (count + size // 2) // size
  rest = jnp.maximum(count - whole * size, 0)
  state = carry, placed
  # How often they run if every position counts: `jaxalign.plan` reads it.
  most = (length + size // 2) // size
  left = max(length - most * size, 0)
  for times, start, n, turns in (
    (whole, 0, size, most),
    ((rest + tail - 1) // tail, whole * size, tail, -(-left // tail)),
  ):

    def run(i, state, start=start, size=n):
      return step(i, state, start, size)

    with jax.named_scope(f"turns_{turns}"):
      state = jax.lax.fori_loop(0, times, run, state)
  return state


def _parts(rows: int) -> tuple[int, int]:
  """The devices that rows, and the tokens of a row, are sharded over.

  1 and 1 without a mesh in force, or where the rows do not divide.
  """
  # The axes of `parallel.mesh`, a layer above this one.
  shape = jax.sharding.get_abstract_mesh().shape
  parts = shape.get("replica", 1) * shape.get("fsdp", 1)
  return (1, 1) if rows % parts else (parts, shape.get("sequence", 1))


def _split(
  x: Shaped[Array, "B T *rest"], parts: tuple[int, int]
) -> Shaped[Array, "parts N *rest"]:
  """Each device's positions, in a row of their own."""
  rows, tokens = parts
  if tokens == 1:
    return x.reshape(rows, -1, *x.shape[2:])
  # Filler behind the last token, which is False or of weight 0.
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % tokens), *[(0, 0)] * (x.ndim - 2)])
  cut = x.reshape(rows, x.shape[0] // rows, tokens, -1, *x.shape[2:])
  return jnp.swapaxes(cut, 1, 2).reshape(rows * tokens, -1, *x.shape[2:])


def _join(
  x: Shaped[Array, "parts N"], parts: tuple[int, int], shape: tuple[int, ...]
) -> Shaped[Array, "B T"]:
  """The `[B, T]` of which `_split` made `x`."""
  rows, tokens = parts
  if tokens == 1:
    return x.reshape(shape)
  cut = x.reshape(rows, tokens, shape[0] // rows, -1)
  return jnp.swapaxes(cut, 1, 2).reshape(shape[0], -1)[:, : shape[1]]


def _sum_parts(gradient: Float[Array, "parts ..."]) -> Float[Array, "..."]:
  """Adds up the devices' gradients, of which each keeps its share."""
  shape = jax.sharding.get_abstract_mesh().shape
  copies, axes = (
    tuple(name for name in names if shape.get(name, 1) > 1)
    for names in (("replica",), ("sequence", "fsdp"))
  )
  parts = math.prod(shape[name] for name in axes)
  tensor = shape.get("tensor", 1)
  _, *sizes = gradient.shape
  if len(gradient) == 1 or parts == 1 or sizes[-1] % parts:
    return gradient.sum(0)
  # The vocabulary, or whatever comes first.
  lead = ["tensor" if n % tensor == 0 else None for n in sizes[:1]]
  others = [*lead, *[None] * len(sizes)][: len(sizes) - 1]

  # Written out, because XLA adds up the whole on every device. So does a TPU's
  # compiler where one step scatters over all of a slice, see `_steps`.
  # The parts come in the order in which `_split` made them.
  @jax.shard_map(
    in_specs=P((*copies, *reversed(axes)), *others),
    out_specs=P(*others, axes),
  )
  def scatter(own):
    own = own[0]
    for name in axes:
      for groups in _steps(shape[name]):
        own = jax.lax.psum_scatter(
          own,
          name,
          scatter_dimension=own.ndim - 1,
          axis_index_groups=groups,
          tiled=True,
        )
    return jax.lax.psum(own, copies)

  return scatter(gradient)


def _steps(size: int) -> list[list[list[int]] | None]:
  """Groups of an axis that scatter among themselves, in one step or two.

  Device a n + b of a x n gets part a from those of equal b, and of that part b
  from its neighbours. Together two steps move what one moves.
  """
  near = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
  if near == 1:
    return [None]  # all of them
  columns = [list(range(b, size, near)) for b in range(near)]
  neighbours = [list(range(a, a + near)) for a in range(0, size, near)]
  return [columns, neighbours]


def target_logprobs(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
) -> Float[Array, "B T"]:
  """Computes log p(target) at temperature 1.

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
  reference: Float[Array, "B T E"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
  reference_unembed: Unembed,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Computes log p(target) and the exact KL(reference ‖ policy).

  KL = Σ_v p₀(v) (log p₀(v) − log p(v)) over the whole vocabulary, in nats.
  No gradient flows into the reference.
  """

  def fn(h, h0, t):
    logp = jax.nn.log_softmax(unembed(h))
    logp0 = jax.lax.stop_gradient(jax.nn.log_softmax(reference_unembed(h0)))
    p0 = jnp.exp(logp0)
    # 0 log 0 = 0: an id that cannot occur (logit -inf) adds nothing.
    terms = jnp.where(p0 > 0, p0 * (logp0 - logp), 0)
    return _select(logp, t), terms.sum(axis=-1)

  return over_counted(fn, mask, hidden, reference, targets)


def logprobs_and_entropy(
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Computes log p(target) and the entropy −Σ_v p(v) log p(v), in nats."""

  def fn(h, t):
    logp = jax.nn.log_softmax(unembed(h))
    return _select(logp, t), _entropy(logp)

  return over_counted(fn, mask, hidden, targets)


def reverse_kl(
  hidden: Float[Array, "B T D"],
  reference: Float[Array, "B T E"],
  mask: Bool[Array, "B T"],
  unembed: Unembed,
  reference_unembed: Unembed,
) -> Float[Array, "B T"]:
  """The exact KL(policy ‖ reference) at each position, in nats.

  Σ_v p(v) (log p(v) − log p₀(v)); no gradient flows into the reference.
  """

  def fn(h, h0):
    logp = jax.nn.log_softmax(unembed(h))
    logp0 = jax.lax.stop_gradient(jax.nn.log_softmax(reference_unembed(h0)))
    p = jnp.exp(logp)
    return jnp.where(p > 0, p * (logp - logp0), 0).sum(axis=-1)

  return over_counted(fn, mask, hidden, reference)


def _entropy(logp: Array) -> Array:
  # 0 log 0 = 0, also where log p is −inf.
  p = jnp.exp(logp)
  return -jnp.where(p > 0, p * logp, 0).sum(axis=-1)


@jax.custom_vjp
def _select(logp: Array, targets: Array) -> Array:
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def _select_forward(logp, targets):
  return _select(logp, targets), (targets, jnp.arange(logp.shape[-1]))


def _select_backward(saved, d):
  # Indexing's own gradient is a scatter, which XLA does not fuse; this is.
  targets, ids = saved
  return jnp.where(ids == targets[..., None], d[..., None], 0), None


_select.defvjp(_select_forward, _select_backward)
