import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.core import losses

WRAPS = pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


@WRAPS
def test_bradley_terry(wrap):
  """−log σ(0) = ln 2; −log σ(ln 3) = −ln(3/4) = 0.28768; at −ln 3, ln 4."""
  chosen = jnp.array([1.0, np.log(3.0), 0.0])
  rejected = jnp.array([1.0, 0.0, np.log(3.0)])
  found = wrap(losses.bradley_terry_loss)(chosen, rejected)
  np.testing.assert_allclose(
    found, [np.log(2), np.log(4 / 3), np.log(4)], rtol=1e-6
  )


@WRAPS
def test_margin_moves_the_zero(wrap):
  """A lead of 2 under a margin of 2 is worth as much as no lead: ln 2."""
  lead, margin = jnp.array([2.0, 2.0]), jnp.array([2.0, 0.0])
  found = wrap(losses.bradley_terry_loss)(lead, jnp.zeros(2), margin)
  np.testing.assert_allclose(
    found, [np.log(2), np.log1p(np.exp(-2))], rtol=1e-6
  )


def test_bradley_terry_gradient_is_minus_the_surprise():
  """d loss / d s_w = σ(s_w − s_l) − 1: −1/2 at a tie, −1/4 at a lead ln 3."""
  chosen = jnp.array([0.0, np.log(3.0)])
  grad = jax.grad(lambda s: losses.bradley_terry_loss(s, jnp.zeros(2)).sum())(
    chosen
  )
  np.testing.assert_allclose(grad, [-0.5, -0.25], rtol=1e-6)

  # check_grads passes numpy arrays; the signature asks for jax's.
  def loss(a, b):
    return losses.bradley_terry_loss(jnp.asarray(a), jnp.asarray(b), 0.5)

  check_grads(loss, (chosen, chosen[::-1]), order=1)


def test_bradley_terry_stays_finite_far_out():
  """−log σ(−1000) = 1000, with gradient −1; σ itself has underflowed."""
  value, grad = jax.value_and_grad(
    lambda s: losses.bradley_terry_loss(s, jnp.zeros(2)).sum()
  )(jnp.array([-1000.0, 1000.0]))
  assert float(value) == 1000.0
  np.testing.assert_array_equal(grad, [-1.0, 0.0])


@WRAPS
def test_reward_centering(wrap):
  """(2 − 0.5)² = 2.25; (1 − 1)² = 0."""
  found = wrap(losses.reward_centering)(
    jnp.array([2.0, 1.0]), jnp.array([-0.5, -1.0])
  )
  np.testing.assert_allclose(found, [2.25, 0.0], atol=1e-6)


@WRAPS
def test_inverse_loss(wrap):
  """0.1 / 0.5 = 0.2; at loss 0 the bound gives 0.1 / 1e-6 = 1e5."""
  inverse = wrap(lambda x: losses.inverse_loss(x, 0.1))
  found = [inverse(jnp.float32(x)) for x in (0.5, 0.0)]
  np.testing.assert_allclose(found, [0.2, 1e5], rtol=1e-6)


def test_inverse_loss_gradient():
  """d (C / x) = −C / x² = −0.1 / 0.25 = −0.4; finite at 0."""
  grad = jax.grad(losses.inverse_loss)
  np.testing.assert_allclose(grad(jnp.float32(0.5), 0.1), -0.4, rtol=1e-6)
  assert np.isfinite(grad(jnp.float32(0.0), 0.1))


@pytest.mark.parametrize(
  ("kind", "smoothing", "wanted"),
  [
    # βΔ = ln 3: σ = 3/4, so −log σ(βΔ) = ln 4/3 and −log σ(−βΔ) = ln 4.
    ("sigmoid", 0.0, math.log(4 / 3)),
    ("sigmoid", 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ("robust", 0.25, (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5),
    ("hinge", 0.0, 0.0),
    # Δ = 2 ln 3, 1 / 2β = 1.
    ("ipo", 0.0, (2 * math.log(3) - 1) ** 2),
  ],
)
def test_dpo(kind, smoothing, wanted):
  lead = jnp.array([2 * math.log(3)])
  found = losses.dpo_loss(kind, lead, 0.5, smoothing)
  np.testing.assert_allclose(found, [wanted], rtol=1e-5, atol=1e-7)


def test_hinge_asks_for_a_lead_of_one():
  found = losses.dpo_loss("hinge", jnp.array([-1.0, 1.0, 3.0]), 0.5)
  np.testing.assert_allclose(found, [1.5, 0.5, 0.0])


@WRAPS
@pytest.mark.parametrize(
  ("kl", "wanted"),
  [
    # Desirable: β(ρ − z₀) = 0.5 (2 ln 3) = ln 3, 1 − σ = 1/4; undesirable the
    # other way round: 3/4. At ρ = 0 half of the weight.
    (0.0, [0.25, 0.75, 0.5, 0.5]),
    # z₀ = 2 ln 3: 1/2 each at ρ = z₀; at ρ = 0 the answer is ln 3 behind it,
    # which is bad for a desirable one: 3/4, and good for the other: 1/4.
    (2 * math.log(3), [0.5, 0.5, 0.75, 0.25]),
  ],
)
def test_kto(wrap, kl, wanted):
  ratio = jnp.array([2 * math.log(3), 2 * math.log(3), 0.0, 0.0])
  good = jnp.array([True, False, True, False])
  loss = wrap(lambda r: losses.kto_loss(r, good, kl, 0.5))
  np.testing.assert_allclose(loss(ratio), wanted, rtol=1e-6)
  # λ_D = 2 and λ_U = 3 multiply the two sides.
  loss = wrap(lambda r: losses.kto_loss(r, good, kl, 0.5, 2.0, 3.0))
  weighted = np.array(wanted) * [2, 3, 2, 3]
  np.testing.assert_allclose(loss(ratio), weighted, rtol=1e-6)


def test_kto_gradient():
  """∓λ β σ(x) σ(−x): at ρ = z₀ that is ∓λ β / 4; 0 and finite far out."""
  good = jnp.array([True, False, True, False])

  def loss(ratio):
    return losses.kto_loss(ratio, good, 1.0, 0.5, 2.0, 3.0).sum()

  grad = jax.grad(loss)(jnp.array([1.0, 1.0, 1e6, 1e6]))
  np.testing.assert_allclose(grad, [-0.25, 0.375, 0, 0], atol=1e-6)
  grad = jax.grad(loss)(jnp.array([-jnp.inf, jnp.inf, jnp.inf, -jnp.inf]))
  assert np.isfinite(grad).all()


@WRAPS
def test_clipped_surrogate(wrap):
  """Ratios 1.5 and 0.5, clip 0.2 below and 0.3 above, good and bad actions.

  A = 2: ρ = 1.5 counts as 1.3, −2.6; ρ = 0.5 counts as it is, −1.
  A = −2: ρ = 1.5 counts as it is, 3; ρ = 0.5 counts as 0.8, 1.6.
  """
  ratio, good = jnp.log(jnp.array([1.5, 0.5])), jnp.array([2.0, 2.0])

  def clipped(advantage):
    return losses.clipped_surrogate_loss(ratio, advantage, 0.2, 0.3)

  np.testing.assert_allclose(wrap(clipped)(good), [-2.6, -1.0], rtol=1e-6)
  np.testing.assert_allclose(wrap(clipped)(-good), [3.0, 1.6], rtol=1e-6)


def test_dual_clip_bounds_bad_actions_only():
  """ρ = 10, A = ∓1: the loss of a bad action is 3 and not 10."""
  ratio, bad = jnp.log(jnp.array([10.0, 10.0])), jnp.array([-1.0, 1.0])
  found = losses.clipped_surrogate_loss(ratio, bad, 0.2, 0.2, 3.0)
  np.testing.assert_allclose(found, [3.0, -1.2], rtol=1e-6)


def test_a_ratio_of_one_makes_the_clip_inert():
  advantage = jnp.array([-1.5, 0.3])

  def loss(log_ratio, low):
    return losses.clipped_surrogate_loss(log_ratio, advantage, low, low).sum()

  for low in (0.01, 0.9):
    grad = jax.grad(loss)(jnp.zeros(2), low)
    np.testing.assert_allclose(grad, -advantage, rtol=1e-6)


@WRAPS
def test_clipped_value(wrap):
  """V = 2, V_old = 1, clip 0.2: V counts as 1.2 where that is worse.

  R = 2: ½(1.2 − 2)² = 0.32 and not 0; R = 0: ½ 2² = 2 and not 0.72.
  """
  now, before = jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0])
  returns = jnp.array([2.0, 0.0])
  found = wrap(lambda *x: losses.clipped_value_loss(*x, 0.2))(
    now, before, returns
  )
  np.testing.assert_allclose(found, [0.32, 2.0], rtol=1e-5)
  plain = wrap(losses.clipped_value_loss)(now, before, returns)
  np.testing.assert_allclose(plain, [0.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
  ("kind", "wanted"),
  [
    # Δ = ln 2 and −ln 2.
    ("k1", [0.693147, -0.693147]),
    ("k2", [0.240227, 0.240227]),
    ("k3", [0.5 - 1 + 0.693147, 2 - 1 - 0.693147]),
    ("abs", [0.693147, 0.693147]),
  ],
)
def test_kl_estimate(kind, wanted):
  ratio = jnp.log(jnp.array([2.0, 0.5]))
  np.testing.assert_allclose(losses.kl_estimate(kind, ratio), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimators_are_unbiased(kind):
  """Over p = (0.7, 0.3) against q = (0.4, 0.6) the mean is the exact KL."""
  p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
  found = losses.kl_estimate(kind, jnp.log(jnp.asarray(p / q)))
  np.testing.assert_allclose((p * found).sum(), (p * np.log(p / q)).sum(), 1e-5)


@WRAPS
def test_row_means(wrap):
  """1 and 2, then 6 alone, then nothing: means 1.5, 6 and 0."""
  nan, inf = float("nan"), float("inf")
  x = jnp.array([[1.0, 2.0, nan], [6.0, inf, -inf], [nan, nan, nan]])
  mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
  np.testing.assert_array_equal(wrap(losses.row_means)(x, mask), [1.5, 6, 0])
  # No gradient passes the mask, whatever stands under it.
  grad = jax.grad(lambda x: losses.row_means(x, mask).sum())(x)
  np.testing.assert_array_equal(grad, [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]])


def test_row_means_are_float32_whatever_comes_in():
  """In bfloat16 256 + 1 is 256, so a sum of 300 ones would end there."""
  x = jnp.ones((1, 300), jnp.bfloat16)
  mean = losses.row_means(x, jnp.ones((1, 300), bool))
  assert mean.dtype == jnp.float32
  assert float(mean[0]) == 1.0
