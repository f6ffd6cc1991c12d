"""Advantages against numbers worked out by hand, and against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.core import advantages

WRAPS = pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


@WRAPS
def test_gae_by_hand(wrap):
  """γ = 0.5, λ = 0.5; an answer of two tokens, then padding.

  δ₁ = 3 − 2 = 1, A₁ = 1; δ₀ = 1 + 0.5·2 − 4 = −2, A₀ = −2 + 0.25·1 = −1.75.
  Returns A + V: 2.25 and 3. What stands under the padding counts nowhere.
  """
  rewards = jnp.array([[1.0, 3.0, 99.0]])
  values = jnp.array([[4.0, 2.0, 77.0]])
  mask = jnp.array([[True, True, False]])
  found, returns = wrap(lambda *x: advantages.gae(*x, 0.5, 0.5))(
    rewards, values, mask
  )
  np.testing.assert_allclose(found, [[-1.75, 1.0, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[2.25, 3.0, 0.0]], rtol=1e-6)


def test_lambda_of_one_is_the_return_less_the_value():
  rewards = jnp.array([[0.0, -1.0, 5.0]])
  values = jnp.array([[1.0, 2.0, 3.0]])
  mask = jnp.ones((1, 3), bool)
  found, returns = advantages.gae(rewards, values, mask, 1.0, 1.0)
  np.testing.assert_allclose(returns, [[4.0, 4.0, 5.0]], rtol=1e-6)
  np.testing.assert_allclose(found, [[3.0, 2.0, 2.0]], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_gae_against_a_loop(seed, gamma, lam):
  rng = np.random.default_rng(seed)
  rewards, values = rng.normal(size=(2, 3, 6)).astype(np.float32)
  start, length = rng.integers(0, 3, 3), rng.integers(0, 4, 3)
  columns = np.arange(6)
  mask = (columns >= start[:, None]) & (columns < (start + length)[:, None])
  wanted = np.zeros((3, 6))
  for b in range(3):
    advantage = following = 0.0
    for t in reversed(range(start[b], start[b] + length[b])):
      delta = rewards[b, t] + gamma * following - values[b, t]
      advantage = delta + gamma * lam * advantage
      following, wanted[b, t] = values[b, t], advantage
  found, returns = advantages.gae(
    *map(jnp.asarray, (rewards, values, mask)), gamma, lam
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  np.testing.assert_allclose(returns, (wanted + values) * mask, atol=1e-5)


@WRAPS
def test_rloo(wrap):
  """3 − (1 + 2)/2, 1 − (3 + 2)/2, 2 − (3 + 1)/2; the 9 is unusable."""
  rewards = jnp.array([[3.0, 1.0, 2.0, 9.0], [5.0, 1.0, 1.0, 1.0]])
  mask = jnp.array([[True, True, True, False], [True, False, False, False]])
  found = wrap(advantages.rloo)(rewards, mask)
  np.testing.assert_allclose(
    found, [[1.5, -1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], atol=1e-6
  )


@WRAPS
def test_grpo(wrap):
  """Mean 2, unbiased deviation 1: ±1 / (1 + 1e-4); equal answers give 0."""
  rewards = jnp.array([[3.0, 1.0, 2.0, jnp.inf], [4.0, 4.0, 4.0, 4.0]])
  mask = jnp.array([[True, True, True, False], [True] * 4])
  found = wrap(advantages.grpo)(rewards, mask)
  np.testing.assert_allclose(
    found, [[0.99990001, -0.99990001, 0.0, 0.0], [0.0] * 4], atol=1e-6
  )


@WRAPS
def test_whiten(wrap):
  """1, 2, 3: mean 2, unbiased variance 1."""
  x = jnp.array([[1.0, 2.0], [3.0, 50.0]])
  mask = jnp.array([[True, True], [True, False]])
  shifted = wrap(advantages.whiten)(x, mask)
  np.testing.assert_allclose(shifted, [[-1, 0], [1, 0]], atol=1e-6)
  kept = wrap(lambda x, m: advantages.whiten(x, m, shift=False))(3 * x, mask)
  # Mean 6 stays, the deviation of 3 goes.
  np.testing.assert_allclose(kept, [[5, 6], [7, 0]], atol=1e-5)


def test_one_value_has_no_spread():
  found = advantages.whiten(jnp.array([4.0, 1.0]), jnp.array([True, False]))
  np.testing.assert_array_equal(found, [0, 0])
