"""Direct preference optimisation: comparisons without a reward model.

Rafailov 2023: the policy itself is the reward model, r(y) = β log π(y)/π₀(y),
and is trained on comparisons by the loss of one (`losses.preference`). The
reference π₀ is the policy before training: a frozen copy, the base under LoRA
adapters, or what it found of every text before the first step.

`run` learns from stored comparisons. `run_online` answers every prompt twice
with the policy as it is, asks a reward model, a function or people which answer
is better, and learns from that by the same loss.

Differs from TRL's DPOTrainer: (1) losses are divided once by the pairs of the
whole batch, so micro-batches and sharding change no gradient; (2) `ipo` takes
sums over tokens, as its paper does, unless `length_normalised` is set; (3) the
SFT term is a mean over pairs, not one over all their tokens.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core import gradients, keys, losses, optim
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.runtime import answers
from jaxalign.runtime.answers import Scored, Tools
from jaxalign.runtime.context import Context, Task
from jaxalign.runtime.reference import (
  fit_beside,
  prior_params,
  reference_logps,
  text_logps,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineTools(Tools):
  """The tools of a run that compares its own answers.

  Attributes:
    prefer: (step, scored answers, whether the run was asked to stop) -> of
      each prompt which of its two answers is better, 0 or 1, or -1 for neither;
      None if the run has to stop before people have answered.
  """

  prefer: Callable[
    [int, Scored, Callable[[], bool]], Int[np.ndarray, " P"] | None
  ]


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
    batch: TextBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    pairs = jnp.maximum(_real(batch).sum(), 1)

    def loss(params, micro, key):
      del key  # no dropout: a ratio of two noisy values is no reward
      found = pair_losses(ctx, lora.join(params, frozen), prior, micro)
      total = {name: value.sum() / pairs for name, value in found.items()}
      return total["loss/total"], total

    value, found, grads = gradients.accumulate(loss, state.params, batch, key)
    state, metrics = optim.train_step(
      state, grads, value, rate, optimizer, ctx.config.optimizer.ema
    )
    return state, metrics | found | {"num_tokens": batch.loss_mask.sum()}

  return update


def pair_losses(
  ctx: Context, params: Params, prior: Params, text: TextBatch
) -> dict[str, Float[Array, " B"]]:
  """Loss and metrics of each pair; 0 for filler pairs.

  Args:
    ctx: the run.
    params: all of the policy's parameters.
    prior: of `prior_params`.
    text: 2B texts, first the chosen ones, then the rejected ones.
  """
  config = ctx.config
  logps = text_logps(ctx.model, params, text)
  before = reference_logps(ctx, prior, text)
  counts = jnp.maximum(text.counted[:, 1:].sum(axis=1), 1)
  ratio = logps - before
  scaled = ratio / counts if config.length_normalised else ratio
  better, worse = jnp.split(scaled, 2)
  loss = losses.preference(
    config.loss, better - worse, config.beta, config.label_smoothing
  )
  chosen, rejected = jnp.split(config.beta * ratio, 2)
  chosen_logp, rejected_logp = jnp.split(logps, 2)
  nll = -jnp.split(logps / counts, 2)[0]
  found = {
    "loss/total": loss + config.sft_coefficient * nll,
    "loss/preference": loss,
    "loss/nll": nll,
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    "logps/chosen": chosen_logp,
    "logps/rejected": rejected_logp,
  }
  real = _real(text)
  return {name: jnp.where(real, value, 0) for name, value in found.items()}


def _real(text: TextBatch) -> Bool[Array, "*M B"]:
  """Pairs that are no filler: something of the chosen text counts."""
  return jnp.split(text.counted.any(axis=-1), 2, axis=-1)[0]


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
  ctx: Context, batches: tuple[TextBatch, ...]
) -> Callable[[TrainState], Metrics]:
  """The means of all metrics over held-out pairs, as `eval_...`."""

  @jax.jit
  def totals(params, frozen, prior, batch):
    text = jax.tree.map(lambda x: x[0], batch)
    found = pair_losses(ctx, lora.join(params, frozen), prior, text)
    return {k: v.sum() for k, v in found.items()}, _real(text).sum()

  @jax.jit
  def means(parts):
    count = sum(n for _, n in parts)
    total = jax.tree.map(lambda *x: sum(x), *[sums for sums, _ in parts])
    return {f"eval_{k}": v / count for k, v in total.items()}

  def validate(state: TrainState) -> Metrics:
    prior = prior_params(ctx)
    return means(
      [totals(state.result, ctx.frozen, prior, ctx.put(b, 1)) for b in batches]
    )

  return validate


def run_online(
  ctx: Context,
  tools: OnlineTools,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Answers twice, asks which is better, learns; repeats."""
  config, state = ctx.config, ctx.state
  assert ctx.prior is not None
  prior = ctx.prior[1]
  update = ctx.compile(make_update(ctx, optimizer, rate))
  for step in ctx.steps():
    key = keys.fold(ctx.key, step)
    metrics, rows, pairs = {}, [], None
    with answers.tolerated(ctx, step):
      params = lora.join(state.params, ctx.frozen)
      scored = answers.draw(ctx, tools, params, step, key)
      with ctx.stage("judge"):
        choice = tools.prefer(step, scored, ctx.stopping)
      if choice is None:
        return state
      better, worse = ordered(choice)
      pairs = tools.encode(scored.answers, better, worse)
    if pairs is None:
      state = optim.advance(state)
    else:
      with ctx.stage("update"):
        state, metrics = update(state, ctx.frozen, prior, pairs, key)
        jax.block_until_ready(metrics)
      found = measure(config.beta, metrics, scored, better, worse)
      told, rows = answers.tell(tools, step, scored, better)
      metrics |= found | told
    answers.end_step(ctx, tools, step, state, metrics, rows)
  return state


def ordered(
  choice: Int[np.ndarray, " P"],
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
  """Flat indices of the better and of the worse answers, undecided left out.

  Raises:
    ValueError: all prompts are undecided.
  """
  prompts = np.flatnonzero(choice >= 0)
  if not len(prompts):
    raise ValueError("no prompt has an answer that is better than the other")
  picked = choice[prompts]
  return 2 * prompts + picked, 2 * prompts + 1 - picked


def measure(
  beta: float,
  metrics: Metrics,
  scored: Scored,
  better: Int[np.ndarray, " N"],
  worse: Int[np.ndarray, " N"],
) -> Metrics:
  """What is told of a step's pairs, besides the loss."""
  flat = scored.scores.reshape(-1)
  return {
    "objective/kl": _kl(beta, metrics),
    "objective/scores_margin": (flat[better] - flat[worse]).mean(),
    "num_pairs": len(better),
  }


@functools.partial(jax.jit, static_argnames="beta")
def _kl(beta: float, metrics: Metrics) -> Array:
  """Mean log π/π₀ of answers that the policy drew: its KL, nats an answer."""
  rewards = metrics["rewards/chosen"] + metrics["rewards/rejected"]
  return rewards / (2 * beta)
