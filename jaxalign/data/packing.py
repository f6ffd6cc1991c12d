"""Several short texts in one row, kept apart by segment numbers."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from jaxalign.data.encode import Encoded


@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of texts; a token attends only to its own segment."""

  tokens: Int32[np.ndarray, "B T"]
  positions: Int32[np.ndarray, "B T"]  # from 0 in every segment
  segments: Int32[np.ndarray, "B T"]  # 1.. a row; 0 = padding
  loss_mask: Bool[np.ndarray, "B T"]  # True = predicting this token counts


def plan_packing(lengths: Sequence[int], length: int) -> list[list[int]]:
  """Best-fit decreasing: which texts share a row.

  The longest text goes first, each into the fullest row that still holds it;
  ties go to the lower index and the older row, so the plan is deterministic.
  Uses at most 11/9 of the fewest possible rows, plus one (Johnson 1974).

  Args:
    lengths: tokens of each text, each in [1, length].
    length: T, tokens a row.

  Returns:
    Indices of the texts in each row.
  """
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  rows: list[list[int]] = []
  open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
  for index in order:
    need = lengths[index]
    assert 1 <= need <= length, (need, length)
    at = bisect.bisect_left(open_rows, (need, -1))
    if at == len(open_rows):
      free, row = length, len(rows)
      rows.append([])
    else:
      free, row = open_rows.pop(at)
    rows[row].append(index)
    if free > need:
      bisect.insort(open_rows, (free - need, row))
  return rows


def pack(
  rows: Sequence[Encoded],
  length: int,
  pad_id: int = 0,
  plan: Sequence[Sequence[int]] | None = None,
) -> Packed:
  """Lays encoded texts into rows of `length` tokens.

  Args:
    rows: texts, each at most `length` long.
    length: T.
    pad_id: fills the rest.
    plan: which texts share a row; best-fit decreasing by default. One text a
      row (`[[0], [1], …]`) gives plain right padding.
  """
  if plan is None:
    plan = plan_packing([len(row) for row in rows], length)
  shape = (len(plan), length)
  tokens = np.full(shape, pad_id, dtype=np.int32)
  positions = np.zeros(shape, dtype=np.int32)
  segments = np.zeros(shape, dtype=np.int32)
  loss_mask = np.zeros(shape, dtype=bool)
  for b, members in enumerate(plan):
    start = 0
    for segment, index in enumerate(members, start=1):
      row = rows[index]
      here = slice(start, start + len(row))
      tokens[b, here] = row.ids
      positions[b, here] = np.arange(len(row))
      segments[b, here] = segment
      loss_mask[b, here] = row.loss_mask
      start += len(row)
  return Packed(tokens, positions, segments, loss_mask)


def pad(rows: Sequence[Encoded], length: int, pad_id: int = 0) -> Packed:
  """One text a row, padded on the right."""
  return pack(rows, length, pad_id, [[index] for index in range(len(rows))])
