"""Loss formulas, each in the symbols of its source; shapes broadcast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def bradley_terry_loss(
  chosen: Float[Array, "*#B"],
  rejected: Float[Array, "*#B"],
  margin: Float[Array, "*#B"] | float = 0.0,
  label: Float[Array, "*#B"] | float = 1.0,
) -> Float[Array, "..."]:
  """−p log σ(d) − (1 − p) log σ(−d), d = s_w − s_l − m: Bradley-Terry.

  With p = 1 the loss of Stiennon 2020 (eq. 1).

  Args:
    chosen: score s_w of the better text, raw logit.
    rejected: score s_l of the worse text, raw logit.
    margin: m >= 0, how far apart the scores should be (Touvron 2023).
    label: p in [0, 1], the probability that the better one is better.
  """
  # −log σ(−d) = −log σ(d) + d, so one log-sigmoid is enough.
  gap = chosen - rejected - margin
  return -jax.nn.log_sigmoid(gap) + (1 - label) * gap


def reward_centering(
  chosen: Float[Array, "*#B"], rejected: Float[Array, "*#B"]
) -> Float[Array, "..."]:
  """(s_w + s_l)², which keeps scores around zero (Eisenstein 2023)."""
  return (chosen + rejected) ** 2


def dpo_loss(
  kind: str,
  lead: Float[Array, "*B"],
  beta: float,
  smoothing: float = 0.0,
) -> Float[Array, "*B"]:
  """DPO's losses of Δ = log π(y_w)/π₀(y_w) − log π(y_l)/π₀(y_l).

  sigmoid: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ): Rafailov 2023 (eq. 7), with ε the
    conservative form of Mitchell 2023.
  robust: (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε): Chowdhury 2024, whose
    expectation under labels flipped with probability ε is the clean loss.
  hinge: max(0, 1 − βΔ): Zhao 2023 (SLiC).
  ipo: (Δ − 1 / 2β)²: Azar 2023 (eq. 17). TRL takes Δ of the mean per token;
    the caller divides by the length.

  Args:
    kind: sigmoid, robust, hinge or ipo.
    lead: Δ, in nats.
    beta: > 0, how strongly the policy is held to the reference.
    smoothing: ε in [0, 0.5), the assumed share of wrong labels; used by
      sigmoid and robust.
  """
  # log σ of a large negative number is exact; log(σ(x)) would be −inf.
  won = jax.nn.log_sigmoid(beta * lead)
  lost = jax.nn.log_sigmoid(-beta * lead)
  if kind == "sigmoid":
    return -(1 - smoothing) * won - smoothing * lost
  if kind == "robust":
    return (smoothing * lost - (1 - smoothing) * won) / (1 - 2 * smoothing)
  if kind == "hinge":
    return jax.nn.relu(1 - beta * lead)
  # ipo: a square, so a lead beyond 1 / 2β is pulled back.
  return (lead - 1 / (2 * beta)) ** 2


def kto_loss(
  ratio: Float[Array, "*B"],
  desirable: Bool[Array, "*B"],
  kl: Float[Array, ""] | float,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> Float[Array, "*B"]:
  """KTO's loss of ρ = log π(y|x)/π₀(y|x), which needs no pair.

  λ_D (1 − σ(β(ρ − z₀))) where y is desirable, λ_U (1 − σ(β(z₀ − ρ))) where it
  is not: Ethayarajh 2024 (eq. 8). With z₀ = 0 it is APO-zero on unpaired rows:
  D'Oosterlinck 2024 (eq. 7).

  Args:
    ratio: ρ, in nats, summed over the completion's tokens.
    desirable: True = y is desirable.
    kl: z₀ >= 0, in nats, the baseline that ρ is compared with; no gradient
      flows into it.
    beta: > 0, how soon the loss saturates.
    desirable_weight: λ_D.
    undesirable_weight: λ_U.
  """
  # 1 − σ(x) = σ(−x), exact also where σ(x) rounds to 1.
  lead = jnp.where(desirable, ratio - kl, kl - ratio)
  weight = jnp.where(desirable, desirable_weight, undesirable_weight)
  return weight * jax.nn.sigmoid(-beta * lead)


def clipped_surrogate_loss(
  log_ratio: Float[Array, "*#B"],
  advantage: Float[Array, "*#B"],
  low: float,
  high: float,
  dual: float = 0.0,
) -> Float[Array, "..."]:
  """max(−Aρ, −A clip(ρ, 1 − low, 1 + high)), ρ = π/π_old (Schulman 2017).

  Args:
    log_ratio: ln ρ, in nats.
    advantage: A.
    low: how far ρ may fall below 1, in [0, 1).
    high: how far it may rise above 1, > 0.
    dual: c > 1; the loss of a bad action (A < 0) is at most −cA, however
      likely the action has become (Ye 2020); 0 = no such bound.
  """
  # The larger loss of the two: clipping removes the gain from going further,
  # never the way back.
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - low, 1 + high)
  loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
  # Without this bound a bad action that became likely has an unbounded loss.
  if dual:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)
  return loss


def clipped_value_loss(
  values: Float[Array, "*#B"],
  old_values: Float[Array, "*#B"],
  returns: Float[Array, "*#B"],
  clip: float = 0.0,
) -> Float[Array, "..."]:
  """½ max((V − R)², (clip(V, V_old ± ε) − R)²), as in OpenAI's baselines.

  Args:
    values: V, now.
    old_values: V_old, when the completion was drawn.
    returns: R.
    clip: ε; 0 = ½ (V − R)², without clipping.
  """
  loss = (values - returns) ** 2
  if clip:
    # The larger of the two: clipping may only make the loss worse.
    near = jnp.clip(values, old_values - clip, old_values + clip)
    loss = jnp.maximum(loss, (near - returns) ** 2)
  return 0.5 * loss


def kl_estimate(kind: str, log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Estimates KL(π ‖ π₀) from one token drawn from π, with Δ = ln π/π₀.

  k1: Δ, unbiased, may be negative.
  k2: ½Δ², biased, small variance.
  k3: exp(−Δ) − 1 + Δ, unbiased and never negative (Schulman 2020).
  abs: |Δ|.
  """
  if kind == "k1":
    return log_ratio
  if kind == "k2":
    return 0.5 * log_ratio**2
  if kind == "k3":
    # expm1 keeps the digits that 1 − exp(−Δ) loses near Δ = 0.
    return jnp.expm1(-log_ratio) + log_ratio
  assert kind == "abs", kind
  return jnp.abs(log_ratio)


def inverse_loss(nll: Float[Array, ""], coefficient: float) -> Float[Array, ""]:
  """C / loss, SuperHF's guard against collapse to zero entropy; 0 = off.

  The formula is infinite at loss 0; here the loss is at least 1e-6.
  """
  return coefficient / jnp.maximum(nll, 1e-6)


def row_means(
  x: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
  """Mean of each row's True positions; 0 for a row without any."""
  total = jnp.where(mask, x, 0).sum(axis=1, dtype=jnp.float32)
  return total / jnp.maximum(mask.sum(axis=1), 1)
