import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.core import filters

INF = float("inf")


def test_best_first_and_ties_in_order():
  scores = np.array([1.0, 3.0, 3.0, 2.0, 3.0])
  assert filters.top_k(scores, 4).tolist() == [1, 2, 4, 3]
  assert filters.top_k(scores, 1).tolist() == [1]


def test_what_may_not_be_kept_is_not_replaced():
  """Of two usable samples at most two come back, however many are asked for."""
  scores = np.array([-INF, 0.5, -INF, -7.0])
  assert filters.top_k(scores, 3).tolist() == [1, 3]
  assert filters.top_k(np.full(3, -INF), 2).tolist() == []


@pytest.mark.parametrize(
  ("share", "kept"),
  [
    (0.0, [3, 1, 4, 0, 2]),
    (0.25, [3, 1, 4, 0]),
    (0.5, [3, 1, 4]),
    # Rank ⌈0.51 · 4⌉ = 3 of 0 … 4 is the score of 1 and 4, which are equal.
    (0.51, [3, 1, 4]),
    (0.75, [3, 1, 4]),
    (0.76, [3]),
    (1.0, [3]),
  ],
)
def test_a_percentile_by_hand(share, kept):
  """Sorted: 1, 2, 4, 4, 7 at ranks 0 to 4, shares 0, ¼, ½, ¾, 1."""
  scores = np.array([2.0, 4.0, 1.0, 7.0, 4.0])
  assert filters.from_percentile(scores, share).tolist() == kept


def test_a_percentile_is_of_the_usable():
  """Of 3 and 1 the half keeps 3; minus infinity is no score."""
  scores = np.array([-INF, 1.0, -INF, 3.0])
  assert filters.from_percentile(scores, 0.5).tolist() == [3]
  assert filters.from_percentile(scores, 0.0).tolist() == [3, 1]
  assert filters.from_percentile(np.full(3, -INF), 0.0).tolist() == []
  assert filters.from_percentile(np.zeros(3), 0.9).tolist() == [0, 1, 2]


@given(
  st.lists(st.integers(-9, 9), min_size=1, max_size=8),
  st.floats(0, 1),
)
def test_a_percentile_keeps_the_best_and_never_nothing(row, share):
  scores = np.array(row, np.float64)
  kept = filters.from_percentile(scores, share)
  rest = np.setdiff1d(np.arange(len(row)), kept)
  assert len(kept) >= 1
  assert not len(rest) or scores[kept].min() > scores[rest].max()
  # As many as numpy's own interpolated quantile leaves at or above it.
  assert len(kept) <= (scores >= np.quantile(scores, share) - 1e-9).sum()


def test_indices_of_groups_are_flat():
  """Row 0 keeps 2 and 0; row 1 (offset 3) keeps 4 alone; row 2 nothing."""
  scores = np.array([[2.0, 1.0, 5.0], [-INF, 0.0, -INF], [-INF, -INF, -INF]])
  assert filters.top_k_per_group(scores, 2).tolist() == [2, 0, 4]
  assert filters.top_k_per_group(np.zeros((0, 3)), 2).tolist() == []


def test_a_percentile_of_each_group():
  """Of 5, 2 and 1 the upper half is 5 and 2, of 0 alone 0, of none none."""
  scores = np.array([[2.0, 1.0, 5.0], [-INF, 0.0, -INF], [-INF, -INF, -INF]])
  found = filters.from_percentile_per_group(scores, 0.5)
  assert found.tolist() == [2, 0, 4]
  assert filters.from_percentile_per_group(np.zeros((0, 3)), 0.5).tolist() == []


@given(
  st.lists(
    st.lists(st.integers(-9, 9), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
  ),
  st.integers(1, 4),
)
def test_top_k_stays_within_its_group(rows, keep):
  scores = np.array(rows, np.float64)
  kept = filters.top_k_per_group(scores, keep).reshape(len(rows), keep)
  for p, row in enumerate(kept):
    assert (row // 4 == p).all()
    others = np.setdiff1d(np.arange(4), row % 4)
    assert (
      not len(others) or scores[p, row % 4].min() >= scores[p, others].max()
    )


@given(st.permutations(range(6)))
def test_scores_carry_their_samples_along(order):
  scores = np.array([0.3, 2.5, -1.0, 9.0, 4.0, 4.5])
  kept = filters.top_k(scores[order], 3)
  assert np.array(order)[kept].tolist() == [3, 5, 4]
