"""Deterministic order, length buckets and padding; numpy only.

Which rows a step sees is a pure function of (seed, step): a resumed run needs
no iterator state, and hosts agree without communicating.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64


@functools.lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
  """The order of `n` rows in an epoch; the same on every machine.

  Drawn from Philox bits, whose stream numpy keeps stable over versions (that
  of its shuffles it does not).

  Args:
    seed: any integer.
    epoch: >= 0.
    n: number of rows.

  Returns:
    A permutation of 0..n-1, read-only because calls share it.
  """
  # Sorting random keys: equal ones (2⁻⁶⁴ a pair) keep their order.
  # Philox takes two 64-bit words, so a negative seed wraps around.
  key = np.array([seed % 2**64, epoch], dtype=np.uint64)
  bits = np.random.Philox(key=key).random_raw(n)
  order = np.argsort(bits, kind="stable").astype(np.int64)
  order.flags.writeable = False
  return order


def rows_of_step(
  seed: int, step: int, batch: int, n: int
) -> Int64[np.ndarray, " batch"]:
  """The rows of one step; epochs follow each other without a gap.

  Args:
    seed: of the epochs' orders.
    step: >= 0; the cost does not grow with it.
    batch: rows a step, may exceed `n`.
    n: rows of the data set.

  Returns:
    Indices in [0, n).
  """
  # Places in the endless sequence of epochs, then (epoch, place in it).
  flat = step * batch + np.arange(batch, dtype=np.int64)
  epochs, places = np.divmod(flat, n)
  rows = np.empty(batch, dtype=np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    rows[here] = permutation(seed, int(epoch), n)[places[here]]
  return rows


def mismatch(
  group: Int64[np.ndarray, " batch"],
) -> Int64[np.ndarray, " batch"]:
  """Gives each row the index of a completion that belongs to another prompt.

  KTO estimates its KL from such mismatched pairs. The rows are sorted by prompt
  and the completions shifted by as many places as the largest group has rows
  (by one where all prompts differ). No row then keeps a completion of its own
  group, unless one group is more than half of the batch; the rows beyond that
  half do.

  Args:
    group: the same number on all rows of a prompt.

  Returns:
    A permutation of the rows; none stays in place, if there are two or more.
  """
  _, first, number, count = np.unique(
    group, return_index=True, return_inverse=True, return_counts=True
  )
  # Groups in order of appearance, so distinct prompts are just shifted by one.
  order = np.argsort(first[number], kind="stable")
  by = int(count.max()) % len(group) or 1  # a single group: by one as well
  mates = np.empty(len(group), dtype=np.int64)
  mates[order] = np.roll(order, by)
  return mates


def bucket_length(n: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `n` tokens.

  Longer texts are rounded up to a multiple of the last bucket, or of 1024 if
  that is less.
  """
  step = min(max(buckets), 1024)
  fitting = [bucket for bucket in buckets if bucket >= n]
  # -(-n // step) rounds up.
  return min(fitting, default=-(-n // step) * step)


def pad_rows(
  rows: Sequence[Sequence[int]],
  length: int,
  pad_id: int = 0,
  side: str = "right",
) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
  """Stacks rows of ids into one array.

  Args:
    rows: ids of each row, at most `length` long.
    length: T.
    pad_id: fills the rest.
    side: `right` or `left`, where the padding goes.

  Returns:
    `(tokens, mask)`; the mask is True on the rows' own ids, also on one that
    equals `pad_id`.
  """
  assert side in ("right", "left"), side
  tokens = np.full((len(rows), length), pad_id, dtype=np.int32)
  mask = np.zeros((len(rows), length), dtype=bool)
  for index, row in enumerate(rows):
    assert len(row) <= length, (len(row), length)
    start = 0 if side == "right" else length - len(row)
    tokens[index, start : start + len(row)] = row
    mask[index, start : start + len(row)] = True
  return tokens, mask
