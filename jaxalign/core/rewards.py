"""From a reward model's scores to rewards: moments, penalties, controllers."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.advantages import whiten
from jaxalign.core.types import Metrics


@typing.no_type_check  # also holds shapes and shardings
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and spread of all scores so far."""

  count: Float[Array, ""]
  mean: Float[Array, ""]
  m2: Float[Array, ""]  # sum of squared distances from the mean

  @staticmethod
  def none() -> "Moments":
    """Of no score at all."""
    return Moments(*(jnp.zeros(()) for _ in range(3)))

  def add(self, x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> "Moments":
    """With the True ones of `x` (Chan 1979, the parallel formula)."""
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
    """The unbiased standard deviation; 1 where it would be 0 or unknown."""
    spread = jnp.sqrt(self.m2 / jnp.maximum(self.count - 1, 1))
    return jnp.where(spread > 0, spread, 1.0)


def at_end(
  score: Float[Array, "*B"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """The score at each row's last True position, 0 elsewhere."""
  count = jnp.cumsum(mask, axis=-1)
  last = mask & (count == count[..., -1:])
  return jnp.where(last, score[..., None], 0)


def adapt(
  coefficient: Float[Array, ""],
  kl: Float[Array, ""],
  target: float,
  horizon: int,
  answers: Int[Array, ""] | int,
) -> Float[Array, ""]:
  """β (1 + clip(KL / target − 1, −0.2, 0.2) n / horizon) (Ziegler 2019).

  Args:
    coefficient: β before.
    kl: mean KL of an answer, nats.
    target: what it should be, > 0.
    horizon: answers over which β changes.
    answers: n, in this step.
  """
  error = jnp.clip(kl / target - 1, -0.2, 0.2)
  return coefficient * (1 + error * answers / horizon)


def first_carried(coefficient: float) -> dict[str, Any]:
  """What a run keeps beside its parameters, before the first step."""
  return {
    "kl_coef": jnp.float32(coefficient),
    "scores": Moments.none(),
  }


def scaled(
  shaping: Any,
  score: Float[Array, "*B"],
  usable: Bool[Array, "*B"],
  before: Moments,
) -> tuple[Float[Array, "*B"], Moments]:
  """Scores centred, divided and clipped as `shaping` says, and the moments.

  `running` goes by all scores so far, `reference` by those of the first step.
  """
  moments = before.add(score, usable)
  if shaping.scaling == "reference":
    first = before.count == 0
    moments = jax.tree.map(lambda a, b: jnp.where(first, a, b), moments, before)
  if shaping.centre:
    score = jnp.where(usable, score - moments.mean, 0)
  if shaping.scaling != "none":
    score /= moments.deviation
  if shaping.clip:
    score = jnp.clip(score, -shaping.clip, shaping.clip)
  return score, moments


def shape(
  shaping: Any,
  control: Any,
  score: Float[Array, "C B"],
  ended: Bool[Array, "C B"],
  kl: Float[Array, "C B T"],
  mask: Bool[Array, "C B T"],
  carried: dict[str, Any],
) -> tuple[Float[Array, "C B T"], dict[str, Any], Metrics]:
  """Rewards of all tokens, what the next step needs, and metrics.

  Args:
    shaping: the section of a PPO config.
    control: its section `kl`.
    score: of each answer, raw logit.
    ended: False = cut at the length limit.
    kl: of each token to the reference, nats; 0 outside of answers.
    mask: True = a token of an answer; a row without any counts nowhere.
    carried: see `first_carried`.
  """
  usable = mask.any(axis=-1)
  coefficient = carried["kl_coef"]
  count = jnp.maximum(usable.sum(), 1)
  mean = lambda x: jnp.where(usable, x, 0).sum() / count
  score = jnp.where(usable, score, 0)
  score -= shaping.missing_eos_penalty * ~ended
  score, moments = scaled(shaping, score, usable, carried["scores"])
  if control.clip:
    kl = jnp.maximum(kl, 0)
  penalty = coefficient * kl
  shaped = at_end(score, mask)
  if control.place == "reward":
    shaped -= penalty
  if shaping.whiten:
    shaped = whiten(shaped, mask, shift=False)
  spent = kl.sum(axis=-1)
  after = coefficient
  if control.target:
    after = adapt(
      coefficient, mean(spent), control.target, control.horizon, count
    )
  return (
    shaped,
    {"kl_coef": after, "scores": moments},
    {
      "objective/kl": mean(spent),
      "objective/kl_coef": coefficient,
      "objective/scores": mean(score),
      "objective/non_score_reward": -mean(penalty.sum(axis=-1)),
      "objective/rlhf_reward": mean(score - penalty.sum(axis=-1)),
    },
  )
