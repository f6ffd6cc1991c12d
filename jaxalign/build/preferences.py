"""Data of the runs that learn from comparisons without a reward model."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

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
  config: DPOConfig, tokenizer: Tokenizer, context: int, hidden_size: int
) -> tuple[Task, int]:
  """The comparisons of a run, and how many steps it has.

  Args:
    config: its data and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.
    hidden_size: of the model.
  """
  length = min(config.max_length, context)
  pairs = _pairs(config, tokenizer, length)
  size = config.batch_size
  micro = config.micro_batch or size
  steps = config.steps or math.ceil(config.epochs * len(pairs) / size)
  lay_out = functools.partial(
    pair_batch, length=length, pad_id=tokenizer.pad_id, hidden_size=hidden_size
  )

  def batch(step: int) -> TextBatch:
    rows = batches.rows_of_step(config.seed, step, size, len(pairs))
    return lay_out([pairs[row] for row in rows], micro)

  held = ()
  if config.validation_data:
    found = _pairs(config, tokenizer, length, validation=True)
    found = found[: config.validation_rows or None]
    found.sort(key=lambda pair: max(map(len, pair)))
    held = tuple(lay_out(part, micro) for part in parts(found, micro))

  def texts() -> Iterator[TextBatch]:
    by_length = sorted(pairs, key=lambda pair: max(map(len, pair)))
    for part in parts(by_length, micro):
      yield lay_out(part, micro)

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
  hidden_size: int,
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
    hidden_size: of the model.
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
  pad_id = tokenizer.pad_id
  return put_rows(
    mesh, pair_batch(pairs, micro, length, pad_id, hidden_size), 1
  )


def pair_batch(
  pairs: list[Pair], micro: int, length: int, pad_id: int, hidden_size: int
) -> TextBatch:
  """Pairs as `[M, B, T]` with a shared prompt or as `[M, 2B, T]`.

  Whichever is less to compute: a prompt is read once where it is shared, but
  the rows are longer, and attention grows with the square of the length.

  Args:
    pairs: chosen and rejected texts of one prompt each.
    micro: pairs a micro-batch; the last one is filled up with empty rows, so
      that a mesh can split it.
    length: tokens of a text at most.
    pad_id: fills the rest.
    hidden_size: of the model.
  """
  pairs = pairs + [(FILLER, FILLER)] * (-len(pairs) % micro)
  apart = [
    [pair[side]]
    for part in parts(pairs, micro)
    for side in (0, 1)
    for pair in part
  ]
  shared = [_shared(*pair) for pair in pairs]
  narrow, wide = width_of(apart, length), width_of(shared, 2 * length)
  # A layer's products with its matrices and those of its attention, relatively.
  cost = lambda rows, width: len(rows) * width * (6 * hidden_size + width)
  micros = len(pairs) // micro
  if cost(apart, narrow) <= cost(shared, wide):
    return text_batch(apart, narrow, pad_id, micros)
  text = text_batch(shared, wide, pad_id, micros)
  starts = np.array([len(prompt) for prompt, *_ in shared])
  segments: Any = text.segments
  starts = np.where(segments > 1, starts.reshape(micros, -1, 1), 0)
  return dataclasses.replace(
    text,
    positions=text.positions + starts,
    parents=np.minimum(segments, 1),
  )


def _shared(chosen: Encoded, rejected: Encoded) -> list[Encoded]:
  """The prompt without its last id, and both answers with it in front."""
  cut = max(chosen.prompt_length - 1, 0)
  part = lambda row, here: dataclasses.replace(
    row, ids=row.ids[here], loss_mask=row.loss_mask[here]
  )
  assert chosen.ids[:cut] == rejected.ids[:cut]
  ends = slice(cut, None)
  return [part(chosen, slice(cut)), part(chosen, ends), part(rejected, ends)]
