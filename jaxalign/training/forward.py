"""A policy's forward pass over training texts, shifted by one, in one place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.logprobs import Unembed, target_logprobs
from jaxalign.core.types import PairBatch, Params, TextBatch
from jaxalign.models.model import Model


class Predictions(NamedTuple):
  """What a policy predicts; position t of T - 1 predicts token t + 1."""

  hidden: Float[Array, "B T E"]  # the state before each target
  targets: Int[Array, "B T"]
  mask: Bool[Array, "B T"]  # True = predicting this target counts
  unembed: Unembed  # hidden -> float32 logits


def forward(
  model: Model,
  params: Params,
  text: TextBatch,
  dropout_key: Array | None = None,
) -> Predictions:
  """Runs `[B, T]` texts through a causal model; a key turns LoRA dropout on."""
  module = model.bind(params)
  prompt_segment_ids = None
  if isinstance(text, PairBatch):
    prompt_segment_ids = text.prompt_segment_ids
  hidden, _ = module(
    text.tokens,
    text.position_ids,
    text.segment_ids,
    dropout_key=dropout_key,
    prompt_segment_ids=prompt_segment_ids,
  )
  # The last state predicts nothing that is there.
  return Predictions(
    hidden[:, :-1], text.targets, text.target_mask, module.chunked_unembed()
  )


def completion_logps(
  model: Model, params: Params, text: TextBatch
) -> Float[Array, " N"]:
  """log π(completion | prompt) of N texts, in nats, without dropout.

  `completion_mask` of the `[B, T]` rows says what each text's completion is.
  """
  p = forward(model, params, text)
  logps = target_logprobs(p.hidden, p.targets, p.mask, p.unembed)
  # N texts in B rows: where a pair shares a row, two masks read the same
  # log-probs.
  mask = text.completion_mask
  rows = jnp.tile(logps, (len(mask) // len(logps), 1))
  return jnp.where(mask, rows, 0).sum(axis=1)


def reference_logps(
  reference: tuple[Model, Params] | None, text: TextBatch
) -> Float[Array, " N"]:
  """log π₀(completion | prompt) of N texts, in nats, without gradient.

  Without a live reference the texts bring their log-probs, precomputed.
  """
  if text.reference_logps is not None:
    return text.reference_logps
  assert reference is not None
  return jax.lax.stop_gradient(completion_logps(*reference, text))
