"""Loss formulas, each in the symbols of its source; shapes broadcast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def pairwise(
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
    margin: m >= 0, by how much the better one should win (Touvron 2023).
    label: p in [0, 1], how sure it is that the better one is better.
  """
  gap = chosen - rejected - margin
  return -jax.nn.log_sigmoid(gap) + (1 - label) * gap


def centring(
  chosen: Float[Array, "*#B"], rejected: Float[Array, "*#B"]
) -> Float[Array, "..."]:
  """(s_w + s_l)², keeps scores around zero (Eisenstein 2023)."""
  return (chosen + rejected) ** 2


def preference(
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
  ipo: (Δ − 1 / 2β)²: Azar 2023 (eq. 17); Δ of means a token where the caller
    divides by length, as TRL does.

  Args:
    kind: sigmoid, robust, hinge or ipo.
    lead: Δ, in nats.
    beta: > 0, how strongly the reference holds.
    smoothing: ε in [0, 0.5), the share of labels taken to be wrong; read by
      sigmoid and robust.
  """
  won = jax.nn.log_sigmoid(beta * lead)
  lost = jax.nn.log_sigmoid(-beta * lead)
  if kind == "sigmoid":
    return -(1 - smoothing) * won - smoothing * lost
  if kind == "robust":
    return (smoothing * lost - (1 - smoothing) * won) / (1 - 2 * smoothing)
  if kind == "hinge":
    return jax.nn.relu(1 - beta * lead)
  return (lead - 1 / (2 * beta)) ** 2


def unpaired(
  ratio: Float[Array, "*B"],
  desirable: Bool[Array, "*B"],
  kl: Float[Array, ""] | float,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> Float[Array, "*B"]:
  """KTO's loss of ρ = log π(y|x)/π₀(y|x), without a second answer.

  λ_D (1 − σ(β(ρ − z₀))) where y is desirable, λ_U (1 − σ(β(z₀ − ρ))) where it
  is not: Ethayarajh 2024 (eq. 8). With z₀ = 0 it is APO-zero on unpaired rows:
  D'Oosterlinck 2024 (eq. 7).

  Args:
    ratio: ρ, in nats, summed over the answer's tokens.
    desirable: True = y is desirable.
    kl: z₀ >= 0, in nats, what an answer's ρ is compared with; a constant.
    beta: > 0, how soon the loss is saturated.
    desirable_weight: λ_D.
    undesirable_weight: λ_U.
  """
  lead = jnp.where(desirable, ratio - kl, kl - ratio)
  weight = jnp.where(desirable, desirable_weight, undesirable_weight)
  return weight * jax.nn.sigmoid(-beta * lead)


def policy_gradient(
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
    low: how far ρ may fall, in [0, 1).
    high: how far it may rise, > 0.
    dual: c > 1; the loss of a bad action (A < 0) is at most −cA, however
      likely the action has become (Ye 2020); 0 = no such bound.
  """
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - low, 1 + high)
  loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
  if dual:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)
  return loss


def value(
  values: Float[Array, "*#B"],
  before: Float[Array, "*#B"],
  returns: Float[Array, "*#B"],
  clip: float = 0.0,
) -> Float[Array, "..."]:
  """½ max((V − R)², (clip(V, V_old ± ε) − R)²), as in OpenAI's baselines.

  Args:
    values: V, now.
    before: V_old, when the answer was drawn.
    returns: R.
    clip: ε; 0 = ½ (V − R)².
  """
  loss = (values - returns) ** 2
  if clip:
    near = jnp.clip(values, before - clip, before + clip)
    loss = jnp.maximum(loss, (near - returns) ** 2)
  return 0.5 * loss


def divergence(kind: str, log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """What one token tells of KL(π ‖ π₀); Δ = ln π/π₀ of a token drawn from π.

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
    return jnp.expm1(-log_ratio) + log_ratio
  assert kind == "abs", kind
  return jnp.abs(log_ratio)


def inverse_loss(nll: Float[Array, ""], coefficient: float) -> Float[Array, ""]:
  """C / loss, SuperHF's guard against zero-entropy states; 0 turns it off.

  The value is finite for loss 0, where the formula is not: the loss is
  bounded below by 1e-6.
  """
  return coefficient / jnp.maximum(nll, 1e-6)
