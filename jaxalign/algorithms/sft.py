"""Supervised fine-tuning: next-token loss on demonstrations.

Ouyang 2022 (§3.1) and the first stage of every pipeline here. The loss is the
sum of −log p over the counted tokens, divided once by their number in the
whole batch, so packing, micro-batches and sharding do not change a gradient.

Differs from TRL's SFTTrainer: (1) tokens that count are chosen by position,
never by token id, so the end token is trained although it may also pad;
(2) packed texts do not attend to each other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxalign.core import gradients, optim
from jaxalign.core.logprobs import weighted_nll
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.runtime.context import Context, Task, fit


def nll(
  model: Model,
  params: Params,
  batch: TextBatch,
  key: Array | None,
  tokens: Array | int = 1,
) -> tuple[Array, Array]:
  """Σ −log p / `tokens`, and how many count in a batch `[B, T]`."""
  module = model.bind(params)
  hidden, _ = module(
    batch.tokens, batch.positions, batch.segments, dropout_key=key
  )
  mask = batch.loss_mask[:, 1:]
  loss = weighted_nll(
    hidden[:, :-1], batch.tokens[:, 1:], mask / tokens, module.unembed
  )
  return loss, mask.sum()


def make_update(
  model: Model,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
  ema: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The update `(state, frozen, batch, key) -> (state, metrics)`."""

  def update(
    state: TrainState, frozen: Params, batch: TextBatch, key: Array
  ) -> tuple[TrainState, Metrics]:
    count = jnp.maximum(batch.loss_mask[..., 1:].sum(), 1)

    def loss(params, micro, key):
      return nll(model, lora.join(params, frozen), micro, key, count)[0], {}

    value, _, grads = gradients.accumulate(loss, state.params, batch, key)
    state, metrics = optim.train_step(state, grads, value, rate, optimizer, ema)
    return state, metrics | {"loss/nll": value, "num_tokens": count}

  return update


def run(
  ctx: Context,
  task: Task,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Trains for the config's steps; validates at its interval and at the end."""
  ema = ctx.config.optimizer.ema
  update = ctx.compile(make_update(ctx.model, optimizer, rate, ema))
  validate = make_validate(ctx, task.validation) if task.validation else None
  return fit(ctx, task.batch, update, validate)


def make_validate(
  ctx: Context, batches: tuple[TextBatch, ...]
) -> Callable[[TrainState], Metrics]:
  """Mean −log p a token over held-out batches, and its exponential."""

  @jax.jit
  def totals(params, frozen, batch):
    micro = jax.tree.map(lambda x: x[0], batch)
    return nll(ctx.model, lora.join(params, frozen), micro, None)

  @jax.jit
  def perplexity(sums):
    mean = sum(s for s, _ in sums) / sum(n for _, n in sums)
    return {"eval_loss/nll": mean, "eval_perplexity": jnp.exp(mean)}

  def validate(state: TrainState) -> Metrics:
    sums = [totals(state.result, ctx.frozen, ctx.put(b, 1)) for b in batches]
    return perplexity(sums)

  return validate
