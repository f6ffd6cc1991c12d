import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models import cache


def test_rounded_weights_have_the_gradient_of_autodiff():
  """Two parts, of which the first is shared."""
  keys = jax.random.split(jax.random.key(0), 4)
  logits = 3 * jax.random.normal(keys[0], (2, 2, 1, 4, 7))
  values = [
    jax.random.normal(keys[1], (1, 2, 3, 8), jnp.bfloat16),
    jax.random.normal(keys[2], (2, 2, 4, 8), jnp.bfloat16),
  ]

  def plain(logits, values):
    weights = jax.nn.softmax(logits, axis=-1).astype(jnp.bfloat16)
    return cache._weighted_sum(weights, values)

  def both(fn):
    out, pull = jax.vjp(fn, logits, values)
    return out, pull(jax.random.normal(keys[3], out.shape, out.dtype))

  found, wanted = both(cache._rounded_softmax_sum), both(plain)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6),
    found,
    wanted,
  )
  assert found[0].dtype == jnp.bfloat16
  kept, _ = jax.eval_shape(cache._rounded_softmax_sum_forward, logits, values)[
    1
  ]
  assert kept.dtype == jnp.float32
