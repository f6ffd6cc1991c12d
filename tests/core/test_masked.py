import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.core import masked

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hand_worked(wrap):
  """Counted: 1, 2 | 6; sums 3 and 6, over all 9 of 3 values, mean 3."""
  x = jnp.array([[1.0, 2.0, NAN], [6.0, INF, -INF]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  total, count = wrap(masked.masked_sum)(x, mask)
  assert (float(total), float(count)) == (9.0, 3.0)
  assert float(wrap(masked.masked_mean)(x, mask)) == 3.0
  np.testing.assert_array_equal(wrap(masked.row_means)(x, mask), [1.5, 6.0])


def test_nothing_counted_is_zero():
  x, mask = jnp.full((2, 3), NAN), jnp.zeros((2, 3), bool)
  assert float(masked.masked_mean(x, mask)) == 0.0
  np.testing.assert_array_equal(masked.row_means(x, mask), [0.0, 0.0])


def test_gradient_does_not_pass_a_mask():
  """d mean / d x = 1/2 at the two counted places, 0 where x is infinite."""
  x = jnp.array([1.0, INF, 3.0, NAN])
  mask = jnp.array([True, False, True, False])
  grad = jax.grad(masked.masked_mean)(x, mask)
  np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5, 0.0])


def test_sums_are_float32_whatever_comes_in():
  """In bfloat16 256 + 1 is 256, so a sum of 300 ones would end there."""
  total, count = masked.masked_sum(
    jnp.ones(300, jnp.bfloat16), jnp.ones(300, bool)
  )
  assert total.dtype == count.dtype == jnp.float32
  assert float(total) == float(count) == 300.0


@given(
  st.lists(
    st.tuples(st.floats(-100, 100, width=32), st.booleans()),
    min_size=6,
    max_size=6,
  )
)
def test_masking_is_leaving_out(pairs):
  values, kept = map(np.array, zip(*pairs, strict=True))
  values = values.astype(np.float32)
  wanted = values[kept].mean() if kept.any() else 0.0
  mean = masked.masked_mean(jnp.asarray(values), jnp.asarray(kept))
  np.testing.assert_allclose(mean, wanted, rtol=1e-5, atol=1e-4)
