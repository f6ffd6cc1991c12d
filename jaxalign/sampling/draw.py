"""One draw a row: from logits to a token and its two log-probabilities.

No sort, no noise over the vocabulary: top-p and top-k search the threshold
that their sorted definitions imply, and one uniform number a row picks the
token by inverting the cumulative distribution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.types import SamplingParams

NEGATIVE = -1e30  # forbidden; finite, so that forbidding all gives no NaN
BLOCK = 128  # tokens whose weights are summed before any cumulative sum
WAYS = 8  # parts of an interval that one pass of the threshold search tells
WHOLE = 2.0**29  # most that a row's weights come to, as integers


def choose(
  logits: Float[Array, "B V"],
  uniform: Float[Array, " B"],
  settings: SamplingParams,
  seen: Bool[Array, "B V"],
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  drawn: Int[Array, ""],
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
  """Draws the next token of every row.

  Args:
    logits: of the model, temperature 1.
    uniform: one number in [0, 1) a row.
    settings: see `SamplingParams`.
    seen: True = the token stands in the prompt or the sample so far.
    history: the rows' tokens before `column`, right-aligned; -1 = none.
    column: where the next token will stand in `history`.
    drawn: how many tokens have been drawn before.

  Returns:
    Tokens, their log-probabilities under the model and under the distribution
    that was drawn from, in nats. Greedy draws have sampling log-prob 0.
  """
  peak = logits.max(axis=1, keepdims=True)
  weights = jnp.exp(logits - peak)
  total = weights.sum(axis=1)

  def plain():
    token, weight = invert(weights, uniform)
    return token, jnp.log(weight) - jnp.log(total)

  def shaped():
    logits_ = shape(logits, settings, seen, history, column, drawn)
    # The peak goes first: a tiny temperature would make it infinite.
    below = logits_ - logits_.max(axis=1, keepdims=True)
    weights = jnp.exp(below / settings.temperature)
    least = least_of_top_k(weights, settings.top_k)
    least = least_of_top_p(weights, settings.top_p, least)
    kept = jnp.where(weights >= least[:, None], weights, 0)
    token, weight = invert(kept, uniform)
    return token, jnp.log(weight) - jnp.log(kept.sum(axis=1))

  def greedy():
    logits_ = shape(logits, settings, seen, history, column, drawn)
    return argmax(logits_), jnp.zeros(logits.shape[0], jnp.float32)

  unshaped = (
    (settings.temperature == 1)
    & (settings.top_p >= 1)
    & (settings.top_k == 0)
    & (settings.repetition_penalty == 1)
    & (settings.no_repeat_ngram == 0)
    & (settings.min_new_tokens <= drawn)
  )
  branch = jnp.where(settings.temperature == 0, 2, jnp.where(unshaped, 0, 1))
  token, sampling_logp = jax.lax.switch(branch, (plain, shaped, greedy))
  logit = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  model_logp = logit - peak[:, 0] - jnp.log(total)
  return token, model_logp, sampling_logp


def argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """The first of each row's largest entries.

  Two plain reductions; on CPU `jnp.argmax` takes eight times as long.
  """
  columns = jnp.arange(logits.shape[1], dtype=jnp.int32)
  largest = logits == logits.max(axis=1, keepdims=True)
  return jnp.where(largest, columns, logits.shape[1] - 1).min(axis=1)


def shape(
  logits: Float[Array, "B V"],
  settings: SamplingParams,
  seen: Bool[Array, "B V"],
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  drawn: Int[Array, ""],
) -> Float[Array, "B V"]:
  """Repetition penalty, no-repeat-ngram and minimum length, in that order."""
  penalty = settings.repetition_penalty
  worse = jnp.where(logits < 0, logits * penalty, logits / penalty)
  logits = jnp.where(seen, worse, logits)
  banned = jax.lax.cond(
    settings.no_repeat_ngram > 0,
    lambda: repeats(history, column, settings.no_repeat_ngram, seen.shape[1]),
    lambda: jnp.zeros(seen.shape, bool),
  )
  tokens = jnp.arange(logits.shape[1])
  ends = (tokens[:, None] == settings.eos_ids).any(axis=1)
  early = drawn < settings.min_new_tokens
  return jnp.where(banned | (early & ends), NEGATIVE, logits)


def repeats(
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  size: Int[Array, ""],
  vocab: int,
) -> Bool[Array, "B V"]:
  """Tokens that would end a second occurrence of a run of `size` tokens.

  Args:
    history: tokens before `column`; -1 = none.
    column: where the next token will stand.
    size: length of a run, >= 1.
    vocab: number of tokens.
  """
  rows, width = history.shape

  def compare(back, match):
    last = jax.lax.dynamic_index_in_dim(history, column - back, axis=1)
    # Rolling wraps the end to the front, where `valid` stops it.
    earlier = jnp.roll(history, back, axis=1)
    valid = (jnp.arange(width) >= back) & (last >= 0)
    return match & valid & (earlier == last)

  match = jnp.broadcast_to(jnp.arange(width) < column, history.shape)
  match = jax.lax.fori_loop(1, size, compare, match & (history >= 0))
  ids = jnp.where(match, history, vocab)
  banned = jnp.zeros((rows, vocab), bool)
  return banned.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


def least_of_top_k(
  weights: Float[Array, "B V"], top_k: Int[Array, ""]
) -> Float[Array, " B"]:
  """The k-th largest weight of each row; ties with it count as kept.

  Args:
    weights: in [0, 1], the largest 1; not normalised.
    top_k: 0 = off: returns 0 and does no work.
  """
  rows, vocab = weights.shape

  def search():
    wanted = jnp.full(rows, jnp.minimum(top_k, vocab), jnp.int32)
    every = jnp.full(rows, vocab, jnp.int32)
    return _search(weights, lambda w: 1, wanted, jnp.zeros(rows), every)

  return jax.lax.cond(top_k > 0, search, lambda: jnp.zeros(rows))


def least_of_top_p(
  weights: Float[Array, "B V"],
  top_p: Float[Array, ""],
  least: Float[Array, " B"],
) -> Float[Array, " B"]:
  """The smallest weight among the likeliest tokens that reach a share top_p.

  In sorted terms (Holtzman et al. 2020): a token is kept if the tokens
  likelier than it hold less than top_p, so the one that crosses the share is
  kept. Tokens of equal weight are kept or dropped together.

  Args:
    weights: in [0, 1], the largest 1; not normalised.
    top_p: in (0, 1]; 1 = off: returns `least` and does no work.
    least: tokens below it are out already.
  """

  def search():
    # A power of two: weights of few bits become integers without rounding.
    total = weights.sum(axis=1)
    scale = _power_of_two(WHOLE / total)

    def share(w):  # of a [B, ...] array
      by_row = jnp.expand_dims(scale, range(1, w.ndim))
      return (w * by_row + 0.5).astype(jnp.int32)

    total = jax.lax.cond(
      (least > 0).any(),
      lambda: jnp.where(weights >= least[:, None], weights, 0).sum(axis=1),
      lambda: total,
    )
    # The goal is of the exact mass: as integers the least tokens are 0.
    goal = jnp.ceil(top_p * total * scale).astype(jnp.int32)
    # The tokens below this bound cannot hold a share of 1 - top_p together.
    low = 0.99 * (1 - top_p) * total / weights.shape[1]
    most = jnp.full_like(goal, 2 * WHOLE)
    return _search(weights, share, goal, jnp.maximum(low, least), most)

  return jax.lax.cond(top_p < 1, search, lambda: least)


def _search(
  weights: Float[Array, "B V"],
  amount: Callable[[Array], Array | int],
  goal: Int[Array, " B"],
  low: Float[Array, " B"],
  most: Int[Array, " B"],
) -> Float[Array, " B"]:
  """The largest bound in [low, 1] at which goal is reached from above.

  Floats >= 0 are ordered as their bits are, so cutting an interval of bits
  ends at the exact float. One pass over the vocabulary tries seven bounds. A
  row is found as soon as a single token is left in its interval.

  Args:
    weights: in [0, 1].
    amount: weights -> what each adds, an integer; more for a larger weight,
      and all of a row together below 2^31.
    goal: amount that has to lie at or above the bound.
    low: a bound at which that is so.
    most: no less than what lies above `low`.
  """

  def cut(state):
    ends, reached, _ = state
    low, width = ends[:, :1], ends[:, 1:] - ends[:, :1]
    part = jnp.arange(1, WAYS)
    # low + width * part / WAYS, without an overflow.
    tried = low + width // WAYS * part + width % WAYS * part // WAYS
    found = _above(weights, amount, tried)
    bounds = jnp.concatenate([low, tried, ends[:, 1:]], axis=1)
    amounts = jnp.concatenate([reached[:, :1], found, reached[:, 1:]], axis=1)
    last = (found >= goal[:, None]).sum(axis=1, keepdims=True)
    here = last + jnp.arange(2)
    ends = jnp.take_along_axis(bounds, here, axis=1)
    reached = jnp.take_along_axis(amounts, here, axis=1)
    inside = reached[:, 0] - reached[:, 1]
    least = amount(_float(ends[:, 0]))  # that a token in there adds
    one_left = inside - least <= (least - 1) // 2  # without an overflow
    return ends, reached, one_left | (ends[:, 1] - ends[:, 0] <= 1)

  beyond = jnp.full(low.shape, 0x3F800001)  # the float above 1
  ends = jnp.stack([_bits(low), beyond], axis=1)
  reached = jnp.stack([most, jnp.zeros_like(most)], axis=1)
  state = (ends, reached, jnp.zeros(low.shape, bool))
  ends, _, _ = jax.lax.while_loop(lambda s: ~s[-1].all(), cut, state)
  return _float(ends[:, 0])


def _above(
  weights: Float[Array, "B V"],
  amount: Callable[[Array], Array | int],
  bounds: Int[Array, "B N"],
) -> Int[Array, "B N"]:
  """What the weights at or above each bound amount to, in one pass.

  Integers, because their sums may be taken in any order: a CPU adds seven of
  them up in the time of one sum of floats.
  """
  places = _bits(weights)
  added = [
    jnp.where(places >= bounds[:, i, None], amount(weights), 0)
    for i in range(bounds.shape[1])
  ]
  zeros = [jnp.int32(0)] * len(added)
  plus = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
  return jnp.stack(jax.lax.reduce(added, zeros, plus, (1,)), axis=1)


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Int[Array, "..."]) -> Float[Array, "..."]:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The largest power of two that is not above x > 0: its exponent alone."""
  return _float(_bits(x) & 0x7F800000)


def invert(
  weights: Float[Array, "B V"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The token at which the cumulative weight passes uniform · total.

  Sums whole blocks first, then cumulates inside the one block.

  Returns:
    Token and its weight, which is never 0 unless all are.
  """
  rows, vocab = weights.shape
  padded = jnp.pad(weights, [(0, 0), (0, -vocab % BLOCK)])
  blocks = padded.reshape(rows, -1, BLOCK)
  sums = blocks.sum(axis=2)
  goal = uniform * sums.sum(axis=1)
  block, before = _pass(sums, goal)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  index, _ = _pass(inside, goal - before)
  weight = jnp.take_along_axis(inside, index[:, None], axis=1)[:, 0]
  return (block * BLOCK + index).astype(jnp.int32), weight


def _pass(
  weights: Float[Array, "B C"], goal: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """First positive entry whose running sum passes `goal`, and the sum before.

  Rounding can leave the goal at or above the whole sum; then the last
  positive entry is taken.
  """
  sums = jnp.cumsum(weights, axis=1)
  columns = jnp.arange(weights.shape[1])
  positive = weights > 0
  passed = positive & (sums > goal[:, None])
  last = jnp.max(jnp.where(positive, columns, 0), axis=1)
  index = jnp.where(passed.any(axis=1), jnp.argmax(passed, axis=1), last)
  before = sums - weights
  return index, jnp.take_along_axis(before, index[:, None], axis=1)[:, 0]
