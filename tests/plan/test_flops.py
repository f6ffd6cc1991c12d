import jax
import jax.numpy as jnp
import pytest

from jaxalign.models import attention
from jaxalign.plan.flops import BF16, EXACT, F32, count_jaxpr


def count(function, *args, trips):
  return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, trips)


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_product_counts_two_operations_for_each_term():
  x, w = shape(3, 5, 4), shape(4, 7)
  assert count(jnp.matmul, x, w, trips=0) == {F32: 2 * 3 * 5 * 4 * 7}


def test_a_gradient_costs_two_products_more():
  def loss(w, x):
    return (x @ w).sum()

  def grad(w, x):
    return jax.value_and_grad(loss, argnums=(0, 1))(w, x)

  w, x = shape(4, 7), shape(3, 4)
  once = 2 * 3 * 4 * 7
  assert count(loss, w, x, trips=0) == {F32: once}
  # The forward product may be left out, because a sum does not need it.
  assert count(grad, w, x, trips=0)[F32] in (2 * once, 3 * once)


def test_loops_count_their_turns_and_branches_the_dearest():
  w = shape(4, 4, dtype=jnp.bfloat16)
  once = 2 * 4**3

  def scanned(w):
    return jax.lax.scan(lambda x, _: (x @ w, None), w, length=6)[0]

  def looped(w):
    return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, w)

  def branched(w):
    return jax.lax.cond(w.sum() > 0, lambda x: x, lambda x: x @ x @ x, w)

  assert count(scanned, w, trips=0) == {BF16: 6 * once}
  assert count(looped, w, trips=9) == {BF16: 9 * once}
  assert count(branched, w, trips=0) == {BF16: 2 * once}

  def nested(w):
    """Its length depends on data, at most two turns; another loop in it."""
    with jax.named_scope("turns_2"):
      return jax.lax.fori_loop(0, w.sum(dtype=int), lambda i, x: looped(x), w)

  assert count(nested, w, trips=9) == {BF16: 2 * 9 * once}
  outer = jax.lax.while_loop
  twice = count(lambda w: outer(lambda x: x.any(), looped, w), w, trips=9)
  assert twice == {BF16: 9 * once}  # the inner one says nothing: one turn
  assert count(jax.jit(scanned), w, trips=0) == {BF16: 6 * once}
  assert count(jax.checkpoint(scanned), w, trips=0) == {BF16: 6 * once}


def test_precision_has_a_kind_of_its_own():
  def exact(x):
    return jnp.matmul(x, x, precision="highest")

  assert count(exact, shape(4, 4), trips=0) == {EXACT: 2 * 4**3}


def test_a_convolution_counts_its_window():
  x, w = shape(1, 3, 8, 8), shape(5, 3, 2, 2)

  def convolve(x, w):
    return jax.lax.conv(x, w, (1, 1), "VALID")

  assert count(convolve, x, w, trips=0) == {F32: 2 * 5 * 7 * 7 * 3 * 2 * 2}


@pytest.mark.parametrize("kind", attention.KINDS)
def test_attention_counts_the_same_by_every_kernel(kind):
  """Two products forwards, four backwards, of 2 B N T T H each."""
  dtype = jnp.bfloat16
  rows, length, heads, width = 2, 256, 4, 64
  q = shape(rows, length, heads, width, dtype=dtype)
  k = shape(rows, heads // 2, length, width, dtype=dtype)
  mask = shape(rows, length, length, dtype=bool)
  ids = shape(rows, length, dtype=jnp.int32)

  def loss(q, k, v, mask, ids):
    out = attention.attend_text(kind, q, k, v, mask, ids, scale=0.1)
    return out.astype(jnp.float32).sum()

  product = 2 * rows * heads * length**2 * width
  grad = jax.grad(loss, argnums=(0, 1, 2))
  found = count(grad, q, k, k, mask, ids, trips=7)
  # Splash multiplies outputs by their gradients as well, 1 / T of a product.
  assert found.total() == pytest.approx(6 * product, rel=1e-3)
