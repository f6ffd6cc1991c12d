"""Sorts texts of mixed length into a few fixed shapes.

A text is padded to the next of a few lengths, and texts of one length are
scored in calls of a fixed number of rows. Little is computed for padding, and
the number of compiled programs is small and known.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxalign.data.batches import pad_rows

# Close enough that on average a tenth of a row is padding.
LENGTHS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
TAIL = 4  # the last texts of a length go in calls of a quarter of the rows

EncodedText = tuple[Sequence[int], Sequence[int]]  # ids and segment types


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows for one call of the model."""

  indices: Int[np.ndarray, " N"]  # of the rows' texts; N <= B, rest is filler
  tokens: Int[np.ndarray, "B T"]  # right-padded with 0
  types: Int[np.ndarray, "B T"]  # segment of each token
  mask: Bool[np.ndarray, "B T"]  # True = a real token


def batches(
  texts: Sequence[EncodedText],
  lengths: Sequence[int] = LENGTHS,
  tokens: int = 4096,
  rows: int = 64,
  parts: int = 1,
) -> list[Batch]:
  """Sorts texts into calls; texts without a token are left out.

  Args:
    texts: ids and types of each, none longer than the last of `lengths`.
    lengths: padded lengths, increasing.
    tokens: padded tokens per call and part, at most; a row is always read.
    rows: rows per call and part, at most.
    parts: devices that split the rows of a call between them (a mesh's row
      axes).
  """
  # Grouping by padded length.
  found = {length: [] for length in lengths}
  for index, (ids, _) in enumerate(texts):
    if len(ids):
      found[min(n for n in lengths if n >= len(ids))].append(index)

  # Cutting each group into calls.
  calls = []
  for length, members in found.items():
    # However many devices there are, each has as much as one alone would:
    # where parameters are split, every call gathers them.
    each = row_count(length, tokens, rows)
    full, tail = parts * each, parts * max(each // TAIL, 1)
    # A few texts would be lost among the filler of many devices.
    if parts > 1 and len(members) <= 2 * parts:
      tail = parts
    while members:
      # Small calls, unless they would add up to the rows of a full one.
      size = full if -(-len(members) // tail) * tail >= full else tail
      calls.append(_pad(texts, members[:size], size, length))
      members = members[size:]
  return calls


def row_count(length: int, tokens: int, rows: int) -> int:
  """Rows of a part of a full call: a power of two, at least 1."""
  most = max(min(tokens // length, rows), 1)
  return 1 << (most.bit_length() - 1)


def _pad(
  texts: Sequence[EncodedText], members: Sequence[int], rows: int, length: int
) -> Batch:
  filler = [()] * (rows - len(members))
  tokens, mask = pad_rows([texts[i][0] for i in members] + filler, length)
  types, _ = pad_rows([texts[i][1] for i in members] + filler, length)
  # Filler has one token: some heads take the mean over a row's tokens.
  mask[len(members) :, 0] = True
  return Batch(np.array(members), tokens, types, mask)
