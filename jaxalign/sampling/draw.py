"""One draw per row: from logits to a token and its two log-probabilities.

Nothing is sorted and no noise is drawn over the vocabulary. Top-p and top-k
search for the threshold that their sorted definitions imply, and one uniform
number per row picks the token by inverting the cumulative distribution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.types import SamplingParams
from jaxalign.models.cache import NEGATIVE

BLOCK = 128  # tokens whose weights are summed before any cumulative sum
# Parts into which one pass of the threshold search splits an interval: on a
# CPU, and where PASSES passes have to cut any interval below 2^30 down to 1.
WAYS = 8
MANY_WAYS, PASSES = 16, 8
WHOLE = 2.0**29  # upper bound of the sum of a row's weights as integers


def draw_tokens(
  logits: Float[Array, "B V"],
  uniform: Float[Array, " B"],
  settings: SamplingParams,
  seen: Bool[Array, "B V"] | None,
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  drawn: Int[Array, ""],
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
  """Draws the next token of every row.

  What the settings turn off is not in the program. Nothing here branches on a
  value: on a GPU every such branch would wait for the host.

  Args:
    logits: of the model, temperature 1.
    uniform: one number in [0, 1) per row.
    settings: see `SamplingParams`.
    seen: True = the token occurs in the prompt or the sample so far; None
      without a repetition penalty.
    history: the rows' tokens before `column`, right-aligned; -1 = none.
    column: where the next token goes in `history`.
    drawn: how many tokens have been drawn before.

  Returns:
    Tokens, their log-probabilities under the model and under the distribution
    that was drawn from, in nats. Greedy draws have sampling log-prob 0.
  """
  peak = logits.max(axis=1, keepdims=True)
  weights = jnp.exp(logits - peak)
  total = weights.sum(axis=1)
  shaped = shape(logits, settings, seen, history, column, drawn)
  if settings.greedy:
    token = argmax(shaped)
    sampling_logp = jnp.zeros(logits.shape[0], jnp.float32)
  else:
    kept = weights
    if shaped is not logits or settings.temperature is not None:
      # The peak is subtracted first: a tiny temperature would overflow it.
      below = shaped - shaped.max(axis=1, keepdims=True)
      if settings.temperature is not None:
        below = below / settings.temperature
      kept = jnp.exp(below)
    least = None
    if settings.top_k is not None:
      least = least_of_top_k(kept, settings.top_k)
    if settings.top_p is not None:
      least = least_of_top_p(kept, settings.top_p, least)
    if least is not None:
      kept = jnp.where(kept >= least[:, None], kept, 0)
    token, weight = invert(kept, uniform)
    sampling_logp = jnp.log(weight) - jnp.log(kept.sum(axis=1))
  # The model's log-probability is that of the unshaped logits.
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
  seen: Bool[Array, "B V"] | None,
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  drawn: Int[Array, ""],
) -> Float[Array, "B V"]:
  """Repetition penalty, no-repeat-ngram and minimum length, in that order.

  Returns `logits` itself where all are off.
  """
  if settings.repetition_penalty is not None:
    assert seen is not None
    penalty = settings.repetition_penalty
    # Keskar et al. (2019) divide, which would raise a negative logit.
    worse = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(seen, worse, logits)
  vocab = logits.shape[1]
  if settings.no_repeat_ngram:
    banned = repeats(history, column, settings.no_repeat_ngram, vocab)
    logits = jnp.where(banned, NEGATIVE, logits)
  if settings.min_new_tokens is not None:
    ends = (jnp.arange(vocab)[:, None] == settings.eos_ids).any(axis=1)
    early = drawn < settings.min_new_tokens
    logits = jnp.where(early & ends, NEGATIVE, logits)
  return logits


def repeats(
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  size: int,
  vocab: int,
) -> Bool[Array, "B V"]:
  """Tokens that would repeat an earlier run of `size` tokens.

  Args:
    history: tokens before `column`; -1 = none.
    column: where the next token goes.
    size: length of a run, >= 1.
    vocab: number of tokens.
  """
  rows, width = history.shape
  columns = jnp.arange(width)

  # A column matches if the size − 1 tokens before it equal the last size − 1.
  match = (columns < column) & (history >= 0)
  for back in range(1, min(size, width + 1)):
    # A masked maximum, as a dynamic slice here aborts the TPU compiler.
    there = columns == column - back
    last = jnp.where(there, history, -1).max(axis=1, keepdims=True)
    # Rolling wraps the end to the front, which `back` columns leave out.
    earlier = jnp.roll(history, back, axis=1)
    match &= (columns >= back) & (last >= 0) & (earlier == last)
  ids = jnp.where(match, history, vocab)  # vocab is out of range: dropped
  banned = jnp.zeros((rows, vocab), bool)
  return banned.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


def least_of_top_k(
  weights: Float[Array, "B V"], top_k: Int[Array, ""]
) -> Float[Array, " B"]:
  """The k-th largest weight of each row; ties with it count as kept.

  Args:
    weights: in [0, 1], the largest 1; not normalised.
    top_k: k >= 1.
  """
  rows, vocab = weights.shape
  wanted = jnp.full(rows, jnp.minimum(top_k, vocab), jnp.int32)
  every = jnp.full(rows, vocab, jnp.int32)
  # Each token counts 1, so an amount is a number of tokens.
  return _search(weights, lambda w: 1, wanted, jnp.zeros(rows), every)


def least_of_top_p(
  weights: Float[Array, "B V"],
  top_p: Float[Array, ""],
  least: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
  """The smallest weight among the likeliest tokens that reach a share top_p.

  In sorted terms (Holtzman et al. 2020): a token is kept if the tokens
  likelier than it hold less than top_p, so the one that crosses the share is
  kept. Tokens of equal weight are kept or dropped together.

  Args:
    weights: in [0, 1], the largest 1; not normalised.
    top_p: in (0, 1).
    least: tokens below it are left out already; None = all are there.
  """
  # Integers, whose sums do not depend on the order. The scale is a power of
  # two, so that weights of few bits are not rounded.
  total = weights.sum(axis=1)
  scale = _power_of_two_below(WHOLE / total)

  def share(w):  # of a [B, ...] array
    by_row = jnp.expand_dims(scale, range(1, w.ndim))
    return (w * by_row + 0.5).astype(jnp.int32)

  if least is not None:
    total = jnp.where(weights >= least[:, None], weights, 0).sum(axis=1)
  # The goal comes from the float total: as integers the least tokens are 0.
  goal = jnp.ceil(top_p * total * scale).astype(jnp.int32)
  # All tokens below this bound together hold less than 1 - top_p, so the
  # search may start from it.
  low = 0.99 * (1 - top_p) * total / weights.shape[1]
  if least is not None:
    low = jnp.maximum(low, least)
  # Rounding adds at most half a unit per token, far less than WHOLE.
  most = jnp.full_like(goal, 2 * WHOLE)
  return _search(weights, share, goal, low, most)


def _search(
  weights: Float[Array, "B V"],
  amount: Callable[[Array], Array | int],
  goal: Int[Array, " B"],
  low: Float[Array, " B"],
  most: Int[Array, " B"],
) -> Float[Array, " B"]:
  """The largest bound in [low, 1] above which the amounts reach the goal.

  Floats >= 0 have the order of their bits as integers, so cutting an interval
  of bits ends at the exact float. One pass over the vocabulary tries several
  bounds. On a CPU the search ends as soon as a single token is left in every
  row's interval. Elsewhere asking that would stop the device at every pass;
  there it makes as many passes as cut any interval down to one float, which
  keeps the same tokens.

  Args:
    weights: in [0, 1].
    amount: weights -> an integer each, not smaller for a larger weight, and
      below 2^31 in sum over a row.
    goal: sum of amounts that the weights at or above the bound must reach.
    low: a bound at which they do.
    most: at least the sum of the amounts above `low`.
  """

  def cut(state, ways):
    ends, reached, _ = state
    low, width = ends[:, :1], ends[:, 1:] - ends[:, :1]
    part = jnp.arange(1, ways)
    # low + width * part / ways, without an overflow.
    tried = low + width // ways * part + width % ways * part // ways
    found = _above(weights, amount, tried)
    bounds = jnp.concatenate([low, tried, ends[:, 1:]], axis=1)
    amounts = jnp.concatenate([reached[:, :1], found, reached[:, 1:]], axis=1)
    # Keeping the last part whose lower end still reaches the goal.
    last = (found >= goal[:, None]).sum(axis=1, keepdims=True)
    here = last + jnp.arange(2)
    ends = jnp.take_along_axis(bounds, here, axis=1)
    reached = jnp.take_along_axis(amounts, here, axis=1)
    # Two tokens in the interval would hold at least twice its least amount.
    inside = reached[:, 0] - reached[:, 1]
    least = amount(_float(ends[:, 0]))  # of a single token in the interval
    one_left = inside - least <= (least - 1) // 2  # without an overflow
    return ends, reached, one_left | (ends[:, 1] - ends[:, 0] <= 1)

  def until_done(state):
    return jax.lax.while_loop(
      lambda s: ~s[-1].all(), lambda s: cut(s, WAYS), state
    )

  def all_passes(state):
    for _ in range(PASSES):
      state = cut(state, MANY_WAYS)
    return state

  # Each row's interval as bits, and the amounts at or above its ends.
  beyond = jnp.full(low.shape, 0x3F800001)  # the float above 1
  ends = jnp.stack([_bits(low), beyond], axis=1)
  reached = jnp.stack([most, jnp.zeros_like(most)], axis=1)
  state = (ends, reached, jnp.zeros(low.shape, bool))
  ends, _, _ = jax.lax.platform_dependent(
    state, cpu=until_done, default=all_passes
  )
  return _float(ends[:, 0])


def _above(
  weights: Float[Array, "B V"],
  amount: Callable[[Array], Array | int],
  bounds: Int[Array, "B N"],
) -> Int[Array, "B N"]:
  """Sums the amounts of the weights at or above each bound, in one pass.

  Integer sums may be taken in any order: a CPU does seven of them in the time
  of one sum of floats.
  """
  places = _bits(weights)
  added = [
    jnp.where(places >= bounds[:, i, None], amount(weights), 0)
    for i in range(bounds.shape[1])
  ]
  zeros = [jnp.int32(0)] * len(added)

  def plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]

  # One variadic reduction: separate sums would read the weights N times.
  return jnp.stack(jax.lax.reduce(added, zeros, plus, (1,)), axis=1)


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Int[Array, "..."]) -> Float[Array, "..."]:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two_below(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The largest power of two <= x, for x > 0: the exponent bits alone."""
  return _float(_bits(x) & 0x7F800000)


def invert(
  weights: Float[Array, "B V"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """The token at which the cumulative weight passes uniform · total.

  It sums whole blocks first, then takes the cumulative sum of one block: a
  cumulative sum over the whole vocabulary is slow.

  Returns:
    Token and its weight, which is 0 only if all are.
  """
  rows, vocab = weights.shape
  padded = jnp.pad(weights, [(0, 0), (0, -vocab % BLOCK)])
  blocks = padded.reshape(rows, -1, BLOCK)
  sums = blocks.sum(axis=2)
  goal = uniform * sums.sum(axis=1)
  # First the block in which the goal is passed, then the token.
  block, before = _pass(sums, goal)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  index, _ = _pass(inside, goal - before)
  weight = jnp.take_along_axis(inside, index[:, None], axis=1)[:, 0]
  return (block * BLOCK + index).astype(jnp.int32), weight


def _pass(
  weights: Float[Array, "B C"], goal: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """First positive entry whose running sum exceeds `goal`, and the sum before.

  Rounding can leave the goal at or above the total; then it is the last
  positive entry.
  """
  sums = jnp.cumsum(weights, axis=1)
  columns = jnp.arange(weights.shape[1])
  # A goal that rounding puts below 0 is passed by weights of 0 as well.
  positive = weights > 0
  passed = positive & (sums > goal[:, None])
  last = jnp.max(jnp.where(positive, columns, 0), axis=1)
  index = jnp.where(passed.any(axis=1), jnp.argmax(passed, axis=1), last)
  before = sums - weights
  return index, jnp.take_along_axis(before, index[:, None], axis=1)[:, 0]
