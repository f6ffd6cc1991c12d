"""Data of the runs that learn from comparisons without a reward model."""

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from jaxalign.build.session import put_rows
from jaxalign.build.supervised import fits, parts, reading, text_batch, width_of
from jaxalign.config import DPOConfig, OnlineDPOConfig
from jaxalign.core.types import Answers, TextBatch
from jaxalign.data import batches, encode, formats
from jaxalign.data.encode import Encoded
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.runtime.context import Task

Pair = tuple[Encoded, Encoded]  # chosen, rejected


def pair_task(
  config: DPOConfig, tokenizer: Tokenizer, context: int
) -> tuple[Task, int]:
  """The comparisons of a run, and how many steps it has.

  Args:
    config: its data and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.
  """
  length = min(config.max_length, context)
  pairs = _pairs(config, tokenizer, length)
  size = config.batch_size
  micro = config.micro_batch or size
  steps = config.steps or math.ceil(config.epochs * len(pairs) / size)

  def batch(step: int) -> TextBatch:
    rows = batches.rows_of_step(config.seed, step, size, len(pairs))
    found = [pairs[row] for row in rows]
    return _batch(found, micro, length, tokenizer.pad_id)

  held = ()
  if config.validation_data:
    found = _pairs(config, tokenizer, length, validation=True)
    found = found[: config.validation_rows or None]
    found.sort(key=lambda pair: max(map(len, pair)))
    held = tuple(
      _batch(part, micro, length, tokenizer.pad_id)
      for part in parts(found, micro)
    )

  def texts() -> Iterator[TextBatch]:
    by_length = sorted(pairs, key=lambda pair: max(map(len, pair)))
    for part in parts(by_length, micro):
      yield _batch(part, micro, length, tokenizer.pad_id)

  return Task(batch, held, texts), steps


def _pairs(
  config: DPOConfig, tokenizer, length: int, validation: bool = False
) -> list[Pair]:
  """Encoded pairs; those whose prompt leaves no room are left out."""
  source, options = reading(config, tokenizer, validation, "comparisons.jsonl")
  found = formats.load_preferences(source, **options)
  print(f"{source}: {found}")
  rows = [r for r in found.rows if fits(config, r.prompt, r.chosen, r.rejected)]
  # An answer's room depends on the prompt alone, so both stay or both go.
  chosen, rejected = (
    encode.encode_rows(
      tokenizer,
      [row.prompt for row in rows],
      answers,
      max_length=length,
      train_eos=config.train_eos,
      overlong="skip",
    ).rows
    for answers in ([r.chosen for r in rows], [r.rejected for r in rows])
  )
  pairs = list(zip(chosen, rejected, strict=True))
  if not pairs:
    raise UserError(
      f"{source}: no pair is left of {len(found.rows)}: {len(rows)} are within "
      f"config.max_example_chars={config.max_example_chars}, none of these has "
      f"a prompt below {length} tokens; raise it or config.max_length"
    )
  return pairs


FILLER = Encoded((), 0, (), True)


def encode_pairs(
  config: OnlineDPOConfig,
  tokenizer: Tokenizer,
  length: int,
  mesh: Mesh,
  answers: Answers,
  better: np.ndarray,
  worse: np.ndarray,
) -> TextBatch:
  """Pairs of the policy's own answers, filled up to `config.pairs`.

  Args:
    config: of the run.
    tokenizer: the policy's.
    length: tokens of a text at most.
    mesh: over which rows are laid.
    answers: of one step.
    better: flat indices of the preferred answers.
    worse: of the others, in the same order.
  """
  sides = [
    encode.encode_answers(tokenizer, answers, side, length, config.train_eos)
    for side in (better, worse)
  ]
  pairs = list(zip(*sides, strict=True))
  pairs += [(FILLER, FILLER)] * (config.pairs - len(pairs))
  micro = config.micro_batch or config.pairs
  return put_rows(mesh, _batch(pairs, micro, length, tokenizer.pad_id), 1)


def _batch(
  pairs: list[Pair], micro: int, length: int, pad_id: int
) -> TextBatch:
  """`[M, 2B, T]`: in each micro-batch chosen answers first, then rejected.

  Filled up with empty rows to whole micro-batches, so that a mesh can split
  the last one.
  """
  members = []
  for part in parts(pairs, micro):
    empty: list[list] = [[]] * (micro - len(part))
    for side in (0, 1):
      members += [[pair[side]] for pair in part] + empty
  width = width_of(members, length)
  return text_batch(members, width, pad_id, len(members) // (2 * micro))
