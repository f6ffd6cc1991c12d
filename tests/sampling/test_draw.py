"""One draw: which tokens are kept, and how often each is drawn."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling import draw, settings

# Multiples of 1/64 add up without rounding, so the sorted reference and the
# search must agree even where a sum meets the share exactly.
WEIGHTS = hnp.arrays(
  np.float32,
  (3, 24),  # one shape, one compilation
  elements=st.integers(0, 64).map(lambda i: i / 64),
).map(lambda w: np.concatenate([np.ones((len(w), 1), np.float32), w], 1))
SHARES = st.integers(1, 15).map(lambda i: np.float32(i / 16))

least_of_top_p = jax.jit(draw.least_of_top_p)
least_of_top_k = jax.jit(draw.least_of_top_k)


def sorted_top_p(weights, share):
  """The kept set by the sorted definition, ties kept together."""
  keep = np.zeros(weights.shape, bool)
  for row, kept in zip(weights.astype(np.float64), keep, strict=True):
    order = np.argsort(-row, kind="stable")
    likelier = np.concatenate([[0.0], np.cumsum(row[order])[:-1]])
    last = row[order][likelier < float(share) * row.sum()][-1]
    kept[:] = row >= last
  return keep


def top_p_set(weights, share, least=None):
  return weights >= np.asarray(least_of_top_p(weights, share, least))[:, None]


@hypothesis.given(WEIGHTS, SHARES)
def test_top_p_keeps_the_sorted_set(weights, share):
  kept = top_p_set(weights, share)
  assert (kept == sorted_top_p(weights, share))[weights > 0].all()


@hypothesis.given(WEIGHTS, st.integers(1, 30))
def test_top_k_keeps_the_k_largest_and_their_ties(weights, k):
  kept = weights >= np.asarray(least_of_top_k(weights, jnp.int32(k)))[:, None]
  kth = np.sort(weights, axis=1)[:, ::-1][:, min(k, weights.shape[1]) - 1]
  assert (kept == (weights >= kth[:, None]))[weights > 0].all()


def test_a_fixed_number_of_passes_finds_the_same_set(monkeypatch):
  """What runs on GPUs and TPUs, compared with the search of a CPU."""
  logits = 4 * np.random.default_rng(2).standard_normal((6, 700))
  weights = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float32)
  weights[0] = 1  # all alike
  weights = jnp.asarray(weights)
  searches = (
    lambda: draw.least_of_top_k(weights, jnp.int32(9)),
    lambda: draw.least_of_top_p(weights, jnp.float32(0.9)),
    lambda: draw.least_of_top_p(weights, jnp.float32(0.999), jnp.zeros(6)),
  )
  early = [weights >= jax.jit(search)()[:, None] for search in searches]

  def elsewhere(*args, cpu, default):
    del cpu
    return default(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
  for search, kept in zip(searches, early, strict=True):
    # Another function, as jit would remember the first one's program.
    least = jax.jit(lambda search=search: search())()[:, None]
    assert ((weights >= least) == kept).all()
    # To the last bit: the bound is the least kept weight itself.
    assert (jnp.where(kept, weights, 2).min(1, keepdims=True) == least).all()


def test_top_p_by_hand():
  # Shares .5 .25 .125 .125: below .75 the first two suffice, at .76 the tied
  # pair is needed and comes as a whole.
  weights = np.array([[0.25, 1.0, 0.25, 0.5]], np.float32)
  assert top_p_set(weights, np.float32(0.49)).tolist() == [[0, 1, 0, 0]]
  assert top_p_set(weights, np.float32(0.75)).tolist() == [[0, 1, 0, 1]]
  assert top_p_set(weights, np.float32(0.76)).tolist() == [[1, 1, 1, 1]]


def test_top_p_where_a_row_adds_up_to_a_power_of_two():
  """40 nearly equal weights, 32 together: the first 90 % are 36 of them."""
  weights = np.linspace(0.6, 1.0, 40)
  weights[:-1] *= 31 / weights[:-1].sum()
  weights = np.sort(weights).astype(np.float32)[None]
  kept = top_p_set(weights, np.float32(0.9))
  assert (kept == sorted_top_p(weights, 0.9)).all()


def test_top_p_counts_a_long_tail():
  """A quarter of a million tokens that hold 12 % together, 5e-7 each."""
  tail = np.full(2**18 - 1, 5e-7, np.float32)
  weights = np.concatenate([[1.0], tail]).astype(np.float32)[None]
  assert top_p_set(weights, np.float32(0.85)).sum() == 1
  assert top_p_set(weights, np.float32(0.95)).all()  # ties stay together


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_top_p_of_a_large_vocabulary(spread, share):
  logits = spread * np.random.default_rng(0).standard_normal((8, 5003))
  logits -= logits.max(axis=1, keepdims=True)
  weights = np.exp(logits).astype(np.float32)
  kept = top_p_set(weights, np.float32(share))
  # float32 sums leave the token at the share undecided where it is tiny.
  different = np.where(kept != sorted_top_p(weights, share), weights, 0)
  assert (different.sum(1) <= 1e-6 * weights.sum(1)).all()
  assert (kept != sorted_top_p(weights, share)).sum() <= 1


def test_top_p_counts_shares_of_what_top_k_left():
  weights = np.array([[1.0, 0.5, 0.25, 0.25]], np.float32)
  least = least_of_top_k(weights, jnp.int32(2))
  # Of the remaining 1.5, 0.6 is passed by the first token alone.
  assert top_p_set(weights, np.float32(0.6), least).tolist() == [[1, 0, 0, 0]]
  assert top_p_set(weights, np.float32(0.7), least).tolist() == [[1, 1, 0, 0]]


def call(logits, uniform, seen=None, history=None, drawn=0, **chosen):
  logits = jnp.asarray(logits, jnp.float32)
  rows = len(logits)
  seen = jnp.zeros(logits.shape, bool) if seen is None else seen
  history = jnp.full((rows, 4), -1) if history is None else history
  return jax.jit(draw.draw_tokens)(
    logits,
    jnp.asarray(uniform, jnp.float32),
    jax.device_put(settings.make(**chosen)),
    seen,
    jnp.asarray(history, jnp.int32),
    jnp.int32(history.shape[1]),
    jnp.int32(drawn),
  )


def chi_square(tokens, expected):
  counts = np.bincount(tokens, minlength=len(expected))
  used = expected > 0
  assert counts[~used].sum() == 0
  expected = expected[used] * len(tokens)
  return ((counts[used] - expected) ** 2 / expected).sum(), used.sum() - 1


@pytest.mark.parametrize(
  "chosen",
  [
    {},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 9},
    {"top_k": 12, "top_p": 0.6, "temperature": 1.5},
  ],
)
def test_frequencies_follow_the_distribution(chosen):
  vocab, rows = 300, 20000  # more than two blocks
  logits = np.random.default_rng(1).normal(size=vocab) * 2
  uniform = jax.random.uniform(jax.random.key(0), (rows,))
  tiled = np.broadcast_to(logits, (rows, vocab))
  tokens, model_logp, sampling_logp = call(tiled, uniform, **chosen)
  scaled = logits / chosen.get("temperature", 1.0)
  probs = np.exp(scaled - scaled.max())
  if "top_k" in chosen:
    probs[probs < np.sort(probs)[-chosen["top_k"]]] = 0
  probs[~sorted_top_p(probs[None], chosen.get("top_p", 1.0))[0]] = 0
  probs /= probs.sum()
  statistic, freedom = chi_square(np.asarray(tokens), probs)
  # Mean `freedom`, standard deviation √(2 freedom).
  assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)
  np.testing.assert_allclose(sampling_logp, np.log(probs[tokens]), atol=1e-5)
  plain = logits - np.log(np.exp(logits).sum())
  np.testing.assert_allclose(model_logp, plain[tokens], atol=1e-5)


def test_extreme_uniforms_stay_inside():
  logits = np.full((2, 400), -np.inf, np.float32)
  logits[:, [7, 390]] = 0
  tokens, *_ = call(logits, [0.0, np.nextafter(np.float32(1), 0)])
  assert tokens.tolist() == [7, 390]


def test_repetition_penalty_by_hand():
  logits = np.array([[2.0, 1.5, -1.0]])
  seen = jnp.array([[True, False, True]])
  shaped = draw.shape(
    jnp.asarray(logits, jnp.float32),
    jax.device_put(settings.make(repetition_penalty=2.0)),
    seen,
    jnp.full((1, 2), -1),
    jnp.int32(2),
    jnp.int32(0),
  )
  assert shaped.tolist() == [[1.0, 1.5, -2.0]]


def test_repeated_runs_are_banned():
  # 5 6 was followed by 7, so after 5 6 a run of three must not end in 7.
  history = jnp.array([[-1, 5, 6, 7, 5, 6, -1]])

  def banned(n):
    return draw.repeats(history, jnp.int32(6), n, 9)[0]

  assert np.flatnonzero(banned(3)).tolist() == [7]
  assert np.flatnonzero(banned(1)).tolist() == [5, 6, 7]
  assert np.flatnonzero(banned(2)).tolist() == [7]
  assert np.flatnonzero(banned(4)).tolist() == []
  assert np.flatnonzero(banned(40)).tolist() == []  # wider than the history


def test_end_of_text_waits_for_the_minimum():
  logits = np.array([[5.0, 0.0, 1.0]])
  chosen = {"temperature": 0, "eos_ids": (0,), "min_new_tokens": 2}
  assert call(logits, [0.5], drawn=1, **chosen)[0].tolist() == [2]
  assert call(logits, [0.5], drawn=2, **chosen)[0].tolist() == [0]


def test_greedy_takes_the_first_of_equals():
  token, _, sampling_logp = call([[0.0, 3.0, 3.0]], [0.9], temperature=0)
  assert token.tolist() == [1]
  assert sampling_logp.tolist() == [0.0]
