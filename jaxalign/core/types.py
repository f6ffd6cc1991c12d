"""The type page: every pytree that crosses from one room to another.

`no_type_check`: such a tree also carries shapes, shardings or numpy rows in
the places of its arrays.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]  # nested; leaves are arrays, layers stacked on axis 0
Metrics = dict[str, Any]  # "group/name" -> scalar array or number


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a training run changes, and all that a checkpoint has to hold."""

  params: Params  # the trained leaves: all of them, or the LoRA adapters
  opt_state: Any  # optax state over `params`
  step: Int[Array, ""]  # steps done: superbatches or batches
  skipped: Int[Array, ""]  # updates left out because they were not finite
  ema: Params | None = None  # running mean of `params`, where it is kept
  carried: Any = None  # what an algorithm keeps besides: controllers, moments

  @property
  def result(self) -> Params:
    """What a run validates and exports: the mean, or else `params`."""
    return self.params if self.ema is None else self.ema


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
  """Token rows with the tokens that count in a loss.

  N texts: one a row, or with `parents` two that share their prompt. Segment 1
  is then the prompt without its last token, segments 2 and 3 are that token
  and an answer each; the rows' first texts are counted before all second ones.
  """

  tokens: Int[Array, "*M B T"]
  positions: Int[Array, "*M B T"]  # position of each token in its own text
  segments: Int[Array, "*M B T"]  # 0 = padding; equal = one text
  loss_mask: Bool[Array, "*M B T"]  # True = this token is to be predicted
  # Σ log π₀ of the tokens to be predicted, where the reference's are stored.
  reference_logps: Float[Array, "*M N"] | None = None
  # The segment that a token's own goes on from, where texts share a prompt.
  parents: Int[Array, "*M B T"] | None = None

  @property
  def counted(self) -> Bool[Array, "*M N T"]:
    """Of each text the tokens to be predicted, where its row has them."""
    if self.parents is None:
      return self.loss_mask
    sides = [self.loss_mask & (self.segments == side) for side in (2, 3)]
    return jnp.concatenate(sides, axis=-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How tokens are drawn. Traced values: changing them compiles nothing.

  Built by `sampling.settings.make`, which checks the ranges.
  """

  temperature: Float[Any, ""]  # >= 0; 0 = greedy
  top_p: Float[Any, ""]  # in (0, 1]; 1 = off
  top_k: Int[Any, ""]  # >= 0; 0 = off
  repetition_penalty: Float[Any, ""]  # > 0; 1 = off
  no_repeat_ngram: Int[Any, ""]  # >= 0; 0 = off
  min_new_tokens: Int[Any, ""]  # end-of-text is forbidden before
  max_new_tokens: Int[Any, ""]  # at most the sampler's capacity
  eos_ids: Int[Any, " E"]  # -1 = unused entry
  stops: Int[Any, "M W"]  # stop sequences, right-aligned; -1 = unused entry
  pad_id: Int[Any, ""]  # written after the end of a sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """Drawn completions; row p S + s is sample s of prompt p."""

  tokens: Int[Any, "B N"]  # pad_id from `lengths` on
  lengths: Int[Any, " B"]  # tokens drawn, end-of-text included
  finish: Int[Any, " B"]  # 0 length, 1 end of text, 2 stop sequence
  model_logps: Float[Any, "B N"]  # nats, temperature 1, nothing masked
  sampling_logps: Float[Any, "B N"]  # nats, under what was drawn from


@dataclasses.dataclass(frozen=True)
class Answers:
  """The completions of one superbatch as text, prompt by prompt."""

  prompts: list[str]  # P, system text included
  texts: list[str]  # P S completions, truncated and stripped
  samples: Samples  # the tokens they were decoded from
  ended: list[bool]  # P S; False = cut at the length limit
  trained: list[int] | None = None  # P S; drawn tokens that make up the text

  @property
  def asked(self) -> list[str]:
    """The prompt of each completion."""
    each = len(self.texts) // len(self.prompts)
    return [p for p in self.prompts for _ in range(each)]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptBatch:
  """Kept texts of one update, and what the sampler thought of them."""

  text: TextBatch
  sampled_logps: Float[Array, "*M B T"]  # the sampler's model log-probs
  sampled: Bool[Array, "*M B T"]  # True = that log-prob is known
