import numpy as np
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


def test_per_prompt_indices_are_flat():
  """Row 0 keeps 2 and 0; row 1 (offset 3) keeps 4 alone; row 2 nothing."""
  scores = np.array([[2.0, 1.0, 5.0], [-INF, 0.0, -INF], [-INF, -INF, -INF]])
  assert filters.top_k_per_prompt(scores, 2).tolist() == [2, 0, 4]
  assert filters.top_k_per_prompt(np.zeros((0, 3)), 2).tolist() == []


@given(
  st.lists(
    st.lists(st.integers(-9, 9), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
  ),
  st.integers(1, 4),
)
def test_top_k_stays_within_its_prompt(rows, keep):
  scores = np.array(rows, np.float64)
  kept = filters.top_k_per_prompt(scores, keep).reshape(len(rows), keep)
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
