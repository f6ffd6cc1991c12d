"""SuperHF: sample several answers, keep the best, fine-tune on them, repeat.

"SuperHF: Supervised Iterative Learning from Human Feedback" (CS224N 2023;
arXiv 2310.16763), Algorithm 1. One superbatch: the policy answers A prompts S
times each, a frozen reward model scores the answers, the K best go into one
supervised step that also holds the policy near its prior:

  loss = NLL + C / NLL + β Σ_texts mean_t KL(p₀(·|t) ‖ p(·|t))

Differs from the released code, because it is broken there:
 (1) the prompt is masked by true position, whatever the padding;
 (2) the KL covers exactly the distributions that predict the completion;
 (3) the text that is scored is the text that is trained on, token for token;
 (4) the end of a text can be trained (`train_eos`);
 (5) padding never enters a reward;
 (6) intervals of 0 mean off;
 (7) one prompt without a usable answer does not end a run.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxalign.config import SuperbatchConfig
from jaxalign.core import filters, gradients, keys, losses, masked, optim
from jaxalign.core.logprobs import logprobs_and_kl, target_logprobs
from jaxalign.core.types import KeptBatch, Metrics, Params, TrainState
from jaxalign.models import lora
from jaxalign.runtime import answers
from jaxalign.runtime.answers import Tools
from jaxalign.runtime.context import Context


def run(
  ctx: Context,
  tools: Tools,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Algorithm 1."""
  config, state = ctx.config, ctx.state
  update = ctx.compile(make_update(ctx, optimizer, rate))
  prior = ctx.prior[1] if ctx.prior else None
  for step in ctx.steps():
    key = keys.fold(ctx.key, step)
    metrics, rows, chosen = {}, [], None
    with answers.tolerated(ctx, step):
      params = lora.join(state.params, ctx.frozen)
      scored = answers.draw(ctx, tools, params, step, key)
      done = step / max(config.steps - 1, 1)
      kept = keep_best(scored.scores, config.superbatch, done)
      chosen = scored, kept, tools.encode(scored.answers, kept)
    if chosen:
      scored, kept, batches = chosen
      with ctx.stage("update"):
        found = []
        for i, batch in enumerate(batches):
          part = keys.fold(key, i)
          state, measured = update(state, ctx.frozen, prior, batch, part)
          found.append(measured)
        # The next samples need these parameters anyway; waiting here costs
        # no overlap and keeps the stages' times honest.
        found = jax.device_get(found)
      metrics, rows = answers.tell(tools, step, scored, kept)
      metrics |= _update_metrics(found)
    state = optim.advance(state)
    answers.end_step(ctx, tools, step, state, metrics, rows)
  return state


def keep_best(
  scores: Float[np.ndarray, "P S"],
  superbatch: SuperbatchConfig,
  done: float = 0.0,
) -> Int[np.ndarray, " K"]:
  """Flat indices of the answers to train on.

  Args:
    scores: of a superbatch, -inf = unusable.
    superbatch: see `mode`, `keep` and `percentile`.
    done: how much of the run is done, in [0, 1]; a percentile grows with it.

  Raises:
    ValueError: no answer is usable.
  """
  choose = lambda row: filters.top_k(row, superbatch.keep)
  if superbatch.percentile:
    start, end = superbatch.percentile[0], superbatch.percentile[-1]
    share = (1 - done) * start + done * end
    choose = lambda row: filters.from_percentile(row, share)
  groups = scores if superbatch.filters_per_prompt else scores.reshape(1, -1)
  kept = filters.per_prompt(choose, groups)
  if not len(kept):
    raise ValueError("every completion was empty or had no finite score")
  return kept


def make_update(
  ctx: Context,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The supervised step `(state, frozen, prior, batch, key)` on kept texts.

  The learning rate goes by `state.step`, the superbatch, and is the same for
  all updates of one.
  """
  config = ctx.config

  def update(state: TrainState, frozen, prior, batch: KeptBatch, key: Array):
    tokens = jnp.maximum(batch.text.loss_mask[..., 1:].sum(), 1)

    def loss(params, micro, key):
      whole = lora.join(params, frozen)
      nll, kl, measured = _text_losses(ctx, whole, prior, micro, key)
      nll /= tokens
      total = nll + max(config.kl_coefficient, 0) * kl
      # C / loss is of the whole batch: with C > 0 there is one micro-batch.
      if config.inverse_loss_penalty:
        total += losses.inverse_loss(nll, config.inverse_loss_penalty)
      return total, measured | {"nll": nll}

    total, measured, grads = gradients.accumulate(
      loss, state.params, batch, key
    )
    lr = rate(state.step)
    # A mean negative log-likelihood below 0 is a fault; the update is left
    # out, as in the released code.
    total = jnp.where(total < 0, jnp.nan, total)
    state, norm = optim.apply_gradients(
      state, grads, total, lr, optimizer, config.optimizer.ema
    )
    return state, measured | {
      "total": total,
      "tokens": tokens,
      "grad_norm": norm,
      "lr": lr,
      "skipped": state.skipped,
    }

  return update


def _text_losses(
  ctx: Context,
  params: Params,
  prior: Params | None,
  batch: KeptBatch,
  key: Array,
) -> tuple[Array, Array, Metrics]:
  """Σ NLL, Σ_texts KL and measurements of `[B, T]` texts."""
  text = batch.text
  inputs = (text.tokens, text.positions, text.segments)
  mask, targets = text.loss_mask[:, 1:], text.tokens[:, 1:]
  module = ctx.model.bind(params)
  hidden = module(*inputs, dropout_key=key)[0][:, :-1]
  if ctx.prior is None or prior is None:
    logp = target_logprobs(hidden, targets, mask, module.unembed)
    kl = jnp.zeros_like(logp)
  else:
    before = ctx.prior[0].bind(prior)
    reference = jax.lax.stop_gradient(before(*inputs)[0][:, :-1])
    logp, kl = logprobs_and_kl(
      hidden, reference, targets, mask, module.unembed, before.unembed
    )
  gap = jnp.abs(logp - batch.sampled_logps[:, 1:])
  known = mask & batch.sampled[:, 1:]
  measured = {"kl_sum": kl.sum()} if prior is not None else {}
  # Under dropout the two differ for a reason.
  if ctx.model.lora is None or ctx.model.lora.dropout == 0:
    measured["logp_diff_max"] = jnp.where(known, gap, 0).max()
  return -logp.sum(), masked.row_means(kl, mask).sum(), measured


def _update_metrics(found: list[Metrics]) -> Metrics:
  """Means over a superbatch's updates, however many there were."""
  mean = lambda name: sum(m[name] for m in found) / len(found)
  metrics = {
    "loss/total": mean("total"),
    "loss/nll": mean("nll"),
    "grad_norm": mean("grad_norm"),
    "lr": found[-1]["lr"],
    "skipped_updates": found[-1]["skipped"],
  }
  if "kl_sum" in found[0]:
    kl, tokens = (sum(m[name] for m in found) for name in ("kl_sum", "tokens"))
    metrics["kl/mean"] = kl / tokens
  # Later updates of a superbatch no longer have the sampler's parameters.
  if "logp_diff_max" in found[0]:
    metrics["sampling/logp_diff_max"] = found[0]["logp_diff_max"]
  return metrics
