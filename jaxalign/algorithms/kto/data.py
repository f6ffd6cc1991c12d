"""Completions labelled as good or bad, as the batches of KTO."""

import dataclasses
import logging
import typing
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.core.types import AnyArray, TextBatch
from jaxalign.data import batches, formats
from jaxalign.data.encode import Encoded, EncodedRows, encode_rows
from jaxalign.data.packing import blank, pack, row_width
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.setup.dataset import account, fits, source_of
from jaxalign.training.reference_cache import ReferenceCache

ADVISED = (1.0, 4 / 3)  # Ethayarajh 2024: desirable over undesirable, weighted

_log = logging.getLogger(__name__)


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledBatch:
  """Labelled completions, and the batch's prompts with other completions."""

  text: TextBatch  # [M, B, T]; a row in which nothing counts is filler
  desirable: Bool[AnyArray, "*M B"]  # True = desirable
  group: Int[AnyArray, "*M B"]  # completions of one prompt carry one number
  mismatched: TextBatch | None  # [M, B, T]; None where the loss has no z₀


class Labelled(typing.NamedTuple):
  """A completion of a prompt, and whether it is a good one."""

  prompt: str
  completion: str
  desirable: bool
  group: int  # the prompt's number
  text: Encoded  # both, encoded


@dataclasses.dataclass(frozen=True)
class LabelledData:
  """The labelled completions of a run.

  Attributes:
    config: of the run, with its final number of steps.
    rows: to train on.
    validation_rows: never trained on, the shorter ones first.
    tokenizer: the policy's; mismatched pairs are encoded as they are drawn.
    length: tokens of a text at most.
    reference: precomputed log-probs; None = the run keeps a live reference.
  """

  config: KTOConfig
  rows: list[Labelled]
  validation_rows: list[Labelled]
  tokenizer: Tokenizer
  length: int
  reference: ReferenceCache | None = None
  # `data/...` of the first step: rows that are used and left out.
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

  def batch(self, step: int) -> LabelledBatch:
    """Numpy rows `[M, B, T]` of a step, a pure function of seed and step."""
    config, count = self.config, len(self.rows)
    drawn = batches.rows_of_step(config.seed, step, config.batch_size, count)
    rows = [self.rows[row] for row in drawn]
    return self._pack(rows, self._mismatch(rows))

  def validation(self) -> list[LabelledBatch]:
    """The held-out rows `[1, B, T]`."""
    rows, size = self.validation_rows, self.config.micro_rows
    # Over all held-out rows, because their z₀ is that of all of them.
    others = self._mismatch(rows)
    return [
      self._pack(rows[at : at + size], others[at : at + size])
      for at in range(0, len(rows), size)
    ]

  def all_batches(self) -> Iterator[LabelledBatch]:
    """Every text that a step or a validation may hold."""
    # Sorted by length, so that a batch holds little padding.
    rows, size = sorted(self.rows, key=_length), self.config.micro_rows
    for at in range(0, len(rows), size):
      yield self._pack(rows[at : at + size], [])
    # Mismatched pairs are the steps' own: they are drawn with the rows.
    if self.config.loss == "kto":
      yield from map(self.batch, range(self.config.steps))
    yield from self.validation()

  def _mismatch(self, rows: Sequence[Labelled]) -> list[Encoded]:
    """Each row's prompt with another row's completion; [] without z₀."""
    if self.config.loss != "kto" or not rows:
      return []
    mates = batches.mismatch(np.array([row.group for row in rows]))
    found = _encode(
      self.config,
      self.tokenizer,
      self.length,
      [row.prompt for row in rows],
      [rows[mate].completion for mate in mates],
    )
    # The room for a completion depends on the prompt alone, which has it.
    assert not found.skipped
    return list(found.rows)

  def _pack(
    self, rows: Sequence[Labelled], others: Sequence[Encoded]
  ) -> LabelledBatch:
    """`[M, B, T]`, filled up with empty rows to whole micro-batches.

    Both kinds of text have one width: every pair of widths would compile a
    program of its own.
    """
    # Filler is an empty row of the group -1, which no prompt has.
    micro = self.config.micro_rows
    fill = -len(rows) % micro
    micros = (len(rows) + fill) // micro
    texts = [[row.text] for row in rows] + [[]] * fill
    crossed = [[text] for text in others] + [[]] * fill
    buckets = self.config.length_buckets
    width = row_width([*texts, *crossed], self.length, buckets)
    desirable = [row.desirable for row in rows] + [False] * fill
    group = [row.group for row in rows] + [-1] * fill
    pad_id = self.tokenizer.pad_id
    batch = LabelledBatch(
      text=pack(texts, width, pad_id, micros),
      desirable=np.array(desirable, bool).reshape(micros, micro),
      group=np.array(group, np.int32).reshape(micros, micro),
      mismatched=pack(crossed, width, pad_id, micros) if others else None,
    )
    return self.reference.attach(batch) if self.reference else batch


def load_data(
  config: KTOConfig, tokenizer: Tokenizer, context: int
) -> LabelledData:
  """Rows of at most `context` tokens, encoded; settles the run's steps.

  Raises:
    UserError: a bad source, or no row is left.
  """
  length = min(config.max_length, context)
  rows, counts = _load_rows(config, tokenizer, length)
  if advice := advise_weights(config, rows):
    _log.warning("%s", advice)
  # The first rows of the source, then sorted: batches hold little padding.
  held = []
  if config.validation_data:
    held, _ = _load_rows(config, tokenizer, length, validation=True)
    held = sorted(held[: config.validation_rows or None], key=_length)
  # Only the rows that are left say how many steps an epoch has.
  config = dataclasses.replace(config, steps=config.steps_over(len(rows)))
  return LabelledData(config, rows, held, tokenizer, length, counts=counts)


def _length(row: Labelled) -> int:
  return len(row.text)


def _load_rows(
  config: KTOConfig,
  tokenizer: Tokenizer,
  length: int,
  validation: bool = False,
) -> tuple[list[Labelled], dict[str, int]]:
  """Encoded rows, without those that leave no room, and counts."""
  source, options = source_of(
    config, tokenizer, validation, "comparisons.jsonl"
  )
  found = formats.load_completions(source, need="label", **options)
  # Left out: texts of too many characters, prompts that leave no room.
  kept = [row for row in found.rows if fits(config, row.prompt, row.completion)]
  encoded = _encode(
    config,
    tokenizer,
    length,
    [row.prompt for row in kept],
    [row.completion for row in kept],
  )
  left = len(encoded.rows)
  cut = sum(not row.complete for row in encoded.rows)
  counts = account(
    config, source, found, left, length, short=len(kept), encoded=left, cut=cut
  )
  # Prompts are numbered in the order in which they first appear.
  numbers: dict[str, int] = {}
  rows = [
    Labelled(
      kept[i].prompt,
      kept[i].completion,
      bool(kept[i].label),
      numbers.setdefault(kept[i].prompt, len(numbers)),
      text,
    )
    for i, text in zip(encoded.kept, encoded.rows, strict=True)
  ]
  return rows, counts


def _encode(
  config: KTOConfig,
  tokenizer: Tokenizer,
  length: int,
  prompts: Sequence[str],
  completions: Sequence[str],
) -> EncodedRows:
  return encode_rows(
    tokenizer,
    prompts,
    completions,
    max_length=length,
    train_eos=config.train_eos,
    overlong="skip",
  )


def blank_batch(
  shape: tuple[int, int, int], *, mismatched: bool
) -> LabelledBatch:
  """A batch `[M, B, T]` in which nothing counts, for its shape.

  Args:
    shape: M, B, T.
    mismatched: with mismatched pairs.
  """
  text, rows = blank(shape), shape[:2]
  return LabelledBatch(
    text,
    desirable=np.zeros(rows, bool),
    group=np.zeros(rows, np.int32),
    mismatched=text if mismatched else None,
  )


def advise_weights(config: KTOConfig, rows: Sequence[Labelled]) -> str:
  """What to change where one label outweighs the other; "" where neither."""
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
  # `unit` is the weight at which both sides weigh the same.
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
