"""Lays texts into rows of tokens: one per row, or several as segments."""

import bisect
from collections.abc import Sequence

import numpy as np

from jaxalign.core.types import TextBatch
from jaxalign.data.batches import bucket_length
from jaxalign.data.encode import Encoded


def plan_packing(lengths: Sequence[int], length: int) -> list[list[int]]:
  """Decides which texts share a row, by best-fit decreasing.

  Texts go from the longest to the shortest, each into the fullest row that
  still holds it. Ties go to the lower index and the older row, so the plan is
  deterministic. It uses at most 11/9 of the fewest possible rows, plus one
  (Johnson 1974).

  Args:
    lengths: tokens of each text, each in [1, length].
    length: T, tokens per row.

  Returns:
    Indices of the texts in each row.
  """
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  rows: list[list[int]] = []
  # Sorted by free tokens, so the fullest row that fits is found by bisection.
  open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
  for index in order:
    need = lengths[index]
    assert 1 <= need <= length, (need, length)
    # The first row with room for the text; -1 sorts before any row number.
    at = bisect.bisect_left(open_rows, (need, -1))
    if at == len(open_rows):
      free, row = length, len(rows)
      rows.append([])
    else:
      free, row = open_rows.pop(at)
    rows[row].append(index)
    # A full row is not offered again.
    if free > need:
      bisect.insort(open_rows, (free - need, row))
  return rows


def pack(
  rows: Sequence[Sequence[Encoded]],
  width: int,
  pad_id: int,
  micro_batches: int = 1,
) -> TextBatch:
  """Lays encoded texts into rows of `width` tokens.

  Args:
    rows: the texts of each row, together at most `width` long; in an empty row
      nothing counts.
    width: T.
    pad_id: fills the rest.
    micro_batches: M, divides the number of rows.

  Returns:
    Numpy rows `[M, B, T]`; the texts of a row are segments 1, 2, ...
  """
  shape = (len(rows), width)
  tokens = np.full(shape, pad_id, dtype=np.int32)
  position_ids = np.zeros(shape, dtype=np.int32)
  segment_ids = np.zeros(shape, dtype=np.int32)
  loss_mask = np.zeros(shape, dtype=bool)
  for b, texts in enumerate(rows):
    start = 0
    # Segment 0 is padding, so the texts of a row count from 1.
    for segment, text in enumerate(texts, start=1):
      here = slice(start, start + len(text))
      tokens[b, here] = text.ids
      position_ids[b, here] = np.arange(len(text))
      segment_ids[b, here] = segment
      loss_mask[b, here] = text.loss_mask
      start += len(text)
  # Rows stay in order: micro-batch m holds rows m B .. (m + 1) B - 1.
  cut = (micro_batches, -1, width)
  return TextBatch(
    tokens.reshape(cut),
    position_ids.reshape(cut),
    segment_ids.reshape(cut),
    loss_mask.reshape(cut),
  )


def blank(shape: tuple[int, int, int]) -> TextBatch:
  """Numpy rows `[M, B, T]` in which nothing counts; it has a batch's shape."""
  micro_batches, rows, width = shape
  return pack([[]] * (micro_batches * rows), width, 0, micro_batches)


def row_width(
  rows: Sequence[Sequence[Encoded]], limit: int, buckets: Sequence[int]
) -> int:
  """The length bucket of the longest row, at most `limit`."""
  longest = max(sum(map(len, texts)) for texts in rows)
  return min(limit, bucket_length(longest, buckets))
