"""SuperHF: sample completions, keep the best, fine-tune on them, repeat.

"SuperHF: Supervised Iterative Learning from Human Feedback" (CS224N 2023;
arXiv 2310.16763), Algorithm 1. One superbatch: the policy completes A prompts
S times each, a frozen reward model scores the completions, the K best go into
one supervised step that also holds the policy near its reference p₀:

  loss = NLL + C / NLL + β Σ_texts mean_t KL(p₀(·|t) ‖ p(·|t))

Differs from the released code, because it is broken there:
 (1) the prompt is masked by true position, whatever the padding;
 (2) the KL covers exactly the distributions that predict the completion;
 (3) the text that is scored is the text that is trained on, up to `max_length`;
 (4) the end of a text can be trained (`train_eos`);
 (5) padding never enters a reward;
 (6) intervals of 0 mean off;
 (7) one prompt without a usable completion does not end a run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.algorithms.superhf.config import SuperbatchConfig, SuperHFConfig
from jaxalign.algorithms.superhf.data import KeptBatch, kept_batches
from jaxalign.core import filters, gradients, keys, losses
from jaxalign.core.logprobs import logprobs_and_kl, weighted_nll
from jaxalign.core.types import Metrics, Params, TrainState
from jaxalign.models import lora
from jaxalign.training.forward import forward
from jaxalign.training.rollout import RolloutSource, collect
from jaxalign.training.run import Run, Update


def train(run: Run[SuperHFConfig], source: RolloutSource) -> TrainState:
  """Algorithm 1: sample, score, keep the best, fine-tune, repeat."""
  config, state = run.config, run.state
  tokenizer = source.generator.tokenizer
  context = run.model.config.max_positions
  update = run.jit(make_update(run))
  for step in run.steps():
    # Sampling and scoring.
    metrics, rows = {}, ()
    rollout = collect(run, source, state, step)
    if rollout is not None:  # None: the step failed, was counted, is skipped
      # Filtering: the best completions.
      progress = step / max(config.steps - 1, 1)
      kept = keep_best(rollout.scores, config.superbatch, progress)
      # Fine-tuning: some updates, all at the rate of this superbatch.
      with run.stage("update"):
        batches = kept_batches(
          config, run.mesh, tokenizer, context, rollout, kept
        )
        measured = []
        for i, batch in enumerate(batches):
          key = keys.fold(run.update_key(step), i)
          state, found = update(state, batch, key)
          measured.append(found)
        # The host's work on the texts, while the device updates.
        metrics, rows = rollout.metrics(kept), rollout.rows(step, kept)
        run.write_pending()
        # The next samples need these parameters anyway; waiting here costs
        # no overlap and keeps the stages' times honest.
        metrics |= mean_metrics(jax.device_get(measured))
    state = run.end_step(step, state, metrics, rows)
  return state


def keep_best(
  scores: Float[np.ndarray, "P S"],
  superbatch: SuperbatchConfig,
  progress: float = 0.0,
) -> Int[np.ndarray, " K"]:
  """Flat indices of the completions to train on.

  Of the scores, where -inf is unusable, at least one is finite. A percentile
  grows with the progress of the run, in [0, 1].
  """
  # Mixed prompts compete with each other, as one group.
  groups = scores if superbatch.filters_per_prompt else scores.reshape(1, -1)
  if not superbatch.percentile:
    return filters.top_k_per_group(groups, superbatch.keep)
  # A single number is both ends; two are joined by a straight line.
  start, end = superbatch.percentile[0], superbatch.percentile[-1]
  share = (1 - progress) * start + progress * end
  return filters.from_percentile_per_group(groups, share)


def make_update(run: Run[SuperHFConfig]) -> Update:
  """The supervised step on kept texts, a `KeptBatch` `[M, B, T]`.

  The learning rate goes by `state.step`, the superbatch, and is the same for
  all updates of one.
  """
  config = run.config

  def update(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: KeptBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    # Of all micro-batches: the sum of their losses is then a mean over tokens.
    tokens = jnp.maximum(batch.text.target_mask.sum(), 1)

    def loss(params: Params, micro: KeptBatch, key: Array):
      metrics: Metrics = {}
      policy, text, p0 = lora.join(params, frozen), micro.text, None
      # One pass for the NLL, one more of the reference for the exact KL. That
      # one is over before the policy's keeps anything for the gradient.
      if run.reference is not None:
        p0 = forward(run.reference[0], reference, text)
        hidden, text = jax.lax.optimization_barrier((p0.hidden, text))
        p0 = p0._replace(hidden=hidden)
      p = forward(run.model, policy, text, key)
      if p0 is None:
        weights = p.mask / tokens
        nll, logp = weighted_nll(p.hidden, p.targets, weights, p.unembed)
        total = nll
      else:
        logp, kl = logprobs_and_kl(
          p.hidden,
          jax.lax.stop_gradient(p0.hidden),
          p.targets,
          p.mask,
          p.unembed,
          p0.unembed,
        )
        metrics["kl_sum"] = kl.sum()
        # The NLL is a mean over all tokens. The KL is one over a text's tokens,
        # summed over texts, as in the released code.
        nll = -logp.sum() / tokens
        kl = losses.row_means(kl, p.mask).sum()
        total = nll + config.kl_weight * kl
      # Sampler and trainer; under dropout the two differ for a reason.
      if run.model.lora is None or run.model.lora.dropout == 0:
        gap = jnp.abs(logp - micro.sampled_logps)
        known = p.mask & micro.sampled
        metrics["logp_diff_max"] = jnp.where(known, gap, 0).max()
      # C / loss is of the whole batch: with C > 0 there is one micro-batch.
      if config.inverse_loss_penalty:
        total += losses.inverse_loss(nll, config.inverse_loss_penalty)
      return total, metrics | {"loss/nll": nll}

    total, metrics, grads = gradients.accumulate(loss, state.params, batch, key)
    # A mean negative log-likelihood below 0 is a fault; the update is
    # skipped, as in the released code.
    total = jnp.where(total < 0, jnp.nan, total)
    state, update_metrics = run.apply_gradients(state, grads, total)
    metrics |= {"loss/total": total, "num_tokens": tokens}
    return state, metrics | update_metrics

  return update


def mean_metrics(found: list[Metrics]) -> Metrics:
  """Means over a superbatch's updates, however many there were."""
  count, last = len(found), found[-1]
  metrics = {
    "loss/total": sum(m["loss/total"] for m in found) / count,
    "loss/nll": sum(m["loss/nll"] for m in found) / count,
    "grad_norm": sum(m["grad_norm"] for m in found) / count,
    # One rate for all updates; skipped ones are counted over the whole run.
    "lr": last["lr"],
    "skipped_updates": last["skipped_updates"],
  }
  if "kl_sum" in last:
    # By tokens, because the last update may hold fewer than the others.
    tokens = sum(m["num_tokens"] for m in found)
    metrics["kl/mean"] = sum(m["kl_sum"] for m in found) / tokens
  # Later updates of a superbatch no longer have the sampler's parameters.
  if "logp_diff_max" in found[0]:
    metrics["sampling/logp_diff_max"] = found[0]["logp_diff_max"]
  return metrics
