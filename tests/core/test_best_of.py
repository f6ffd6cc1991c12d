import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.core import best_of


def test_weights_by_hand():
  """Of 4 answers 6 pairs: the best is the best of 3, the second of 2, ..."""
  np.testing.assert_allclose(best_of.weights(4, 2), [3 / 6, 2 / 6, 1 / 6, 0])
  np.testing.assert_allclose(best_of.weights(4, 1), [0.25] * 4)
  assert best_of.weights(4, 4).tolist() == [1, 0, 0, 0]


def test_expected_by_hand():
  """Scores 3, 1, 2: pairs have the best 3, 3, 2, their held-out values 0, 0, 5.

  The second prompt's are all 1 and worth 6, 9, 9: of equal ones the first
  counts, so 6, 6, 9. Means over prompts: (8/3 + 1) / 2 and (5/3 + 7) / 2.
  """
  scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
  values = np.array([[0.0, 7.0, 5.0], [6.0, 9.0, 9.0]])
  assert best_of.expected(scores, scores, 2) == pytest.approx(11 / 6)
  assert best_of.expected(scores, values, 2) == pytest.approx(13 / 3)


@given(
  st.integers(1, 3),
  st.integers(1, 7),
  st.randoms(use_true_random=False),
)
def test_expected_is_the_mean_over_all_choices(prompts, samples, random):
  """Few different scores, so that many are equal."""

  def draw(high):
    rows = [
      [random.randint(0, high) for _ in range(samples)] for _ in range(prompts)
    ]
    return np.array(rows, np.float64)

  scores, values = draw(3), draw(99)
  for n in range(1, samples + 1):
    found = [
      values[p, max(chosen, key=lambda i: (scores[p, i], -i))]
      for p in range(prompts)
      for chosen in itertools.combinations(range(samples), n)
    ]
    got = best_of.expected(scores, values, n)
    assert got == pytest.approx(np.mean(found))


def test_the_estimate_is_unbiased():
  """The best of n uniform numbers is n / (n + 1) on average."""
  scores = np.random.default_rng(0).random((20_000, 8))
  for n in (1, 2, 4, 8):
    found = best_of.expected(scores, scores, n)
    assert found == pytest.approx(n / (n + 1), abs=0.004)


def test_many_answers_do_not_overflow():
  """C(4096, 2048) has over a thousand digits."""
  weights = best_of.weights(4096, 2048)
  assert weights[0] == pytest.approx(0.5)
  assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
  ("samples", "sizes"),
  [
    (1, [1]),
    (2, [1, 2]),
    (3, [1, 2, 3]),
    (12, [1, 2, 4, 8, 12]),
    (16, [1, 2, 4, 8, 16]),
  ],
)
def test_sizes(samples, sizes):
  assert best_of.sizes(samples) == sizes


def test_the_bound_is_reached_where_answers_are_rare_and_is_one_elsewhere():
  """m answers of probability 1/m: the k-th worst wins with (kⁿ − (k−1)ⁿ) / mⁿ.

  With m = 2, n = 2 that is ¼ and ¾: KL = ¼ ln ½ + ¾ ln 1.5 = 0.131 < ln 2 − ½.
  """
  assert best_of.kl_bound(1) == 0
  assert best_of.kl_bound(2) == pytest.approx(math.log(2) - 0.5)

  def exact(m, n):
    k = np.arange(1, m + 1)
    chance = (k / m) ** n - ((k - 1) / m) ** n
    chance = chance[chance > 0]
    return float((chance * np.log(chance * m)).sum())

  assert exact(2, 2) == pytest.approx(0.1308, abs=1e-4)
  for n in (2, 4, 16):
    assert exact(2, n) < best_of.kl_bound(n)
    assert exact(100_000, n) == pytest.approx(best_of.kl_bound(n), rel=1e-3)
