"""Kahneman-Tversky optimisation: good or bad completions, without pairs.

Ethayarajh 2024: a completion's reward ρ = log π(y|x)/π₀(y|x) is compared not
with another completion's but with a baseline z₀, how far the policy has moved
on average, and its utility saturates on both sides (`losses.kto_loss`). The
reference π₀ is the policy before training: a frozen copy, the base under LoRA
adapters, or its log-probs of every text, computed before the first step. Rows
have a label, or are comparisons, each of which gives two.

z₀ = max(0, mean ρ of mismatched pairs), prompts with completions of *other*
prompts, over the whole batch and without gradient (§4.1).

Differs from TRL's KTOTrainer: (1) z₀ and all sums are of the whole batch, over
micro-batches and devices, and are divided once; (2) mismatched pairs are made
when a batch is drawn, so rows may be shuffled in every epoch; (3) a prompt is
not paired with another of its own completions, although it stands next to it
(`batches.mismatch`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.core import gradients, losses
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.training.forward import completion_logps, reference_logps
from jaxalign.training.run import Run, Update


def make_update(run: Run[KTOConfig]) -> Update:
  """The update on a `LabelledBatch` `[M, B, T]`."""

  def update(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: LabelledBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    # Of all micro-batches, so that their losses add up to the mean.
    rows = jnp.maximum(is_row(batch.text).sum(), 1)
    live = run.live_reference(reference)
    # z₀ by the parameters as they are, before any loss is computed.
    baseline, baseline_metric = 0.0, {}
    if batch.mismatched is not None:
      params = lora.join(state.params, frozen)

      def mismatched(text: TextBatch):
        return mismatched_logratios(run.model, params, live, text)

      baseline = kl_baseline(*jax.lax.map(mismatched, batch.mismatched))
      baseline_metric = {"kl": baseline}

    def loss(params: Params, micro: tuple[TextBatch, Array], key: Array):
      del key  # no dropout: a ratio of two noisy values is no reward
      text, desirable = micro
      whole = lora.join(params, frozen)
      found, _ = sum_metrics(run, whole, live, baseline, text, desirable)
      return found["loss/total"] / rows, found

    micros = batch.text, batch.desirable
    value, found, grads = gradients.accumulate(loss, state.params, micros, key)
    state, metrics = run.apply_gradients(state, grads, value)
    return state, metrics | baseline_metric | mean_metrics(found)

  return update


def mismatched_logratios(
  model: Model,
  params: Params,
  reference: tuple[Model, Params] | None,
  text: TextBatch,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Σ log π/π₀ of mismatched pairs `[B, T]`, and their number."""
  ratio = completion_logps(model, params, text)
  ratio -= reference_logps(reference, text)
  real = is_row(text)
  return jnp.where(real, ratio, 0).sum(), real.sum()


def kl_baseline(
  totals: Float[Array, " N"], counts: Int[Array, " N"]
) -> Float[Array, ""]:
  """z₀ from the sums and numbers of N parts, see `mismatched_logratios`."""
  # A KL is never negative, though its estimate may be.
  total, count = totals.sum(), counts.sum()
  return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1), 0))


def sum_metrics(
  run: Run[KTOConfig],
  params: Params,
  reference: tuple[Model, Params] | None,
  baseline: Float[Array, ""] | float,
  text: TextBatch,
  desirable: Bool[Array, " B"],
) -> tuple[Metrics, Float[Array, " B"]]:
  """Loss and metrics summed over `[B, T]` rows, and each row's β log π/π₀.

  Nothing is divided yet; `mean_metrics` does it, once and by the whole's
  counts.
  """
  config = run.config
  logps = completion_logps(run.model, params, text)
  ratio = logps - reference_logps(reference, text)
  loss = losses.kto_loss(
    ratio,
    desirable,
    baseline,
    config.beta,
    config.desirable_weight,
    config.undesirable_weight,
  )
  # Sums for each label; a filler row counts in neither.
  rewards = config.beta * ratio
  real = is_row(text)
  good, bad = real & desirable, real & ~desirable
  return {
    "loss/total": jnp.where(real, loss, 0).sum(),
    "rewards/chosen": jnp.where(good, rewards, 0).sum(),
    "rewards/rejected": jnp.where(bad, rewards, 0).sum(),
    "logps/chosen": jnp.where(good, logps, 0).sum(),
    "logps/rejected": jnp.where(bad, logps, 0).sum(),
    "num_desirable": good.sum(),
    "num_undesirable": bad.sum(),
    "num_tokens": text.loss_mask.sum(),
  }, rewards


def mean_metrics(sums: Metrics) -> Metrics:
  """Means of `sum_metrics` over the rows they are of; NaN without rows."""
  good, bad = sums["num_desirable"], sums["num_undesirable"]
  chosen = sums["rewards/chosen"] / good
  rejected = sums["rewards/rejected"] / bad
  return sums | {
    "loss/total": sums["loss/total"] / jnp.maximum(good + bad, 1),
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "logps/chosen": sums["logps/chosen"] / good,
    "logps/rejected": sums["logps/rejected"] / bad,
  }


def is_row(text: TextBatch) -> Bool[Array, "*M B"]:
  """Rows that are no filler: some of their tokens count."""
  return text.loss_mask.any(axis=-1)
