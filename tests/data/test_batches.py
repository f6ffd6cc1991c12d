import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import batches
from jaxalign.errors import UserError


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
  with pytest.raises(UserError, match=r"9 tokens exceeds the largest .* 8"):
    batches.bucket_length(9, (4, 8))


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


LENGTHS = st.lists(st.integers(0, 64), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 300) | st.none())
def test_groups_hold_every_row_once(lengths, max_rows, max_tokens):
  groups = batches.group_by_length(
    lengths, (8, 16, 64), max_rows=max_rows, max_tokens=max_tokens
  )
  rows = np.concatenate([group.rows for group in groups])
  assert sorted(rows.tolist()) == list(range(len(lengths)))
  for group in groups:
    assert 1 <= len(group.rows) <= max_rows
    for row in group.rows:
      assert group.length == batches.bucket_length(lengths[row], (8, 16, 64))
    if max_tokens is not None and len(group.rows) > 1:
      assert len(group.rows) * group.length <= max_tokens


@given(LENGTHS, st.integers(1, 9))
def test_order_is_restored_exactly(lengths, max_rows):
  """Also where groups come back filled up to a fixed size."""
  groups = batches.group_by_length(lengths, (64,), max_rows=max_rows)
  values = [
    np.pad(np.stack([g.rows, g.rows * 2], 1), ((0, 3), (0, 0))) for g in groups
  ]
  out = batches.restore_order(groups, values)
  assert out[:, 0].tolist() == list(range(len(lengths)))
  assert out[:, 1].tolist() == [2 * i for i in range(len(lengths))]


def test_longest_group_comes_first():
  groups = batches.group_by_length([3, 60, 9], (8, 16, 64), max_rows=4)
  assert [group.length for group in groups] == [64, 16, 8]
