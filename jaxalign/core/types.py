"""The type page: the pytrees that several rooms share.

`no_type_check`: such a tree may hold shapes, shardings or numpy rows in
place of its arrays.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

AnyArray = Any  # a jax array in a trace, a numpy array on the host
Params = dict[str, Any]  # nested; leaves are arrays, layers stacked on axis 0
Metrics = dict[str, AnyArray]  # "group/name" -> scalar array or number
JsonObject = dict[str, Any]  # values are checked where they are read


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a training run changes: all that a checkpoint has to hold."""

  params: Params  # the trained leaves: all of them, or the LoRA adapters
  opt_state: PyTree  # optax state over `params`
  step: Int[Array, ""]  # steps done: superbatches or batches
  skipped: Int[Array, ""]  # updates skipped because they were not finite
  ema: Params | None = None  # moving average of `params`, where it is kept
  extra_state: PyTree = None  # a method's own: controllers, moments

  @property
  def eval_params(self) -> Params:
    """What a run evaluates and exports: the average, or else `params`."""
    return self.params if self.ema is None else self.ema


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
  """Token rows, and which of their tokens count in a loss."""

  tokens: Int[AnyArray, "*M B T"]
  position_ids: Int[AnyArray, "*M B T"]  # of each token in its own text, from 0
  segment_ids: Int[AnyArray, "*M B T"]  # 0 = padding; equal = one text
  loss_mask: Bool[AnyArray, "*M B T"]  # True = predicting this token counts
  # Σ log π₀ over each text's counted tokens; None = the reference is run live.
  reference_logps: Float[AnyArray, "*M N"] | None = None

  @property
  def targets(self) -> Int[AnyArray, "*M B T-1"]:
    """The token that each position but the last predicts."""
    return self.tokens[..., 1:]

  @property
  def target_mask(self) -> Bool[AnyArray, "*M B T-1"]:
    """True = predicting this target counts."""
    return self.loss_mask[..., 1:]

  @property
  def completion_mask(self) -> Bool[AnyArray, "*M N T-1"]:
    """`target_mask` of each of N texts; here a row holds one text."""
    return self.target_mask


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch(TextBatch):
  """Chosen and rejected completions, N = 2B texts, the chosen ones first.

  Either each text has a row of its own, or the two completions of a prompt
  share one. Segment 1 is then the prompt without its last token, segments 2
  and 3 are that token followed by the chosen and the rejected completion.
  """

  # A second segment that each token attends to; None = every text has a row.
  prompt_segment_ids: Int[AnyArray, "*M B T"] | None = None

  @property
  def completion_mask(self) -> Bool[AnyArray, "*M N T-1"]:
    """`target_mask` of each text, in its row; chosen texts first."""
    if self.prompt_segment_ids is None:
      return self.target_mask
    # A shared row has two texts: it is listed once for each side.
    segments = self.segment_ids[..., 1:]
    sides = [self.target_mask & (segments == side) for side in (2, 3)]
    return jnp.concatenate(sides, axis=-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How tokens are drawn; None = off, and not in the compiled program.

  The values are traced: another temperature compiles nothing. Turning a
  setting on or off does. Built by `sampling.settings.make`, which checks the
  ranges.
  """

  temperature: Float[AnyArray, ""] | None  # > 0; None = 1, or greedy
  top_p: Float[AnyArray, ""] | None  # in (0, 1)
  top_k: Int[AnyArray, ""] | None  # >= 1
  repetition_penalty: Float[AnyArray, ""] | None  # > 0
  min_new_tokens: Int[AnyArray, ""] | None  # end-of-text is forbidden before
  max_new_tokens: Int[AnyArray, ""]  # at most the sampler's capacity
  eos_ids: Int[AnyArray, " E"]  # -1 = unused entry
  stops: Int[AnyArray, "M W"]  # stop sequences, right-aligned; -1 = unused
  pad_id: Int[AnyArray, ""]  # written after the end of a sample
  # Not traced: each value has a program of its own.
  greedy: bool = dataclasses.field(metadata={"static": True})
  no_repeat_ngram: int = dataclasses.field(metadata={"static": True})  # 0 = off


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """Drawn completions; row p S + s is sample s of prompt p."""

  tokens: Int[AnyArray, "B N"]  # pad_id from `lengths` on
  lengths: Int[AnyArray, " B"]  # tokens drawn, end-of-text included
  finish: Int[AnyArray, " B"]  # 0 length, 1 end of text, 2 stop sequence
  model_logps: Float[AnyArray, "B N"]  # nats, temperature 1, nothing masked
  sampling_logps: Float[AnyArray, "B N"]  # nats, under what was drawn from


@dataclasses.dataclass(frozen=True)
class Completions:
  """What a policy wrote on P prompts, S times each; row p S + s."""

  prompts: list[str]  # P, system text included
  prompt_ids: list[list[int]]  # P; the ids that the policy read
  texts: list[str]  # P S; decoded, and cut as `Generator.truncation` says
  samples: Samples  # the tokens they were decoded from
  ended: list[bool]  # P S; False = cut at the length limit
  num_tokens: list[int]  # P S; drawn; with `whole_tokens` the text's alone

  @property
  def samples_per_prompt(self) -> int:
    """S."""
    return len(self.texts) // len(self.prompts)

  @property
  def prompt_of_each(self) -> list[str]:
    """The prompt of every completion, P S."""
    each = self.samples_per_prompt
    return [prompt for prompt in self.prompts for _ in range(each)]
