"""A step's completions as the rows that PPO learns from."""

import dataclasses
import typing

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.algorithms.ppo.config import PPOConfig
from jaxalign.core.types import AnyArray, TextBatch
from jaxalign.data.batches import bucket_length
from jaxalign.data.encode import Encoded
from jaxalign.data.packing import blank, pack
from jaxalign.training.rollout import Rollout


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOBatch:
  """A step's completions, prompt by prompt, in C passes of B rows."""

  text: TextBatch  # [C, B, T]; loss_mask: tokens that were drawn and kept
  score: Float[AnyArray, "C B"]  # less the length penalty; 0 = nothing was kept
  ended: Bool[AnyArray, "C B"]  # False = cut at the length limit
  model_logps: Float[AnyArray, "C B T-1"]  # of the drawn tokens, by the sampler
  sampling_logps: Float[AnyArray, "C B T-1"]  # under what they were drawn from


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
  """A rollout with what its updates need; column t is of token t + 1."""

  text: TextBatch  # [..., B, T]
  logp: Float[AnyArray, "*C B T-1"]  # of the policy that drew
  value: Float[AnyArray, "*C B T-1"]  # V before the token is drawn
  reference: Float[AnyArray, "*C B T-1"]  # log-probs of the reference
  weight: Float[AnyArray, "*C B T-1"]  # see `sampling_correction`; else 1
  advantage: Float[AnyArray, "*C B T-1"]
  returns: Float[AnyArray, "*C B T-1"]


def blank_batch(shape: tuple[int, int, int]) -> PPOBatch:
  """A batch `[C, B, T]` in which nothing counts, for its shape."""
  passes, rows, _ = shape
  text = blank(shape)
  return PPOBatch(
    text,
    score=np.zeros((passes, rows), np.float32),
    ended=np.zeros((passes, rows), bool),
    model_logps=np.zeros(text.targets.shape, np.float32),
    sampling_logps=np.zeros(text.targets.shape, np.float32),
  )


def encode_rollout(
  config: PPOConfig, pad_id: int, rollout: Rollout
) -> tuple[Int[np.ndarray, " K"], PPOBatch]:
  """Flat indices of the completions to learn from, and all as numpy rows.

  The rows hold the drawn tokens themselves, so texts are cut at whole tokens;
  at least one completion is usable.
  """
  completions, samples = rollout.completions, rollout.completions.samples
  each, scores = completions.samples_per_prompt, rollout.scores.reshape(-1)
  counts = np.array(completions.num_tokens)
  usable = np.isfinite(scores) & (counts > 0)
  # The drawn ids themselves, because encoding a text again may change them.
  # An unusable completion keeps its row, so that rows go prompt by prompt.
  texts = []
  for i, count in enumerate(np.where(usable, counts, 0)):
    prompt = completions.prompt_ids[i // each]
    ids = (*prompt, *samples.tokens[i][:count].tolist())
    mask = (False,) * len(prompt) + (True,) * int(count)
    texts.append(Encoded(ids, len(prompt), mask, True))
  # One bucketed width for the step, so that few programs are compiled.
  longest = max(len(text) for text in texts)
  width = bucket_length(longest, config.length_buckets)
  # The sampler's log-probs, in the columns of their tokens.
  model_logps = np.zeros((len(texts), width), np.float32)
  sampling_logps = np.zeros((len(texts), width), np.float32)
  for i, text in enumerate(texts):
    here = slice(text.prompt_length, len(text))
    count = len(text) - text.prompt_length
    model_logps[i, here] = samples.model_logps[i][:count]
    sampling_logps[i, here] = samples.sampling_logps[i][:count]
  micro = config.micro_rows
  batch = PPOBatch(
    text=pack([[text] for text in texts], width, pad_id, len(texts) // micro),
    score=np.where(usable, scores, 0).astype(np.float32).reshape(-1, micro),
    ended=np.array(completions.ended).reshape(-1, micro),
    # Column t is of the token that position t predicts.
    model_logps=model_logps[:, 1:].reshape(-1, micro, width - 1),
    sampling_logps=sampling_logps[:, 1:].reshape(-1, micro, width - 1),
  )
  return np.flatnonzero(usable), batch
