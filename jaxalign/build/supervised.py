"""Data of the runs that learn from a data set, and SFT's own."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.build import models
from jaxalign.config import SFTConfig, SupervisedConfig
from jaxalign.core.types import TextBatch
from jaxalign.data import batches, encode, formats, packing
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.runtime.context import Task


def sft_task(
  config: SFTConfig, tokenizer: Tokenizer, context: int
) -> tuple[Task, int]:
  """The rows of an SFT run, and how many steps it has.

  Args:
    config: its data, packing and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.
  """
  length = min(config.max_length, context)
  rows = _encode(config, tokenizer, length)
  if config.packing:
    plan = packing.plan_packing([len(row) for row in rows], length)
  else:
    plan = [[i] for i in range(len(rows))]
  size = config.batch_size
  micro = config.micro_batch or size
  steps = config.steps or math.ceil(config.epochs * len(plan) / size)

  def batch(step: int) -> TextBatch:
    chosen = batches.rows_of_step(config.seed, step, size, len(plan))
    members = [[rows[i] for i in plan[row]] for row in chosen]
    width = length if config.packing else width_of(members, length)
    return text_batch(members, width, tokenizer.pad_id, size // micro)

  held = ()
  if config.validation_data:
    found = _encode(config, tokenizer, length, validation=True)
    found = sorted(found[: config.validation_rows or None], key=len)
    # The last part is filled up with empty rows, so that a mesh can split it.
    held = tuple(
      text_batch(
        [[row] for row in part] + [[]] * (micro - len(part)),
        width_of([[row] for row in part], length),
        tokenizer.pad_id,
        1,
      )
      for part in parts(found, micro)
    )
  return Task(batch, held), steps


def reading(
  config: SupervisedConfig,
  tokenizer: Tokenizer,
  validation: bool,
  lab: str,
) -> tuple[str, dict[str, Any]]:
  """A run's source of rows, and how `formats` is to read it.

  `lab`, alone or among others, stands for the lab's file of that name.
  """
  source = config.validation_data if validation else config.data
  names = [name.strip() for name in source.split(",")]
  return ",".join(models.locate(name, lab) for name in names), {
    "tokenizer": tokenizer,
    "split": "test" if validation else "train",
    "max_bad_share": config.max_bad_share,
  }


def fits(config: SupervisedConfig, prompt: str, *answers: str) -> bool:
  """Whether a prompt is within `max_example_chars` with each answer."""
  limit = config.max_example_chars or math.inf
  return len(prompt) + max(map(len, answers)) <= limit


def _encode(
  config: SFTConfig, tokenizer, length: int, validation: bool = False
) -> list:
  """Encoded rows; those without room for an answer are left out."""
  source, options = reading(
    config, tokenizer, validation, "demonstrations.jsonl"
  )
  found = formats.load_completions(source, **options)
  print(f"{source}: {found}")
  kept = [row for row in found.rows if fits(config, row.prompt, row.completion)]
  encoded = encode.encode_rows(
    tokenizer,
    [row.prompt for row in kept],
    [row.completion for row in kept],
    max_length=length,
    loss=config.loss_on,
    train_eos=config.train_eos,
    overlong="skip",
  )
  if not encoded.rows:
    raise UserError(
      f"{source}: no row is left of {len(found.rows)}: {len(kept)} are within "
      f"config.max_example_chars={config.max_example_chars}, none of these has "
      f"a prompt below {length} tokens; raise it or config.max_length"
    )
  return list(encoded.rows)


def text_batch(
  members: list[list], width: int, pad_id: int, micros: int
) -> TextBatch:
  """Rows `[M, B, T]`; the encoded texts of a member share one row."""
  rows = [row for group in members for row in group]
  ends = np.cumsum([len(group) for group in members]).tolist()
  plan = [
    list(range(end - len(group), end))
    for group, end in zip(members, ends, strict=True)
  ]
  packed = packing.pack(rows, width, pad_id, plan)
  cut = lambda x: x.reshape(micros, -1, width)
  return TextBatch(
    tokens=cut(packed.tokens),
    positions=cut(packed.positions),
    segments=cut(packed.segments),
    loss_mask=cut(packed.loss_mask),
  )


def width_of(members: Sequence[Sequence], limit: int) -> int:
  """The bucket of the longest row, at most `limit`."""
  longest = max(sum(map(len, group)) for group in members)
  return min(limit, batches.bucket_length(longest))


def parts(rows: Sequence, size: int) -> list:
  """Rows cut into parts of `size`, the last one what is left."""
  return [rows[i : i + size] for i in range(0, len(rows), size)]
