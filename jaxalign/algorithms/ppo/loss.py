"""PPO's loss, and the forward passes that it shares with the experience."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.algorithms.ppo.config import PPOConfig
from jaxalign.algorithms.ppo.data import Experience
from jaxalign.core import losses
from jaxalign.core.logprobs import logprobs_and_entropy, reverse_kl
from jaxalign.core.types import Metrics, Params, TextBatch
from jaxalign.models import lora
from jaxalign.models.heads import VALUE, policy_of
from jaxalign.models.model import Model
from jaxalign.training.forward import Predictions, forward
from jaxalign.training.run import Run

# (params, `Experience` micro-batch, tokens of the minibatch) -> loss, metrics.
Loss = Callable[[Params, Experience, Array], tuple[Array, Metrics]]


def policy_and_value(
  model: Model, value_model: Model | None, params: Params, text: TextBatch
) -> tuple[
  Predictions,
  Float[Array, "B T"],
  Float[Array, "B T"],
  Float[Array, "B T"],
]:
  """Predictions, log-probs, entropies and values of `[B, T]` texts.

  `params` are the policy's, with those of the value model under `value`; see
  `train.train`.
  """
  # No dropout key, so the ratio is exactly 1 before the first update.
  p = forward(model, policy_of(params), text)
  logp, entropy = logprobs_and_entropy(p.hidden, p.targets, p.mask, p.unembed)
  # Values from a model of their own, from a head on the policy, or none.
  value = jnp.zeros_like(logp)
  if value_model is not None:
    states = forward(value_model, params[VALUE], text).hidden
    head = value_model.bind(params[VALUE]).score_head
    value = head(states.astype(jnp.float32))[..., 0]
  elif VALUE in params:
    head = params[VALUE]["value_head"]
    # After the states proper may come an output adapter's features.
    states = p.hidden[..., : len(head["kernel"])].astype(jnp.float32)
    value = (states @ head["kernel"])[..., 0] + head["bias"]
  value = jnp.where(p.mask, value.astype(jnp.float32), 0)
  return p, logp, entropy, value


def reference_predictions(
  run: Run[PPOConfig], reference: Params, text: TextBatch
) -> Predictions:
  """The reference's predictions, without gradient."""
  assert run.reference is not None
  p = forward(run.reference[0], reference, text)
  return p._replace(hidden=jax.lax.stop_gradient(p.hidden))


def exact_kl(
  policy: Predictions, reference: Predictions
) -> Float[Array, "B T"]:
  """KL(policy ‖ reference) at each token, over the whole vocabulary."""
  return reverse_kl(
    policy.hidden,
    reference.hidden,
    policy.mask,
    policy.unembed,
    reference.unembed,
  )


def make_loss(
  run: Run[PPOConfig],
  value_model: Model | None,
  frozen: Params,
  reference: Params,
  kl_coefficient: Float[Array, ""],
) -> Loss:
  """The loss of a micro-batch, divided by the tokens of its minibatch."""
  config = run.config

  def loss(params: Params, part: Experience, tokens: Array):
    # The same forward pass that the experience was computed with.
    p, logp, entropy, value = policy_and_value(
      run.model, value_model, lora.join(params, frozen), part.text
    )

    # A part of the minibatch's mean; those of all micro-batches add up to it.
    def mean(x: Float[Array, "B T"] | Bool[Array, "B T"]) -> Float[Array, ""]:
      return jnp.where(p.mask, x, 0).sum() / tokens

    # The clipped surrogate.
    log_ratio = jnp.where(p.mask, logp - part.logp, 0)
    surrogate = losses.clipped_surrogate_loss(
      log_ratio,
      part.advantage,
      config.clip_low,
      config.clip_high,
      config.dual_clip,
    )
    policy = mean(part.weight * surrogate)
    total = policy
    found = {"loss/policy_avg": policy}

    # The value loss.
    if config.advantage == "gae":
      error = losses.clipped_value_loss(
        value, part.value, part.returns, config.value_clip
      )
      # The clip decides wherever the clipped loss is the larger one.
      unclipped = losses.clipped_value_loss(value, part.value, part.returns)
      found["loss/value_avg"] = mean(error)
      found["val/clipfrac_avg"] = mean(error > unclipped)
      total += config.vf_coef * found["loss/value_avg"]

    # Entropy, and the KL where it is a part of the loss.
    if config.entropy_coef:
      total -= config.entropy_coef * mean(entropy)
    if config.kl.place == "loss":
      # Over the whole vocabulary the reference has to run again; an estimate
      # takes its log-probs of the drawn tokens, which are known.
      if config.kl.estimator == "full":
        kl = exact_kl(p, reference_predictions(run, reference, part.text))
      else:
        kl = losses.kl_estimate(config.kl.estimator, logp - part.reference)
      total += kl_coefficient * mean(kl)

    # Metrics: how far the policy has moved, and where the clip stops it.
    ratio = jnp.exp(log_ratio)
    falls = (part.advantage < 0) & (ratio < 1 - config.clip_low)
    rises = (part.advantage > 0) & (ratio > 1 + config.clip_high)
    return total, found | {
      "loss/total": total,
      "val/ratio": mean(ratio),
      "policy/clipfrac_avg": mean(falls | rises),
      # Two estimates of KL(old ‖ new), from tokens that the old policy drew.
      "policy/approxkl_avg": mean(0.5 * log_ratio**2),
      "policy/policykl": -mean(log_ratio),
    }

  return loss
