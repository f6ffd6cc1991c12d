"""Deterministic order, length buckets and padding; numpy only.

Which rows a step sees is a pure function of (seed, step): a resumed run needs
no iterator state, and hosts agree without talking to each other.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

DEFAULT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BEYOND = 1024  # longer texts go up to the next multiple


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
  """Whose completion each row is given, so that it belongs to another prompt.

  The rows are laid out with those of one prompt side by side, the completions
  moved on by as many places as the largest prompt has rows: by one where all
  prompts differ. Then none meets a prompt of its own group, unless one group
  is more than half of the batch; what it has beyond that half meets its own.

  Args:
    group: rows of one prompt carry one number.

  Returns:
    Indices of rows; each occurs once, none in its own place (of two or more).
  """
  _, first, number, count = np.unique(
    group, return_index=True, return_inverse=True, return_counts=True
  )
  order = np.argsort(first[number], kind="stable")
  by = int(count.max()) % len(group) or 1  # a single prompt: by one as well
  mates = np.empty(len(group), dtype=np.int64)
  mates[order] = np.roll(order, by)
  return mates


def bucket_length(n: int, buckets: Sequence[int] = DEFAULT_BUCKETS) -> int:
  """The smallest bucket that holds `n` tokens, or a multiple of `BEYOND`."""
  fitting = [bucket for bucket in buckets if bucket >= n]
  return min(fitting, default=-(-n // BEYOND) * BEYOND)


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
    side: `right` or `left`: where the filling goes.

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
