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
from jaxalign.data.packing import pack, share_rows
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.parallel import mesh as meshes
from jaxalign.training.rollout import Rollout


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptBatch:
  """Kept texts of one update, and the log-probs they were drawn with."""

  text: TextBatch  # [M, B, T]; a row may hold several texts
  text_means: Float[AnyArray, "*M B T-1"]  # 1 / counted tokens of its text
  sampled_logps: Float[AnyArray, "*M B T-1"]  # the sampler's model log-probs
  sampled: Bool[AnyArray, "*M B T-1"]  # True = that log-prob is known


def update_shape(config: SuperHFConfig, mesh: Mesh) -> tuple[int, int]:
  """Texts of an update and of a micro-batch at most.

  The same in every superbatch, and a multiple of the parts that the mesh splits
  rows into. They have as many rows, or half as many.
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
  for start in range(0, len(texts), size):
    part, numbers = texts[start : start + size], kept[start : start + size]
    lengths = [len(text) for text in part]
    groups = [lengths[i : i + micro] for i in range(0, size, micro)]
    shared, width = share_rows(groups, micro, meshes.row_count(mesh), limit)
    # The texts of each row, by their places in `part`.
    places = [
      [m * micro + i for i in row]
      for m, plan in enumerate(shared)
      for row in plan
    ]
    rows = [[part[i] for i in row] for row in places]
    # What the sampler said of the tokens that are the same as it drew.
    logps = np.zeros((len(rows), width), np.float32)
    means, known = np.zeros_like(logps), np.zeros(logps.shape, bool)
    for b, row in enumerate(places):
      first = 0
      for i in row:
        text, number = part[i], numbers[i]
        drawn = samples.tokens[number][: samples.lengths[number]]
        # Past the first token that differs, the contexts differ as well.
        ids = text.ids[text.prompt_length :][: len(drawn)]
        differ = np.flatnonzero(np.array(ids) != drawn[: len(ids)])
        same = int(differ[0]) if len(differ) else len(ids)
        at = first + text.prompt_length
        logps[b, at : at + same] = samples.model_logps[number][:same]
        known[b, at : at + same] = True
        means[b, first : first + len(text)] = 1 / max(sum(text.loss_mask), 1)
        first += len(text)
    # Column t is of token t + 1, as in the text's targets.
    cut = (len(groups), -1, width - 1)
    batches.append(
      KeptBatch(
        pack(rows, width, 0, len(groups)),
        means[:, 1:].reshape(cut),
        logps[:, 1:].reshape(cut),
        known[:, 1:].reshape(cut),
      )
    )
  return batches
