import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import logprobs

WRAPS = pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
)
INF = float("inf")


def identity(hidden):
  """An output matrix that makes states their own logits."""
  return hidden


@WRAPS
def test_target_logprobs_by_hand(wrap):
  """Logits ln(1, 2, 5) are the probabilities 1/8, 2/8, 5/8.

  Row 0 asks for id 2 and id 1: ln 5/8 and ln 2/8. Row 1 for id 0 at its
  second place: ln 1/8; its first is not counted.
  """
  hidden = jnp.log(jnp.array([[[1.0, 2.0, 5.0]] * 2] * 2))
  targets = jnp.array([[2, 1], [1, 0]])
  mask = jnp.array([[True, True], [False, True]])
  found = wrap(lambda *a: logprobs.target_logprobs(*a, unembed=identity))(
    hidden, targets, mask
  )
  wanted = [[np.log(5 / 8), np.log(2 / 8)], [0.0, np.log(1 / 8)]]
  np.testing.assert_allclose(found, wanted, atol=1e-6)


@WRAPS
def test_kl_by_hand(wrap):
  """Prior (1/2, 1/2), policy (1/4, 3/4).

  KL(prior ‖ policy) = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3 = 0.14384. The other
  direction would be ¼ ln ½ + ¾ ln 3/2 = 0.13081.
  """
  policy = jnp.log(jnp.array([[[1.0, 3.0]]]))
  logp, kl = wrap(
    lambda h, h0, *a: logprobs.logprobs_and_kl(h, h0, *a, identity, identity)
  )(policy, jnp.zeros((1, 1, 2)), jnp.array([[1]]), jnp.array([[True]]))
  np.testing.assert_allclose(kl, [[0.5 * np.log(4 / 3)]], atol=1e-6)
  np.testing.assert_allclose(logp, [[np.log(0.75)]], atol=1e-6)


def test_kl_gradient_by_hand():
  """d KL / d logits = p − p₀ = (1/4 − 1/2, 3/4 − 1/2); none for the prior."""

  def kl(h, h0):
    out = logprobs.logprobs_and_kl(
      h, h0, jnp.array([[0]]), jnp.array([[True]]), identity, identity
    )
    return out[1].sum()

  policy = jnp.log(jnp.array([[[1.0, 3.0]]]))
  grad, prior_grad = jax.grad(kl, (0, 1))(policy, jnp.zeros((1, 1, 2)))
  np.testing.assert_allclose(grad, [[[-0.25, 0.25]]], atol=1e-6)
  np.testing.assert_array_equal(prior_grad, np.zeros((1, 1, 2)))


def test_finite_where_logits_are_minus_infinity():
  """Ids that cannot occur (logit −∞ in both) add nothing, with gradient 0.

  What is left are the priors (1/2, 1/2) and (1/4, 3/4): ½ ln 4/3 again.
  """

  def both(h, h0):
    logp, kl = logprobs.logprobs_and_kl(
      h, h0, jnp.array([[1]]), jnp.array([[True]]), identity, identity
    )
    return (kl - logp).sum(), kl

  policy = jnp.array([[[np.log(1.0), np.log(3.0), -INF]]])
  prior = jnp.array([[[0.0, 0.0, -INF]]])
  (_, kl), grad = jax.value_and_grad(both, has_aux=True)(policy, prior)
  np.testing.assert_allclose(kl, [[0.5 * np.log(4 / 3)]], atol=1e-6)
  assert np.isfinite(grad).all()
  assert grad[0, 0, 2] == 0.0


def texts(rows=3, length=7, width=5, vocab=11, seed=0):
  rng = np.random.default_rng(seed)
  matrix = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
  hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, vocab, (rows, length)))
  mask = jnp.asarray(rng.random((rows, length)) < 0.6)
  return hidden, targets, mask, lambda h: h @ matrix


@pytest.mark.parametrize("chunk", [1, 4, 9, 10_000])
def test_chunks_change_neither_values_nor_gradients(chunk):
  hidden, targets, mask, unembed = texts()

  def pick(logits, t):
    return jnp.take_along_axis(
      jax.nn.log_softmax(logits), t[..., None], axis=-1
    )[..., 0]

  def total(h, cut):
    if cut is None:
      return jnp.where(mask, pick(unembed(h), targets), 0)
    return logprobs.over_counted(
      lambda x, t: pick(unembed(x), t), mask, h, targets, tokens_a_chunk=cut
    )

  np.testing.assert_allclose(
    total(hidden, chunk), total(hidden, None), atol=1e-6
  )
  grads = [
    jax.grad(lambda h, cut=cut: (total(h, cut) ** 2).sum())(hidden)
    for cut in (chunk, None)
  ]
  np.testing.assert_allclose(*grads, atol=1e-5)


def test_each_row_alone():
  """A row's values do not depend on its batch-mates or on padding behind."""
  hidden, targets, mask, unembed = texts()
  whole = logprobs.target_logprobs(hidden, targets, mask, unembed)
  wide = logprobs.target_logprobs(
    jnp.pad(hidden[1:2], [(0, 0), (0, 4), (0, 0)], constant_values=9.0),
    jnp.pad(targets[1:2], [(0, 0), (0, 4)]),
    jnp.pad(mask[1:2], [(0, 0), (0, 4)]),
    unembed,
  )
  np.testing.assert_allclose(wide[:, :7], whole[1:2], atol=1e-6)
  np.testing.assert_array_equal(wide[:, 7:], 0)


def test_several_values_come_back_in_place():
  """The positions' own numbers, moved to the front and back again."""
  places = jnp.arange(12.0).reshape(3, 4)
  mask = jnp.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
  found = logprobs.over_counted(
    lambda x: {"same": x, "twice": 2 * x}, mask, places, tokens_a_chunk=6
  )
  wanted = np.where(mask, places, 0)
  np.testing.assert_array_equal(found["same"], wanted)
  np.testing.assert_array_equal(found["twice"], 2 * wanted)


def test_chunks_without_a_counted_position_are_skipped():
  """Only the chunk of the counted columns is unembedded: 2 of 8."""
  calls = []

  def unembed(h):
    jax.debug.callback(lambda: calls.append(1))
    return h

  hidden = jnp.zeros((1, 8, 3))
  mask = jnp.arange(8)[None] >= 6
  out = logprobs.over_counted(
    lambda h: unembed(h)[..., 0], mask, hidden, tokens_a_chunk=1
  )
  jax.block_until_ready(out)
  jax.effects_barrier()
  assert len(calls) == 2


def test_rows_share_chunks():
  """Five of twelve positions count, wherever they stand: 3 chunks of 2."""
  calls = []

  def unembed(h):
    jax.debug.callback(lambda: calls.append(1))
    return h

  mask = jnp.array([[0, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0]], bool)
  hidden = jnp.arange(36.0).reshape(2, 6, 3)
  out = logprobs.over_counted(
    lambda h: unembed(h)[..., 0], mask, hidden, tokens_a_chunk=2
  )
  np.testing.assert_array_equal(out, np.where(mask, hidden[..., 0], 0))
  jax.effects_barrier()
  assert len(calls) == 3


def test_weighted_nll_by_hand():
  """Probabilities 1/4 and 3/4; weights 2, 0 and 1.

  2 ln 4 + ln 4/3 = 3.06027. By the logits: 2 (p − (1, 0)) = (−1.5, 1.5) and
  p − (0, 1) = (0.25, −0.25); the middle one does not count.
  """
  hidden = jnp.log(jnp.array([[[1.0, 3.0]] * 3]))
  targets, weights = jnp.array([[0, 0, 1]]), jnp.array([[2.0, 0.0, 1.0]])
  (value, logps), grad = jax.value_and_grad(
    logprobs.weighted_nll, has_aux=True
  )(hidden, targets, weights, identity)
  np.testing.assert_allclose(logps, [[-np.log(4), 0, np.log(3 / 4)]], atol=1e-6)
  np.testing.assert_allclose(value, 2 * np.log(4) + np.log(4 / 3), atol=1e-6)
  wanted = [[[-1.5, 1.5], [0, 0], [0.25, -0.25]]]
  np.testing.assert_allclose(grad, wanted, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 9, 10_000])
def test_weighted_nll_is_the_sum_of_log_probs(chunk):
  """Value and gradients, by the states and by what `unembed` closes over."""
  hidden, targets, mask, _ = texts(vocab=7)
  matrix = texts(seed=1)[0][0].T  # [D=5, V=7]
  weights = mask * jnp.linspace(0.5, 2.0, 7)

  def fused(hidden, matrix):
    return logprobs.weighted_nll(
      *(hidden, targets, weights, lambda h: h @ matrix), tokens_a_chunk=chunk
    )[0]

  def plain(hidden, matrix):
    logp = logprobs.target_logprobs(hidden, targets, mask, lambda h: h @ matrix)
    return -(weights * logp).sum()

  args = hidden, matrix
  np.testing.assert_allclose(fused(*args), plain(*args), rtol=1e-6)
  found, wanted = (
    jax.jit(jax.value_and_grad(lambda *a, f=f: 3 * f(*a), (0, 1)))(*args)
    for f in (fused, plain)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted
  )


def test_weighted_nll_runs_only_the_chunks_that_count():
  """Five of twelve positions count, wherever they stand: 3 chunks of 2."""
  calls = []

  def unembed(h):
    jax.debug.callback(lambda: calls.append(1))
    return h

  weights = jnp.array([[0, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0]], jnp.float32)
  out, _ = logprobs.weighted_nll(
    jnp.zeros((2, 6, 3)),
    jnp.zeros((2, 6), int),
    weights,
    unembed,
    tokens_a_chunk=2,
  )
  np.testing.assert_allclose(out, 5 * np.log(3), rtol=1e-6)
  jax.effects_barrier()
  assert len(calls) == 3


def test_weighted_nll_ends_in_small_chunks():
  """Nine positions by 8: one whole chunk and one of 2; 12 take two whole."""
  for count, wanted in ((8, [8]), (9, [8, 2]), (12, [8, 8]), (11, [8, 2, 2])):
    sizes = []

    def unembed(h, sizes=sizes):
      jax.debug.callback(functools.partial(sizes.append, len(h)))
      return h

    out, _ = logprobs.weighted_nll(
      jnp.zeros((1, 20, 3)),
      jnp.zeros((1, 20), int),
      (jnp.arange(20)[None] >= 20 - count).astype(jnp.float32),
      unembed,
      tokens_a_chunk=8,
    )
    np.testing.assert_allclose(out, count * np.log(3), rtol=1e-6)
    jax.effects_barrier()
    assert sizes == wanted
