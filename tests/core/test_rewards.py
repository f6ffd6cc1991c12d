"""Moments, the score's place, the KL controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import rewards


def test_moments_are_those_of_all_parts():
  rng = np.random.default_rng(0)
  x = rng.normal(3.0, 2.0, (4, 5)).astype(np.float32)
  mask = rng.random((4, 5)) < 0.7
  moments = rewards.Moments.none()
  for part, real in zip(x, mask, strict=True):
    moments = jax.jit(rewards.Moments.add)(moments, part, jnp.asarray(real))
  assert float(moments.count) == mask.sum()
  np.testing.assert_allclose(moments.mean, x[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(moments.deviation, x[mask].std(ddof=1), rtol=1e-5)


@pytest.mark.parametrize("scores", [[], [5.0], [2.0, 2.0]])
def test_no_spread_divides_by_one(scores):
  x = jnp.array([*scores, 7.0])
  mask = jnp.arange(len(scores) + 1) < len(scores)
  assert float(rewards.Moments.none().add(x, mask).deviation) == 1.0


def test_the_score_stands_at_the_last_kept_token():
  mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
  found = rewards.at_end(jnp.array([2.0, 3.0, 4.0]), mask)
  np.testing.assert_array_equal(
    found, [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4]]
  )


@pytest.mark.parametrize(
  ("kl", "wanted"),
  [
    # Target 6, horizon 100, 10 answers: errors of 0.1, and ±0.2 at most.
    (6.6, 0.2 * (1 + 0.1 * 0.1)),
    (60.0, 0.2 * (1 + 0.2 * 0.1)),
    (0.0, 0.2 * (1 - 0.2 * 0.1)),
    (6.0, 0.2),
  ],
)
def test_adaptive_coefficient(kl, wanted):
  found = rewards.adapt(jnp.float32(0.2), jnp.float32(kl), 6.0, 100, 10)
  assert float(found) == pytest.approx(wanted, rel=1e-5)
