"""Kahneman-Tversky optimisation: answers that are good or bad, without pairs.

Ethayarajh 2024: an answer's reward ρ = log π(y|x)/π₀(y|x) is compared not with
another answer's but with a point of reference z₀, how far the policy has moved
on average, and its utility saturates on both sides (`losses.unpaired`). The
reference π₀ is the policy before training: a frozen copy, the base under LoRA
adapters, or what it found of every text before the first step. Rows have a
label, or are comparisons, each of which gives two.

z₀ = max(0, mean ρ of mismatched pairs), prompts with answers to *other*
prompts, over the whole batch and without gradient (§4.1).

Differs from TRL's KTOTrainer: (1) z₀ and all sums are of the whole batch, over
micro-batches and devices, and are divided once; (2) mismatched pairs are made
when a batch is drawn, so rows may be shuffled anew in every epoch; (3) an
answer is not put behind its own prompt although another answer to it stands
next to it (`batches.mismatch`).
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core import gradients, losses, optim
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.runtime.context import Context, Task
from jaxalign.runtime.reference import (
  fit_beside,
  prior_params,
  reference_logps,
  text_logps,
)


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledBatch:
  """Answers with labels, and the batch's prompts with each other's answers."""

  text: TextBatch  # [M, B, T]; a row in which nothing counts is filler
  desirable: Bool[Array, "*M B"]  # True = desirable
  group: Int[Array, "*M B"]  # answers to one prompt carry one number
  mismatched: TextBatch | None  # [M, B, T]; None where the loss has no z₀


def make_update(
  ctx: Context,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The update `(state, frozen, prior, batch, key) -> (state, metrics)`."""

  def update(
    state: TrainState,
    frozen: Params,
    prior: Params,
    batch: LabelledBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    rows = jnp.maximum(_real(batch.text).sum(), 1)
    kl, known = 0.0, {}
    if batch.mismatched is not None:
      params = lora.join(state.params, frozen)
      one = lambda text: drift(ctx, params, prior, text)
      kl = point_of_reference(jax.lax.map(one, batch.mismatched))
      known = {"kl": kl}

    def loss(params, micro, key):
      del key  # no dropout: a ratio of two noisy values is no reward
      found, _ = sums(ctx, lora.join(params, frozen), prior, kl, *micro)
      return found["loss/total"] / rows, found

    micros = batch.text, batch.desirable
    value, found, grads = gradients.accumulate(loss, state.params, micros, key)
    state, metrics = optim.train_step(
      state, grads, value, rate, optimizer, ctx.config.optimizer.ema
    )
    return state, metrics | known | means(found)

  return update


def drift(
  ctx: Context, params: Params, prior: Params, text: TextBatch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Σ log π/π₀ of mismatched pairs `[B, T]`, and their number."""
  ratio = text_logps(ctx.model, params, text)
  ratio -= reference_logps(ctx, prior, text)
  real = _real(text)
  return jnp.where(real, ratio, 0).sum(), real.sum()


def point_of_reference(
  parts: tuple[Float[Array, " N"], Int[Array, " N"]],
) -> Float[Array, ""]:
  """z₀ of the sums and numbers of N parts, all that `drift` found."""
  total, count = jax.tree.map(jnp.sum, parts)
  return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1), 0))


def sums(
  ctx: Context,
  params: Params,
  prior: Params,
  kl: Float[Array, ""] | float,
  text: TextBatch,
  desirable: Bool[Array, " B"],
) -> tuple[Metrics, Float[Array, " B"]]:
  """Loss and metrics summed over `[B, T]` rows, and each row's β log π/π₀.

  Nothing is divided yet; `means` does it, once and by the whole's counts.
  """
  config = ctx.config
  logps = text_logps(ctx.model, params, text)
  ratio = logps - reference_logps(ctx, prior, text)
  loss = losses.unpaired(
    ratio,
    desirable,
    kl,
    config.beta,
    config.desirable_weight,
    config.undesirable_weight,
  )
  rewards = config.beta * ratio
  real = _real(text)
  good, bad = real & desirable, real & ~desirable
  total = lambda value, where: jnp.where(where, value, 0).sum()
  return {
    "loss/total": total(loss, real),
    "rewards/chosen": total(rewards, good),
    "rewards/rejected": total(rewards, bad),
    "logps/chosen": total(logps, good),
    "logps/rejected": total(logps, bad),
    "num_desirable": good.sum(),
    "num_undesirable": bad.sum(),
    "num_tokens": text.loss_mask.sum(),
  }, rewards


def means(found: Metrics) -> Metrics:
  """Metrics of `sums`, each over the rows it is of; NaN where there is none."""
  good, bad = found["num_desirable"], found["num_undesirable"]
  chosen = found["rewards/chosen"] / good
  rejected = found["rewards/rejected"] / bad
  return found | {
    "loss/total": found["loss/total"] / jnp.maximum(good + bad, 1),
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "logps/chosen": found["logps/chosen"] / good,
    "logps/rejected": found["logps/rejected"] / bad,
  }


def _real(text: TextBatch) -> Bool[Array, "*M B"]:
  """Rows that are no filler: some of their tokens count."""
  return text.loss_mask.any(axis=-1)


def run(
  ctx: Context,
  task: Task,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Trains for the config's steps; validates at its interval and at the end."""
  update = make_update(ctx, optimizer, rate)
  validate = make_validate(ctx, task.validation) if task.validation else None
  return fit_beside(ctx, task.batch, update, validate)


def make_validate(
  ctx: Context, batches: tuple[LabelledBatch, ...]
) -> Callable[[TrainState], Metrics]:
  """The metrics over held-out rows as `eval_...`, and `agreement`.

  z₀ is that of all held-out rows.
  """
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)

  @jax.jit
  def moved(params, frozen, prior, text):
    return drift(ctx, lora.join(params, frozen), prior, first(text))

  @jax.jit
  def totals(params, frozen, prior, batch, kl):
    text, desirable = first((batch.text, batch.desirable))
    return sums(ctx, lora.join(params, frozen), prior, kl, text, desirable)

  @jax.jit
  def joined(parts):
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)

  @jax.jit
  def whole(parts):
    found = means(jax.tree.map(lambda x: x.sum(0), parts))
    found.pop("num_tokens")
    return {f"eval_{name}": value for name, value in found.items()}

  def validate(state: TrainState) -> Metrics:
    given = state.result, ctx.frozen, prior_params(ctx)
    put = [ctx.put(b, 1) for b in batches]
    known, kl = {}, ctx.put(np.float32(0))
    if batches[0].mismatched is not None:
      parts = [moved(*given, b.mismatched) for b in put]
      kl = jax.jit(point_of_reference)(joined(parts))
      known = {"eval_kl": kl}
    parts = [totals(*given, b, kl) for b in put]
    rewards = jax.device_get([rewards for _, rewards in parts])
    known |= agreement(np.concatenate(rewards), *_labels(batches))
    return known | whole(joined([found for found, _ in parts]))

  return validate


def _labels(
  batches: tuple[LabelledBatch, ...],
) -> tuple[Bool[np.ndarray, " B"], Int[np.ndarray, " B"]]:
  """`desirable` and `group` of all batches' rows."""
  return (
    np.concatenate([b.desirable[0] for b in batches]),
    np.concatenate([b.group[0] for b in batches]),
  )


def agreement(
  reward: Float[np.ndarray, " B"],
  desirable: Bool[np.ndarray, " B"],
  group: Int[np.ndarray, " B"],
) -> Metrics:
  """How often a prompt's desirable answer has the larger reward.

  All pairs of a desirable and an undesirable answer to one prompt count;
  every prompt weighs the same.

  Args:
    reward: of each row.
    desirable: its label.
    group: answers to one prompt carry one number; -1 = filler.

  Returns:
    `eval_rewards/accuracies`, and `eval_prompts`, how many prompts have
    answers of both labels; nothing where none has.
  """
  order = np.argsort(group, kind="stable")
  ends = np.flatnonzero(np.diff(group[order])) + 1
  right = []
  for rows in np.split(order, ends):
    good = reward[rows[desirable[rows]]]
    bad = reward[rows[~desirable[rows]]]
    if group[rows[0]] >= 0 and len(good) and len(bad):
      right.append(float((good[:, None] > bad[None, :]).mean()))
  if not right:
    return {}
  return {
    "eval_rewards/accuracies": float(np.mean(right)),
    "eval_prompts": len(right),
  }
