import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import batches


def test_permutation_is_fixed_for_ever():
  """A change here breaks the resume of every stored run."""
  assert batches.permutation(0, 0, 10).tolist() == [
    0, 2, 9, 1, 8, 5, 4, 3, 6, 7,
  ]  # fmt: skip


@given(st.integers(), st.integers(0, 99), st.integers(0, 200))
def test_permutation_holds_every_row_once(seed, epoch, n):
  order = batches.permutation(seed, epoch, n)
  assert sorted(order.tolist()) == list(range(n))


def test_permutation_depends_on_seed_and_epoch():
  orders = {
    tuple(batches.permutation(seed, epoch, 50).tolist())
    for seed in range(4)
    for epoch in range(4)
  }
  assert len(orders) == 16


@given(
  st.integers(0, 9), st.integers(1, 7), st.integers(1, 12), st.integers(1, 9)
)
def test_steps_walk_through_the_epochs(seed, batch, n, steps):
  """Any step alone gives what walking there gives; epochs leave no gap."""
  epochs = steps * batch // n + 1
  walk = np.concatenate(
    [batches.permutation(seed, e, n) for e in range(epochs)]
  )
  for step in range(steps):
    rows = batches.rows_of_step(seed, step, batch, n)
    assert rows.tolist() == walk[step * batch : (step + 1) * batch].tolist()


def test_a_late_step_costs_no_more():
  rows = batches.rows_of_step(3, 10**12, 4, 10)
  assert rows.shape == (4,)


def test_bucket_length():
  assert batches.bucket_length(0, (4, 8)) == 4
  assert batches.bucket_length(4, (8, 4)) == 4
  assert batches.bucket_length(5, (8, 4)) == 8
  assert batches.bucket_length(9, (4, 8)) == 16
  assert batches.bucket_length(2049, (1024, 2048)) == 3072


def test_pad_rows_on_both_sides():
  rows = [[7, 0], [], [1, 2, 3]]
  tokens, mask = batches.pad_rows(rows, 3, pad_id=0)
  assert tokens.tolist() == [[7, 0, 0], [0, 0, 0], [1, 2, 3]]
  assert mask.tolist() == [
    [True, True, False], [False] * 3, [True] * 3,
  ]  # fmt: skip
  tokens, mask = batches.pad_rows(rows, 3, pad_id=9, side="left")
  assert tokens.tolist() == [[9, 7, 0], [9, 9, 9], [1, 2, 3]]
  assert mask[0].tolist() == [False, True, True]
  assert tokens.dtype == np.int32


def test_mismatch_moves_on_by_the_largest_prompt():
  """All different: by one, as [last, first, ...]; a pair: by two."""
  found = batches.mismatch(np.array([5, 3, 9, 1]))
  assert found.tolist() == [3, 0, 1, 2]
  # Side by side: rows 0, 2 (prompt 7), 1, 3; their mates two further back.
  found = batches.mismatch(np.array([7, 4, 7, 8]))
  assert found.tolist() == [1, 0, 3, 2]
  assert batches.mismatch(np.array([6, 6, 6])).tolist() == [2, 0, 1]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=24))
def test_mismatch_meets_an_own_prompt_only_where_it_must(groups):
  group = np.array(groups)
  mates = batches.mismatch(group)
  count = len(group)
  assert sorted(mates) == list(range(count))  # every completion once
  assert (mates != np.arange(count)).all()
  largest = int(np.bincount(group).max())
  # Its rows need others' completions, of which there are count - largest.
  least = max(0, 2 * largest - count)
  assert (group[mates] == group).sum() == least
