"""What is known of a rollout before the first update: rewards, advantages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxalign.algorithms.ppo.config import PPOConfig, ShapingConfig
from jaxalign.algorithms.ppo.data import Experience, PPOBatch
from jaxalign.algorithms.ppo.loss import (
  exact_kl,
  policy_and_value,
  reference_predictions,
)
from jaxalign.core import advantages, losses, rewards
from jaxalign.core.logprobs import logprobs_and_entropy
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.training.run import Run

ExtraState = dict[str, PyTree]  # {"kl_coef": scalar, "scores": rewards.Moments}


def first_extra_state(kl_coefficient: float) -> ExtraState:
  """What a run keeps next to its parameters, before the first step."""
  return {
    "kl_coef": jnp.float32(kl_coefficient),
    "scores": rewards.Moments.none(),
  }


def make_experience(
  run: Run[PPOConfig],
  value_model: Model | None,
  state: TrainState,
  frozen: Params,
  reference: Params,
  batch: PPOBatch,
) -> tuple[Experience, ExtraState, Metrics]:
  """Policy, value and reference passes, rewards and advantages; in a trace.

  For `value_model` see `train.train`.
  """
  config = run.config
  params = lora.join(state.params, frozen)

  # Policy, value and reference passes, C of B rows, one after another.
  def passes(text: TextBatch):
    return score_with_reference(run, value_model, params, reference, text)

  seen = jax.lax.map(passes, batch.text)
  mask = batch.text.target_mask
  # Rewards from scores and KL, then advantages from rewards.
  shaped, extra_state, metrics = shape_rewards(
    config, batch, seen["kl"], state.extra_state
  )
  advantage, returns = estimate_advantages(config, shaped, seen["value"], mask)
  # min(π/μ, cap) corrects for drawing from μ (Espeholt 2018).
  weight = jnp.ones_like(seen["logp"])
  if config.sampling_correction:
    weight = jnp.exp(seen["logp"] - batch.sampling_logps)
    weight = jnp.minimum(weight, config.sampling_correction)
  tokens = jnp.maximum(mask.sum(), 1)
  # Sampler and trainer compute these apart: they differ by rounding alone.
  gap = jnp.abs(seen["logp"] - batch.model_logps)
  metrics |= {
    "kl/mean": seen["k1"].sum() / tokens,
    "sampling/logp_diff_max": jnp.where(mask, gap, 0).max(),
    "policy/entropy_avg": seen["entropy"].sum() / tokens,
    "num_tokens": tokens,
  }
  experience = Experience(
    batch.text,
    seen["logp"],
    seen["value"],
    seen["reference"],
    weight,
    advantage,
    returns,
  )
  if config.advantage == "gae":
    metrics |= explained_variance(experience, mask)
  return experience, extra_state, metrics


def score_with_reference(
  run: Run[PPOConfig],
  value_model: Model | None,
  params: Params,
  reference: Params,
  text: TextBatch,
) -> dict[str, Float[Array, "B T"]]:
  """What policy, value model and reference say of `[B, T]` texts."""
  p, logp, entropy, value = policy_and_value(
    run.model, value_model, params, text
  )
  p0 = reference_predictions(run, reference, text)
  # The same computation as the policy's: their difference starts at exactly 0.
  reference_logp, _ = logprobs_and_entropy(
    p0.hidden, p0.targets, p0.mask, p0.unembed
  )
  log_ratio = logp - reference_logp
  estimator = run.config.kl.estimator
  if estimator == "full":
    kl = exact_kl(p, p0)
  else:
    kl = losses.kl_estimate(estimator, log_ratio)
  return {
    "logp": logp,
    "reference": reference_logp,
    "entropy": entropy,
    "value": value,
    "kl": kl,
    # For `kl/mean`, whatever estimator the penalty uses.
    "k1": log_ratio,
  }


def shape_rewards(
  config: PPOConfig,
  batch: PPOBatch,
  kl: Float[Array, "C B T"],
  extra_state: ExtraState,
) -> tuple[Float[Array, "C B T"], ExtraState, Metrics]:
  """Rewards of all tokens, what the next step needs, and metrics.

  Args:
    config: its sections `shaping` and `kl`.
    batch: scores and masks; a row without any counted token counts nowhere.
    kl: of each token to the reference, nats; 0 outside of completions.
    extra_state: see `first_extra_state`.
  """
  shaping, mask = config.shaping, batch.text.target_mask
  usable = mask.any(axis=-1)
  count = jnp.maximum(usable.sum(), 1)

  def mean(x: Float[Array, "C B"]) -> Float[Array, ""]:
    return jnp.where(usable, x, 0).sum() / count

  # Scores: penalised, then centred, divided and clipped.
  score = jnp.where(usable, batch.score, 0)
  score -= shaping.missing_eos_penalty * ~batch.ended
  score, moments = scale_scores(shaping, score, usable, extra_state["scores"])
  # The KL of each token, weighted by this step's coefficient.
  if config.kl.clip:
    kl = jnp.maximum(kl, 0)
  coefficient = extra_state["kl_coef"]
  penalty = coefficient * kl
  # The score at the last token; with kl.place='reward' less each token's KL.
  shaped = rewards.at_end(score, mask)
  if config.kl.place == "reward":
    shaped -= penalty
  if shaping.whiten:
    shaped = advantages.whiten(shaped, mask, shift=False)
  # An adaptive coefficient changes for the next step only.
  kl_of_each, next_coefficient = kl.sum(axis=-1), coefficient
  if config.kl.target:
    next_coefficient = rewards.adapt(
      coefficient, mean(kl_of_each), config.kl.target, config.kl.horizon, count
    )
  return (
    shaped,
    {"kl_coef": next_coefficient, "scores": moments},
    {
      "objective/kl": mean(kl_of_each),
      "objective/kl_coef": coefficient,
      "objective/scores": mean(score),
      "objective/non_score_reward": -mean(penalty.sum(axis=-1)),
      "objective/rlhf_reward": mean(score - penalty.sum(axis=-1)),
    },
  )


def scale_scores(
  shaping: ShapingConfig,
  score: Float[Array, "*B"],
  usable: Bool[Array, "*B"],
  before: rewards.Moments,
) -> tuple[Float[Array, "*B"], rewards.Moments]:
  """Scores centred, divided and clipped as `shaping` says, and the moments.

  `running` goes by all scores so far, `reference` by those of the first step.
  """
  # This step's scores count as well, so the first step is scaled too.
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


def estimate_advantages(
  config: PPOConfig,
  shaped: Float[Array, "C B T"],
  value: Float[Array, "C B T"],
  mask: Bool[Array, "C B T"],
) -> tuple[Float[Array, "C B T"], Float[Array, "C B T"]]:
  """Advantages and returns of a step's completions, by `config.advantage`.

  `shaped` holds rewards, `value` is V before each token, read by `gae`; rows go
  prompt by prompt, and the mask is True on tokens of completions.
  """
  if config.advantage == "gae":
    # GAE runs along each row, whichever pass the row is in.
    rows = -1, mask.shape[-1]
    found, returns = advantages.gae(
      shaped.reshape(rows),
      value.reshape(rows),
      mask.reshape(rows),
      config.gamma,
      config.lam,
    )
    found, returns = found.reshape(mask.shape), returns.reshape(mask.shape)
    if config.whiten_advantages:
      found = advantages.whiten(found, mask)
    return found, returns
  # A completion is one action: each of its tokens has its advantage.
  groups = -1, config.samples_per_prompt
  totals = jnp.where(mask, shaped, 0).sum(axis=-1).reshape(groups)
  usable = mask.any(axis=-1).reshape(groups)
  baseline = advantages.rloo if config.advantage == "rloo" else advantages.grpo
  found = baseline(totals, usable).reshape(*mask.shape[:2], 1)
  found = jnp.where(mask, found, 0)
  # Without a value model nothing reads the returns.
  return found, jnp.zeros_like(found)


def explained_variance(
  experience: Experience, mask: Bool[Array, "C B T"]
) -> Metrics:
  """How well values predicted returns: 1 = wholly, <= 0 = not at all."""
  count = jnp.maximum(mask.sum(), 1)

  def mean(x: Float[Array, "C B T"]) -> Float[Array, ""]:
    return jnp.where(mask, x, 0).sum() / count

  value, returns = experience.value, experience.returns
  error = mean((value - returns) ** 2)
  spread = mean((returns - mean(returns)) ** 2)
  return {
    "val/mean": mean(value),
    "returns/mean": mean(returns),
    "val/var_explained": 1 - error / jnp.maximum(spread, 1e-8),
  }
