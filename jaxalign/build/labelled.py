"""Data of the runs that learn from answers labelled as good or bad."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxalign.algorithms.kto import LabelledBatch
from jaxalign.build.supervised import fits, parts, reading, text_batch, width_of
from jaxalign.config import KTOConfig
from jaxalign.core.types import TextBatch
from jaxalign.data import batches, encode, formats
from jaxalign.data.encode import Encoded
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.runtime.context import Task

ADVISED = (1.0, 4 / 3)  # Ethayarajh 2024: desirable over undesirable, weighted

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """An answer to a prompt, and whether it is a good one."""

  prompt: str
  completion: str
  desirable: bool
  group: int  # the prompt's number
  text: Encoded  # both, encoded


def labelled_task(
  config: KTOConfig, tokenizer: Tokenizer, context: int
) -> tuple[Task, int]:
  """The labelled answers of a run, and how many steps it has.

  Args:
    config: its data and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.
  """
  length = min(config.max_length, context)
  rows = _rows(config, tokenizer, length)
  if advice := _unbalanced(config, rows):
    _log.warning("%s", advice)
  size = config.batch_size
  micro = config.micro_batch or size
  steps = config.steps or math.ceil(config.epochs * len(rows) / size)

  def batch(step: int) -> LabelledBatch:
    drawn = batches.rows_of_step(config.seed, step, size, len(rows))
    found = [rows[row] for row in drawn]
    others = _mismatched(config, tokenizer, length, found)
    return _batch(found, others, micro, length, tokenizer.pad_id)

  held = ()
  if config.validation_data:
    found = _rows(config, tokenizer, length, validation=True)
    found = found[: config.validation_rows or None]
    found.sort(key=lambda row: len(row.text))
    others = _mismatched(config, tokenizer, length, found)
    held = tuple(
      _batch(
        found[i : i + micro],
        others[i : i + micro],
        micro,
        length,
        tokenizer.pad_id,
      )
      for i in range(0, len(found), micro)
    )

  def texts() -> Iterator[TextBatch]:
    by_length = sorted(rows, key=lambda row: len(row.text))
    for part in parts(by_length, micro):
      yield _batch(part, [], micro, length, tokenizer.pad_id).text
    # Mismatched pairs are the steps' own: who meets whom is drawn with them.
    for step in range(steps if config.loss == "kto" else 0):
      pairs = batch(step).mismatched
      assert pairs is not None
      yield pairs

  return Task(batch, held, texts), steps


def _rows(
  config: KTOConfig, tokenizer, length: int, validation: bool = False
) -> list[Labelled]:
  """Encoded answers; those without room behind their prompt are left out."""
  source, options = reading(config, tokenizer, validation, "comparisons.jsonl")
  found = formats.load_completions(source, need="label", **options)
  print(f"{source}: {found}")
  kept = [row for row in found.rows if fits(config, row.prompt, row.completion)]
  encoded = _encode(
    config,
    tokenizer,
    length,
    [row.prompt for row in kept],
    [row.completion for row in kept],
  )
  if not encoded.rows:
    raise UserError(
      f"{source}: no row is left of {len(found.rows)}: {len(kept)} are within "
      f"config.max_example_chars={config.max_example_chars}, none of these has "
      f"a prompt below {length} tokens; raise it or config.max_length"
    )
  numbers: dict[str, int] = {}
  return [
    Labelled(
      row.prompt,
      row.completion,
      bool(row.label),
      numbers.setdefault(row.prompt, len(numbers)),
      text,
    )
    for row, text in zip(
      (kept[i] for i in encoded.kept), encoded.rows, strict=True
    )
  ]


def _encode(
  config: KTOConfig,
  tokenizer,
  length: int,
  prompts: Sequence[str],
  completions: Sequence[str],
) -> encode.EncodedRows:
  return encode.encode_rows(
    tokenizer,
    prompts,
    completions,
    max_length=length,
    train_eos=config.train_eos,
    overlong="skip",
  )


def _mismatched(
  config: KTOConfig, tokenizer, length: int, rows: Sequence[Labelled]
) -> list[Encoded]:
  """Each row's prompt with another row's answer; empty where not asked for."""
  if config.loss != "kto":
    return []
  mates = batches.mismatch(np.array([row.group for row in rows]))
  found = _encode(
    config,
    tokenizer,
    length,
    [row.prompt for row in rows],
    [rows[mate].completion for mate in mates],
  )
  # Room for an answer depends on the prompt alone, which has it.
  assert not found.skipped
  return list(found.rows)


def _unbalanced(config: KTOConfig, rows: Sequence[Labelled]) -> str:
  """What to say where one label outweighs the other; empty where neither."""
  good = sum(row.desirable for row in rows)
  bad = len(rows) - good
  if not good or not bad:
    return (
      f"config.data: all {len(rows)} rows are "
      f"{'undesirable' if bad else 'desirable'}, so only this side is learned; "
      "add rows of the other label"
    )
  low, high = ADVISED
  share = config.desirable_weight * good / (config.undesirable_weight * bad)
  if low <= share <= high:
    return ""
  # The heavier weight is brought down to the lighter side's.
  if share > high:
    name, unit = "desirable_weight", config.undesirable_weight * bad / good
    between = unit * low, unit * high
  else:
    name, unit = "undesirable_weight", config.desirable_weight * good / bad
    between = unit / high, unit / low
  return (
    f"config.desirable_weight={config.desirable_weight:g} x {good} desirable "
    f"rows over config.undesirable_weight={config.undesirable_weight:g} x "
    f"{bad} undesirable rows is {share:.3g}, advised are 1 to 4/3; set "
    f"config.{name} to {between[0]:.3g} to {between[1]:.3g}"
  )


def _batch(
  rows: Sequence[Labelled],
  others: Sequence[Encoded],
  micro: int,
  length: int,
  pad_id: int,
) -> LabelledBatch:
  """`[M, B, T]`, filled up with empty rows to whole micro-batches.

  Both kinds of text have one width: a program for every pair of widths would
  be compiled otherwise.
  """
  fill = -len(rows) % micro
  micros = (len(rows) + fill) // micro
  texts = [[row.text] for row in rows]
  crossed = [[text] for text in others]
  width = width_of([*texts, *crossed], length)
  arrays = lambda members: text_batch(
    [*members, *[[]] * fill], width, pad_id, micros
  )
  column: Callable = lambda values, empty, kind: np.array(
    [*values, *[empty] * fill], kind
  ).reshape(micros, micro)
  return LabelledBatch(
    text=arrays(texts),
    desirable=column([row.desirable for row in rows], False, bool),
    group=column([row.group for row in rows], -1, np.int32),
    mismatched=arrays(crossed) if others else None,
  )
