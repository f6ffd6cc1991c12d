"""Comparisons as the batches of DPO."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.core.types import PairBatch
from jaxalign.data import batches, formats
from jaxalign.data.encode import FILLER, Encoded, encode_rows
from jaxalign.data.packing import blank, pack, row_width
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.setup.dataset import account, fits, source_of
from jaxalign.training.reference_cache import ReferenceCache

Pair = tuple[Encoded, Encoded]  # chosen, rejected


@dataclasses.dataclass(frozen=True)
class PairData:
  """The comparisons of a run.

  Attributes:
    config: of the run, with its final number of steps.
    pairs: to train on.
    validation_pairs: never trained on, the shorter ones first.
    length: tokens of a text at most.
    pad_id: fills rows.
    hidden_size: of the model.
    reference: precomputed log-probs; None = the run keeps a live reference.
  """

  config: DPOConfig
  pairs: list[Pair]
  validation_pairs: list[Pair]
  length: int
  pad_id: int
  hidden_size: int
  reference: ReferenceCache | None = None
  # `data/...` of the first step: rows that are used and left out.
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

  def batch(self, step: int) -> PairBatch:
    """Numpy rows `[M, B, T]` of a step, a pure function of seed and step."""
    config, count = self.config, len(self.pairs)
    rows = batches.rows_of_step(config.seed, step, config.batch_size, count)
    return self._pack([self.pairs[row] for row in rows])

  def validation(self) -> list[PairBatch]:
    """The held-out pairs `[1, B, T]`."""
    return list(self._in_micro_batches(self.validation_pairs))

  def all_batches(self) -> Iterator[PairBatch]:
    """Every text that a step or a validation may hold."""
    yield from self._in_micro_batches(sorted(self.pairs, key=_longest))
    yield from self._in_micro_batches(self.validation_pairs)

  def _in_micro_batches(self, pairs: Sequence[Pair]) -> Iterator[PairBatch]:
    size = self.config.micro_rows
    for start in range(0, len(pairs), size):
      yield self._pack(pairs[start : start + size])

  def _pack(self, pairs: Sequence[Pair]) -> PairBatch:
    batch = pack_pairs(
      pairs,
      self.config.micro_rows,
      self.length,
      self.pad_id,
      self.hidden_size,
      self.config.length_buckets,
    )
    return self.reference.attach(batch) if self.reference else batch


def load_data(
  config: DPOConfig, tokenizer: Tokenizer, context: int, hidden_size: int
) -> PairData:
  """Pairs of texts of at most `context` tokens; settles the run's steps.

  Raises:
    UserError: a bad source, or no pair is left.
  """
  length = min(config.max_length, context)
  pairs, counts = _load_pairs(config, tokenizer, length)
  # The first rows of the source, then sorted: batches hold little padding.
  held = []
  if config.validation_data:
    held, _ = _load_pairs(config, tokenizer, length, validation=True)
    held = sorted(held[: config.validation_rows or None], key=_longest)
  config = dataclasses.replace(config, steps=config.steps_over(len(pairs)))
  return PairData(
    config,
    pairs,
    held,
    length,
    tokenizer.pad_id,
    hidden_size,
    counts=counts,
  )


def _load_pairs(
  config: DPOConfig,
  tokenizer: Tokenizer,
  length: int,
  validation: bool = False,
) -> tuple[list[Pair], dict[str, int]]:
  """Encoded pairs, without those whose prompt leaves no room, and counts."""
  source, options = source_of(
    config, tokenizer, validation, "comparisons.jsonl"
  )
  found = formats.load_preferences(source, **options)
  rows = [r for r in found.rows if fits(config, r.prompt, r.chosen, r.rejected)]
  # The room for a completion depends on the prompt alone, so both of a pair
  # stay or both go.
  sides = [
    encode_rows(
      tokenizer,
      [row.prompt for row in rows],
      completions,
      max_length=length,
      train_eos=config.train_eos,
      overlong="skip",
    ).rows
    for completions in ([r.chosen for r in rows], [r.rejected for r in rows])
  ]
  both = list(zip(*sides, strict=True))
  # Where all that differs is cut off, there is nothing to learn.
  pairs = [pair for pair in both if pair[0].ids != pair[1].ids]
  counts = account(
    config,
    source,
    found,
    len(pairs),
    length,
    short=len(rows),
    encoded=len(both),
    cut=sum(not text.complete for pair in pairs for text in pair),
  )
  return pairs, counts


def _longest(pair: Pair) -> int:
  return max(map(len, pair))


def pack_pairs(
  pairs: Sequence[Pair],
  micro_rows: int,
  length: int,
  pad_id: int,
  hidden_size: int,
  buckets: Sequence[int],
) -> PairBatch:
  """Pairs as `[M, B, T]` with a shared prompt, or as `[M, 2B, T]`.

  Whichever is less to compute: a shared prompt is read once, but the rows are
  longer, and attention grows with the square of the length.

  Args:
    pairs: chosen and rejected texts of one prompt each.
    micro_rows: pairs in a micro-batch; empty rows fill the last one, so that
      a mesh can split it.
    length: tokens of a text at most.
    pad_id: fills the rest.
    hidden_size: of the model.
    buckets: the widths of rows.
  """
  pairs = [*pairs, *[(FILLER, FILLER)] * (-len(pairs) % micro_rows)]
  micros = len(pairs) // micro_rows
  # A row a text: of each micro-batch the chosen ones, then the rejected.
  apart = [
    [pair[side]]
    for start in range(0, len(pairs), micro_rows)
    for side in (0, 1)
    for pair in pairs[start : start + micro_rows]
  ]
  # A row a pair: the prompt, then the ends of both texts.
  shared = [_share_prompt(*pair) for pair in pairs]
  narrow = row_width(apart, length, buckets)
  wide = row_width(shared, 2 * length, buckets)
  # A layer's products with its matrices and those of its attention.
  # Of a token 12 D² (inner width 4 D) and 2 T D products, here over 2 D.
  cost_apart = len(apart) * narrow * (6 * hidden_size + narrow)
  cost_shared = len(shared) * wide * (6 * hidden_size + wide)
  if cost_apart <= cost_shared:
    text = pack(apart, narrow, pad_id, micros)
    return PairBatch(
      text.tokens, text.position_ids, text.segment_ids, text.loss_mask
    )
  text = pack(shared, wide, pad_id, micros)
  segment_ids = np.asarray(text.segment_ids)
  # Both completions continue the prompt's positions.
  starts = np.array([len(prompt) for prompt, *_ in shared])
  starts = np.where(segment_ids > 1, starts.reshape(micros, -1, 1), 0)
  return PairBatch(
    text.tokens,
    text.position_ids + starts,
    segment_ids,
    text.loss_mask,
    prompt_segment_ids=np.minimum(segment_ids, 1),
  )


def blank_pairs(
  shape: tuple[int, int, int], *, shared: bool = False
) -> PairBatch:
  """A batch of pairs in which nothing counts, for its shape.

  Args:
    shape: M, N, T, where every text has a row; N texts are N / 2 pairs.
    shared: the texts of a pair share a row, `[M, N / 2, 2 T]`.
  """
  micros, texts, length = shape
  text = blank((micros, texts // 2, 2 * length) if shared else shape)
  return PairBatch(
    text.tokens,
    text.position_ids,
    text.segment_ids,
    text.loss_mask,
    prompt_segment_ids=text.segment_ids if shared else None,
  )


def _share_prompt(chosen: Encoded, rejected: Encoded) -> list[Encoded]:
  """The prompt without its last id, then that id with each completion."""
  # The prompt's last id predicts a completion's first, so each end has it.
  cut = max(chosen.prompt_length - 1, 0)
  assert chosen.ids[:cut] == rejected.ids[:cut]
  prompt = dataclasses.replace(
    chosen, ids=chosen.ids[:cut], loss_mask=chosen.loss_mask[:cut]
  )
  ends = [
    dataclasses.replace(
      text, ids=text.ids[cut:], loss_mask=text.loss_mask[cut:]
    )
    for text in (chosen, rejected)
  ]
  return [prompt, *ends]
