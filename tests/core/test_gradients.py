import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import gradients

KEY = jax.random.key(0)


def squares(rows, count):
  """Σ (w x − y)² / count, a sum that was divided by the whole batch's size."""

  def loss(params, batch, key):
    del key
    gap = params["w"] * batch["x"] - batch["y"]
    return (gap**2).sum() / count, {"rows": jnp.float32(len(gap))}

  return loss


def test_by_hand():
  """w = 2, rows (1, 1), (2, 3), (3, 9), (0, 1): gaps 1, 1, −3, −1.

  Loss (1 + 1 + 9 + 1) / 4 = 3; gradient 2 (1·1 + 1·2 − 3·3 − 0) / 4 = −3.
  """
  x, y = jnp.array([1.0, 2.0, 3.0, 0.0]), jnp.array([1.0, 3.0, 9.0, 1.0])
  batches = {"x": x.reshape(2, 2), "y": y.reshape(2, 2)}
  value, metrics, grads = gradients.accumulate(
    squares(4, 4), {"w": jnp.float32(2.0)}, batches, KEY
  )
  assert float(value) == 3.0
  assert float(grads["w"]) == -3.0
  assert float(metrics["rows"]) == 4.0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_change_nothing(micro, wrap):
  rng = np.random.default_rng(0)
  rows = {
    name: jnp.asarray(rng.normal(size=(8, 3)), jnp.float32) for name in "xy"
  }
  params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}

  def run(size):
    cut = jax.tree.map(lambda v: v.reshape(-1, size, 3), rows)
    return wrap(lambda p, b: gradients.accumulate(squares(8, 8), p, b, KEY))(
      params, cut
    )

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    run(micro),
    run(8),
  )


def test_each_micro_batch_has_its_own_key():
  """`fold_in(key, index)`, so noise neither repeats nor hangs on the loop."""

  def loss(params, batch, key):
    noise = jax.random.normal(key)
    return params["w"] * noise + 0 * batch.sum(), {"noise": noise}

  params = {"w": jnp.float32(1.0)}
  _, metrics, grads = gradients.accumulate(loss, params, jnp.zeros((3, 1)), KEY)
  draws = [jax.random.normal(jax.random.fold_in(KEY, i)) for i in range(3)]
  np.testing.assert_allclose(metrics["noise"], sum(draws), rtol=1e-5)
  np.testing.assert_allclose(grads["w"], sum(draws), rtol=1e-5)
  one = gradients.accumulate(loss, params, jnp.zeros((1, 1)), KEY)
  np.testing.assert_allclose(one[2]["w"], draws[0], rtol=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_maxima_are_not_added_up(micro):
  """Rows 3, 1, 2, 7: the sum is 13 and the largest 7, however they are cut."""

  def loss(params, batch, key):
    del key
    total = params["w"] * batch.sum()
    return total, {"rows": batch.sum(), "gap_max": batch.max()}

  batches = jnp.array([3.0, 1.0, 2.0, 7.0]).reshape(-1, micro)
  _, metrics, _ = gradients.accumulate(
    loss, {"w": jnp.float32(1.0)}, batches, KEY
  )
  assert float(metrics["rows"]) == 13.0
  assert float(metrics["gap_max"]) == 7.0
