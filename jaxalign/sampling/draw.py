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
    logits_ = logits_ / settings.temperature
    weights = jnp.exp(logits_ - logits_.max(axis=1, keepdims=True))
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

  def search():
    def count(least):
      return (weights >= least[:, None]).sum(axis=1).astype(jnp.float32)

    wanted = jnp.minimum(top_k, weights.shape[1]).astype(jnp.float32)
    goal = jnp.full(weights.shape[0], wanted)
    return _search(count, jnp.ones_like, goal, jnp.zeros(weights.shape[0]))

  return jax.lax.cond(top_k > 0, search, lambda: jnp.zeros(weights.shape[0]))


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
    def mass(bound):
      return jnp.where(weights >= bound[:, None], weights, 0).sum(axis=1)

    total = mass(least)
    # The tokens below this bound cannot hold a share of 1 - top_p together.
    low = 0.99 * (1 - top_p) * total / weights.shape[1]
    return _search(mass, lambda w: w, top_p * total, jnp.maximum(low, least))

  return jax.lax.cond(top_p < 1, search, lambda: least)


def _search(
  amount: Callable[[Array], Array],
  one: Callable[[Array], Array],
  goal: Float[Array, " B"],
  low: Float[Array, " B"],
) -> Float[Array, " B"]:
  """The largest bound in [low, 1] with amount(bound) >= goal, row by row.

  Floats >= 0 are ordered as their bits are, so halving an interval of bits
  ends at the exact float. `amount` is a sum over what is at or above the
  bound and `one(bound)` the least that a token there adds, so the search ends
  as soon as a single token is left in the interval.
  """

  def searching(state):
    return ~state[-1].all()

  def halve(state):
    low, high, at_low, at_high, _ = state
    middle = low + (high - low) // 2
    at_middle = amount(_float(middle))
    good = at_middle >= goal
    low, high = jnp.where(good, middle, low), jnp.where(good, high, middle)
    at_low = jnp.where(good, at_middle, at_low)
    at_high = jnp.where(good, at_high, at_middle)
    one_left = at_low - at_high < 1.5 * one(_float(low))
    return low, high, at_low, at_high, one_left | (high - low <= 1)

  low = jax.lax.bitcast_convert_type(low, jnp.int32)
  high = jnp.full(low.shape, 0x3F800001, jnp.int32)  # the float above 1
  zeros = jnp.zeros(low.shape)
  state = (low, high, amount(_float(low)), zeros, zeros > 0)
  return _float(jax.lax.while_loop(searching, halve, state)[0])


def _float(bits: Int[Array, " B"]) -> Float[Array, " B"]:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


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
