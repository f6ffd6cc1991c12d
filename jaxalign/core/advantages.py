"""Advantages: how much better an action was than expected.

Time runs along the columns of `[B, T]` rows. A row's True positions are one
unbroken span, the tokens of its completion.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
  rewards: Float[Array, "B T"],
  values: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  gamma: float,
  lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """δₜ = rₜ + γVₜ₊₁ − Vₜ, Aₜ = δₜ + γλAₜ₊₁ (Schulman 2016).

  V and A are 0 after the last token: a completion ends there, cut or not.

  Args:
    rewards: rₜ for the token at t.
    values: Vₜ, of the state in which that token is drawn.
    mask: True = a token of the completion; elsewhere the results are 0.
    gamma: γ in [0, 1], discount per token.
    lam: λ in [0, 1]; 1 = no bootstrapping.

  Returns:
    Advantages, and returns Aₜ + Vₜ.
  """
  rewards, values = (jnp.where(mask, x, 0) for x in (rewards, values))

  def back(carry, column):
    advantage, following = carry
    reward, value, real = column
    delta = reward + gamma * following - value
    # Padding on the right resets the sum, so the last token starts from 0.
    advantage = jnp.where(real, delta + gamma * lam * advantage, 0)
    return (advantage, value), advantage

  # From the last column back; beyond it A and V are 0.
  start = (jnp.zeros_like(rewards[:, 0]),) * 2
  columns = (rewards.T, values.T, mask.T)
  _, found = jax.lax.scan(back, start, columns, reverse=True)
  return found.T, jnp.where(mask, found.T + values, 0)


def rloo(
  rewards: Float[Array, "P S"], mask: Bool[Array, "P S"]
) -> Float[Array, "P S"]:
  """rᵢ − mean of the prompt's other rewards (Kool 2019; Ahmadian 2024).

  Args:
    rewards: of S completions of each of P prompts.
    mask: True = a usable completion; others count nowhere. The only completion
      of a prompt has the advantage 0.
  """
  rewards = jnp.where(mask, rewards, 0)
  count = mask.sum(axis=1, keepdims=True)
  others = rewards.sum(axis=1, keepdims=True) - rewards
  # A prompt's only completion has no baseline, so nothing is learned from it.
  found = rewards - others / jnp.maximum(count - 1, 1)
  return jnp.where(mask & (count > 1), found, 0)


def grpo(
  rewards: Float[Array, "P S"], mask: Bool[Array, "P S"]
) -> Float[Array, "P S"]:
  """(rᵢ − mean) / (std + 1e-4) over a prompt's completions (Shao 2024, eq. 3).

  The standard deviation is the unbiased one; it and the 1e-4 are TRL's.

  Args:
    rewards: as for `rloo`.
    mask: as for `rloo`.
  """
  count = mask.sum(axis=1, keepdims=True)
  mean = jnp.where(mask, rewards, 0).sum(axis=1, keepdims=True)
  # Unusable completions are 0 here, so they add no variance.
  centred = jnp.where(mask, rewards - mean / jnp.maximum(count, 1), 0)
  variance = (centred**2).sum(axis=1, keepdims=True)
  variance /= jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + 1e-4)


def whiten(
  x: Float[Array, "*S"], mask: Bool[Array, "*S"], shift: bool = True
) -> Float[Array, "*S"]:
  """x with variance 1 over its True positions, and mean 0 with `shift`.

  The variance is the unbiased one; positions under False are 0. Without
  `shift` the mean stays, as for rewards, whose sign matters.
  """
  count = jnp.maximum(mask.sum(), 1)
  mean = jnp.where(mask, x, 0).sum() / count
  variance = jnp.where(mask, (x - mean) ** 2, 0).sum()
  variance /= jnp.maximum(count - 1, 1)
  # 1e-8 as in TRL: equal values give 0, not NaN.
  scaled = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
  return jnp.where(mask, scaled if shift else scaled + mean, 0)
