"""Advantages: how much better an action was than what was expected.

Times are columns of `[B, T]` rows; a row's True positions are one unbroken
span, the tokens of its answer.
"""

from typing import Any

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

  Beyond the last token V and A are 0: an answer ends there, cut or not.

  Args:
    rewards: rₜ for the token at t.
    values: Vₜ, of the state in which that token is drawn.
    mask: True = a token of the answer; elsewhere the results are 0.
    gamma: γ in [0, 1], discount a token.
    lam: λ in [0, 1]; 1 = no bootstrapping.

  Returns:
    Advantages, and returns Aₜ + Vₜ.
  """
  rewards, values = (jnp.where(mask, x, 0) for x in (rewards, values))

  def back(carry, column):
    advantage, following = carry
    reward, value, real = column
    delta = reward + gamma * following - value
    advantage = jnp.where(real, delta + gamma * lam * advantage, 0)
    return (advantage, value), advantage

  start = (jnp.zeros_like(rewards[:, 0]),) * 2
  columns = (rewards.T, values.T, mask.T)
  _, found = jax.lax.scan(back, start, columns, reverse=True)
  return found.T, jnp.where(mask, found.T + values, 0)


def rloo(
  rewards: Float[Array, "P S"], mask: Bool[Array, "P S"]
) -> Float[Array, "P S"]:
  """rᵢ − mean of the other answers to its prompt (Kool 2019; Ahmadian 2024).

  Args:
    rewards: of S answers to each of P prompts.
    mask: True = a usable answer; others count nowhere. A prompt's only answer
      has the advantage 0.
  """
  rewards = jnp.where(mask, rewards, 0)
  count = mask.sum(axis=1, keepdims=True)
  others = rewards.sum(axis=1, keepdims=True) - rewards
  found = rewards - others / jnp.maximum(count - 1, 1)
  return jnp.where(mask & (count > 1), found, 0)


def grpo(
  rewards: Float[Array, "P S"], mask: Bool[Array, "P S"]
) -> Float[Array, "P S"]:
  """(rᵢ − mean) / (std + 1e-4) over a prompt's answers (Shao 2024, eq. 3).

  The deviation is the unbiased one, as in TRL, which has the 1e-4 too.

  Args:
    rewards: as for `rloo`.
    mask: as for `rloo`.
  """
  count = mask.sum(axis=1, keepdims=True)
  mean = jnp.where(mask, rewards, 0).sum(axis=1, keepdims=True)
  centred = jnp.where(mask, rewards - mean / jnp.maximum(count, 1), 0)
  variance = (centred**2).sum(axis=1, keepdims=True)
  variance /= jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + 1e-4)


def whiten(
  x: Float[Array, "*S"], mask: Bool[Array, "*S"], shift: bool = True
) -> Float[Array, "*S"]:
  """x with variance 1 over its True positions, and mean 0 with `shift`.

  The variance is the unbiased one; positions under False are 0. Without
  `shift` the mean stays, as for rewards, whose sign means something.
  """
  count = jnp.maximum(mask.sum(), 1)
  mean = jnp.where(mask, x, 0).sum() / count
  variance = jnp.where(mask, (x - mean) ** 2, 0).sum()
  variance /= jnp.maximum(count - 1, 1)
  scaled = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
  return jnp.where(mask, scaled if shift else scaled + mean, 0)


def estimate(
  config: Any,
  shaped: Float[Array, "C B T"],
  value: Float[Array, "C B T"],
  mask: Bool[Array, "C B T"],
) -> tuple[Float[Array, "C B T"], Float[Array, "C B T"]]:
  """Advantages and returns of a step's answers, by `config.advantage`.

  Args:
    config: of a PPO run.
    shaped: rewards.
    value: V before each token; read by `gae`.
    mask: True = a token of an answer; rows go prompt by prompt.
  """
  rows = lambda x: x.reshape(-1, x.shape[-1])
  if config.advantage == "gae":
    found, returns = gae(
      rows(shaped), rows(value), rows(mask), config.gamma, config.lam
    )
    found, returns = (x.reshape(mask.shape) for x in (found, returns))
    if config.whiten_advantages:
      found = whiten(found, mask)
    return found, returns
  # An answer is one action: each of its tokens has the answer's advantage.
  baseline = {"rloo": rloo, "grpo": grpo}
  groups = lambda x: x.reshape(-1, config.samples_per_prompt)
  totals = groups(jnp.where(mask, shaped, 0).sum(axis=-1))
  found = baseline[config.advantage](totals, groups(mask.any(axis=-1)))
  found = jnp.where(mask, found.reshape(*mask.shape[:2], 1), 0)
  return found, jnp.zeros_like(found)
