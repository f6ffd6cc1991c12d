"""The reference that preference losses compare a policy with.

Live it is a model that every step runs; stored, each text brings what the model
found of it before training (`runtime.stored`), and no model is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.core.logprobs import target_logprobs
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models.model import Model
from jaxalign.runtime.context import Context, fit


def text_logps(
  model: Model, params: Params, text: TextBatch
) -> Float[Array, " N"]:
  """log π(completion | prompt) of N texts, in nats, without dropout.

  Args:
    model: of the policy or the reference.
    params: all of its parameters.
    text: `[B, T]`; its `counted` says what each text's completion is.
  """
  module = model.bind(params)
  hidden, _ = module(
    text.tokens, text.positions, text.segments, parents=text.parents
  )
  mask = text.loss_mask[:, 1:]
  logps = target_logprobs(
    hidden[:, :-1], text.tokens[:, 1:], mask, module.unembed
  )
  counted = text.counted[:, 1:]
  rows = jnp.tile(logps, (len(counted) // len(logps), 1))
  return jnp.where(counted, rows, 0).sum(axis=1)


def prior_params(ctx: Context) -> Params:
  """The live reference's parameters; none where what it found is stored."""
  return ctx.prior[1] if ctx.prior is not None else {}


def reference_logps(
  ctx: Context, prior: Params, text: TextBatch
) -> Float[Array, " N"]:
  """log π₀(completion | prompt) of N texts, without gradient.

  Args:
    ctx: the run; its `prior` is the reference, unless the texts have theirs.
    prior: of `prior_params`, an argument of the traced step.
    text: as in `text_logps`.
  """
  if text.reference_logps is not None:
    return text.reference_logps
  assert ctx.prior is not None
  return jax.lax.stop_gradient(text_logps(ctx.prior[0], prior, text))


def fit_beside(
  ctx: Context,
  batch: Callable[[int], Any],
  update: Callable[..., tuple[TrainState, Metrics]],
  validate: Callable[[TrainState], Metrics] | None,
) -> TrainState:
  """`fit` of an update that takes the reference too, not yet compiled.

  Args:
    ctx: the run.
    batch: as in `fit`.
    update: `(state, frozen, prior, batch, key) -> (state, metrics)`.
    validate: as in `fit`.
  """
  prior, compiled = prior_params(ctx), ctx.compile(update)
  step = lambda state, frozen, rows, key: compiled(
    state, frozen, prior, rows, key
  )
  return fit(ctx, batch, step, validate)
