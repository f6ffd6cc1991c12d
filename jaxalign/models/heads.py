"""Reads a text's score from the hidden states.

Padding never takes part. Positions come from the mask, not from ids, so a score
depends neither on the padding side nor on the batch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.types import Params
from jaxalign.models.config import CausalConfig

VALUE = "value"  # key of the value model in the parameters of a PPO policy


def policy_of(params: Params) -> Params:
  """A policy's own parameters, without those of its value model."""
  return {name: x for name, x in params.items() if name != VALUE}


class Scored:
  """What every score model has: `scores`, and `score` for a single column."""

  def scores(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
  ) -> Float[Array, "B G"]:
    """The score head's values of each text, one per group."""
    raise AssertionError("each architecture defines its scores")

  def score(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
  ) -> Float[Array, " B"]:
    """`scores` of a model with one column: without groups, or folded."""
    scores = self.scores(tokens, mask, types, dropout_key)
    assert scores.shape[1] == 1, scores.shape
    return scores[:, 0]


def pool(
  config: CausalConfig,
  hidden: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  mask: Bool[Array, "B T"],
) -> Float[Array, "B D"]:
  """The state that a causal model's score head reads.

  `score_last`: the last real token that is not the pad token (Hugging Face's
  sequence classifiers: where a folder pads with the end token, the one before).
  `score_eos`: the first end-of-text token, else the last real one (ALMoST).
  `score_mean`: the mean over real tokens (SuperHF's reward models, whose code
  averaged over padding too; here it does not).
  """
  # `where`, not a product: hidden states of padding may be anything.
  if config.head == "score_mean":
    kept = mask[..., None]
    total = jnp.where(kept, hidden.astype(jnp.float32), 0).sum(axis=1)
    count = jnp.maximum(mask.sum(axis=1), 1)
    return (total / count[:, None]).astype(hidden.dtype)
  # Padding may be on either side, so the last real token is searched for.
  at_last = config.head == "score_last" and config.pad_id >= 0
  index = _last(mask & (tokens != config.pad_id) if at_last else mask)
  if config.head == "score_eos":
    ends = mask & (tokens == config.eos_id)
    index = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), index)
  return hidden[jnp.arange(hidden.shape[0]), index]


def _last(mask: Bool[Array, "B T"]) -> Int[Array, " B"]:
  """Column of each row's last real token; 0 where there is none."""
  columns = jnp.arange(mask.shape[1])
  return jnp.maximum(jnp.max(jnp.where(mask, columns, -1), axis=1), 0)
