"""Kept answers as the batches of SuperHF's updates."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxalign.build import models
from jaxalign.build.session import put_rows
from jaxalign.build.supervised import text_batch
from jaxalign.config import SuperHFConfig
from jaxalign.core.types import Answers, KeptBatch, Samples
from jaxalign.data import batches, encode
from jaxalign.data.encode import Encoded
from jaxalign.parallel import mesh as meshes


def update_shape(config: SuperHFConfig, mesh: Mesh) -> tuple[int, int]:
  """Rows of an update and of a micro-batch, the same in every superbatch.

  Both are filled up to a multiple of the parts that the mesh splits rows
  into; filler rows count in nothing.
  """
  kept = config.superbatch.kept_rows or config.finetune_batch
  size = min(config.finetune_batch, kept)
  parts = meshes.row_count(mesh)
  up = lambda count, unit: -(-count // unit) * unit
  micro = up(min(config.micro_batch or size, size), parts)
  return up(size, micro), micro


def encode_kept(
  config: SuperHFConfig,
  policy: models.Loaded,
  mesh: Mesh,
  answers: Answers,
  kept: np.ndarray,
) -> list[KeptBatch]:
  """The kept texts in updates of one size, micro-batches first."""
  size, micro = update_shape(config, mesh)
  tokenizer = policy.tokenizer
  # A text that is cut and encoded again may gain a token.
  limit = min(config.max_length, policy.model.config.max_positions)
  rows = encode.encode_answers(
    tokenizer, answers, kept, limit, config.train_eos
  )
  return [
    put_rows(
      mesh,
      _kept_batch(
        rows[i : i + size],
        kept[i : i + size],
        answers.samples,
        size,
        micro,
        limit,
      ),
      1,
    )
    for i in range(0, len(rows), size)
  ]


def _kept_batch(
  rows: list[Encoded],
  kept: np.ndarray,
  samples: Samples,
  size: int,
  micro: int,
  limit: int,
) -> KeptBatch:
  width = min(limit, batches.bucket_length(max(len(row) for row in rows)))
  filled = [[row] for row in rows] + [[]] * (size - len(rows))
  text = text_batch(filled, width, 0, size // micro)
  logps = np.zeros((size, width), np.float32)
  known = np.zeros((size, width), bool)
  for b, (row, i) in enumerate(zip(rows, kept, strict=True)):
    drawn = samples.tokens[i][: samples.lengths[i]]
    same = _common(row.ids[row.prompt_length :], drawn)
    span = slice(row.prompt_length, row.prompt_length + same)
    logps[b, span] = samples.model_logps[i][:same]
    known[b, span] = True
  whole: Callable = lambda x: x.reshape(-1, micro, width)
  return KeptBatch(text, whole(logps), whole(known))


def _common(a: Sequence[int], b: np.ndarray) -> int:
  """Length of the common start of two id lists."""
  size = min(len(a), len(b))
  differ = np.flatnonzero(np.array(a[:size]) != b[:size])
  return int(differ[0]) if len(differ) else size
