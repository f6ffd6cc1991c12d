"""Gradients over micro-batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxalign.core.types import Metrics, Params


def accumulate(
  loss: Callable[[Params, PyTree, Array], tuple[Array, Metrics]],
  params: Params,
  batches: PyTree,
  key: Array,
) -> tuple[Float[Array, ""], Metrics, Params]:
  """Sums a loss, its metrics and its gradient over micro-batches.

  The loss of a micro-batch must already be divided by the *whole* batch's
  count, so that the sum does not depend on how the batch was cut.

  Args:
    loss: `(params, micro-batch, key) -> (loss, metrics)`. Metrics are added
      up, except that one whose name ends in `_max` (>= 0) keeps the largest.
    params: what to differentiate.
    batches: pytree whose leaves have a leading micro-batch axis M.
    key: consumed; each micro-batch gets `fold_in(key, index)`.
  """
  grad = jax.value_and_grad(loss, has_aux=True)
  count = jax.tree.leaves(batches)[0].shape[0]

  def one(index, batch):
    part = jax.random.fold_in(key, index)
    (value, metrics), grads = grad(params, batch, part)
    return value, metrics, grads

  if count == 1:  # no loop to compile
    return one(0, jax.tree.map(lambda x: x[0], batches))

  # Losses and gradients add up, because each is divided by the whole count.
  def body(total, xs):
    value, metrics, grads = one(*xs)
    joined = {
      name: _join(name)(total[1][name], metrics[name]) for name in metrics
    }
    grads = jax.tree.map(jnp.add, total[2], grads)
    return (total[0] + value, joined, grads), None

  # The sums start from zeros of the shapes that one micro-batch gives.
  shapes = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(body, zeros, (jnp.arange(count), batches))
  return total


def _join(name: str) -> Callable[[Array, Array], Array]:
  return jnp.maximum if name.endswith("_max") else jnp.add
