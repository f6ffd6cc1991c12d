"""From a reward model's scores to rewards: moments, penalties, controllers."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@typing.no_type_check  # also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and spread of all scores so far, for reward scaling."""

  count: Float[Array, ""]
  mean: Float[Array, ""]
  m2: Float[Array, ""]  # sum of squared distances from the mean

  @staticmethod
  def none() -> "Moments":
    """The moments before the first score."""
    return Moments(*(jnp.zeros(()) for _ in range(3)))

  def add(self, x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> "Moments":
    """The moments after the True entries of `x` (Chan 1979, parallel form)."""
    # Chan merges two sets by their means; sums of squares would cancel.
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum() / jnp.maximum(n, 1)
    m2 = jnp.where(mask, (x - mean) ** 2, 0).sum()
    count, gap = self.count + n, mean - self.mean
    share = n / jnp.maximum(count, 1)
    return Moments(
      count,
      self.mean + gap * share,
      self.m2 + m2 + gap**2 * self.count * share,
    )

  @property
  def deviation(self) -> Float[Array, ""]:
    """The unbiased standard deviation; 1 where it is 0 or unknown.

    Scores are divided by it.
    """
    spread = jnp.sqrt(self.m2 / jnp.maximum(self.count - 1, 1))
    return jnp.where(spread > 0, spread, 1.0)


def at_end(
  score: Float[Array, "*B"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """The score at each row's last True position, 0 elsewhere."""
  # The last True position is the first whose count equals the row's total.
  count = jnp.cumsum(mask, axis=-1)
  last = mask & (count == count[..., -1:])
  return jnp.where(last, score[..., None], 0)


def adapt(
  coefficient: Float[Array, ""],
  kl: Float[Array, ""],
  target: float,
  horizon: int,
  completions: Int[Array, ""] | int,
) -> Float[Array, ""]:
  """β (1 + clip(KL / target − 1, −0.2, 0.2) n / horizon) (Ziegler 2019).

  Args:
    coefficient: β before this step.
    kl: mean KL of a completion, nats.
    target: the KL to aim at, > 0.
    horizon: completions over which β changes by the clipped error.
    completions: n, in this step.
  """
  # The clip bounds how fast β changes, however far off the KL is.
  error = jnp.clip(kl / target - 1, -0.2, 0.2)
  return coefficient * (1 + error * completions / horizon)
