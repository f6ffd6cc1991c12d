"""Sums and means under a mask: sum and count first, divide once."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_sum(
  x: Float[Array, "*S"], mask: Bool[Array, "*S"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Σ x over True positions, and how many there are (float32).

  Values under False may be anything, NaN and infinities included.
  """
  # `where`, not `x * mask`: NaN times 0 is NaN.
  total = jnp.where(mask, x, 0).sum(dtype=jnp.float32)
  return total, mask.sum(dtype=jnp.float32)


def masked_mean(
  x: Float[Array, "*S"], mask: Bool[Array, "*S"]
) -> Float[Array, ""]:
  """Mean of x over True positions; 0 where there are none."""
  total, count = masked_sum(x, mask)
  return total / jnp.maximum(count, 1)


def row_means(
  x: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
  """Mean of each row's True positions; 0 for a row without any."""
  total = jnp.where(mask, x, 0).sum(axis=1, dtype=jnp.float32)
  return total / jnp.maximum(mask.sum(axis=1), 1)
