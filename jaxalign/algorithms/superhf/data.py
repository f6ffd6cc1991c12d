"""Kept completions as the batches of SuperHF's updates."""

import dataclasses
import typing

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.core.types import AnyArray, TextBatch
from jaxalign.data.encode import encode_completions
from jaxalign.data.packing import blank, pack, row_width
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.parallel import mesh as meshes
from jaxalign.training.rollout import Rollout


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptBatch:
  """Kept texts of one update, and the log-probs they were drawn with."""

  text: TextBatch  # [M, B, T]
  sampled_logps: Float[AnyArray, "*M B T-1"]  # the sampler's model log-probs
  sampled: Bool[AnyArray, "*M B T-1"]  # True = that log-prob is known


def update_shape(config: SuperHFConfig, mesh: Mesh) -> tuple[int, int]:
  """Rows of an update and of a micro-batch, the same in every superbatch.

  Both are rounded up to a multiple of the parts that the mesh splits rows
  into; filler rows count in nothing.
  """
  # A superbatch that keeps few texts needs no update full of filler.
  size = min(
    config.batch_size, config.superbatch.kept_rows or config.batch_size
  )
  parts = meshes.row_count(mesh)
  micro = min(config.micro_rows, size)
  # -(-a // b) rounds up: a whole number of parts, then of micro-batches.
  micro = -(-micro // parts) * parts
  return -(-size // micro) * micro, micro


def blank_batch(shape: tuple[int, int, int]) -> KeptBatch:
  """A batch `[M, B, T]` in which nothing counts, for its shape."""
  text = blank(shape)
  targets = text.targets.shape
  return KeptBatch(text, np.zeros(targets, np.float32), np.zeros(targets, bool))


def kept_batches(
  config: SuperHFConfig,
  mesh: Mesh,
  tokenizer: Tokenizer,
  context: int,
  rollout: Rollout,
  kept: Int[np.ndarray, " K"],
) -> list[KeptBatch]:
  """The completions `kept`, flat indices, in updates of one size.

  A text has at most `context` tokens, which is what the policy can read.
  """
  size, micro = update_shape(config, mesh)
  # A text that is cut and encoded again may gain a token.
  limit = min(config.max_length, context)
  texts = encode_completions(
    tokenizer, rollout.completions, kept, limit, config.train_eos
  )
  samples, batches = rollout.completions.samples, []
  # One batch an update; empty rows fill the last one.
  for start in range(0, len(texts), size):
    part, indices = texts[start : start + size], kept[start : start + size]
    rows = [[text] for text in part] + [[]] * (size - len(part))
    width = row_width(rows, limit, config.length_buckets)
    # What the sampler said of the tokens that are the same as it drew.
    logps = np.zeros((size, width), np.float32)
    known = np.zeros((size, width), bool)
    for row, (text, i) in enumerate(zip(part, indices, strict=True)):
      drawn = samples.tokens[i][: samples.lengths[i]]
      # Past the first token that differs, the contexts differ as well.
      ids = text.ids[text.prompt_length :][: len(drawn)]
      differ = np.flatnonzero(np.array(ids) != drawn[: len(ids)])
      same = int(differ[0]) if len(differ) else len(ids)
      span = slice(text.prompt_length, text.prompt_length + same)
      logps[row, span] = samples.model_logps[i][:same]
      known[row, span] = True
    batches.append(
      KeptBatch(
        pack(rows, width, 0, size // micro),
        # Column t is of token t + 1, as in the text's targets.
        logps[:, 1:].reshape(-1, micro, width - 1),
        known[:, 1:].reshape(-1, micro, width - 1),
      )
    )
  return batches
