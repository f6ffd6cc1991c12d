import math

import numpy as np
import pytest

from jaxalign.algorithms.reward_model.evaluate import agreement


def columns(*rows):
  """(score, reward, group, chars) rows as `agreement` takes them."""
  score, reward, group, chars = zip(*rows, strict=True)
  return (
    np.array(score, np.float32),
    np.array(reward, np.float32),
    np.array(group),
    np.array(chars),
  )


def test_agreement_by_hand():
  """Four comparisons, one of them without a winner.

  group 0: right, lead 2, the better one is longer
  group 1: wrong, lead −1, the better one is longer
  group 2: right, lead 3, the better one is shorter
  group 3: equal rewards: no pair

  Accuracy 2/3; longer wins 2/3; of the longer 1/2, of the shorter 1/1;
  margin (2 − 1 + 3) / 3; mean of all eight scores 12 / 8.
  """
  found = agreement(
    *columns(
      (3.0, 1, 0, 20),
      (1.0, 0, 0, 10),
      (2.0, 0, 1, 5),
      (1.0, 1, 1, 8),
      (0.0, 0, 2, 9),
      (3.0, 1, 2, 4),
      (1.0, 4, 3, 1),
      (1.0, 4, 3, 2),
    )
  )
  assert found == pytest.approx(
    {
      "accuracy": 2 / 3,
      "accuracy_longer_wins": 2 / 3,
      "accuracy_if_longer": 0.5,
      "accuracy_if_shorter": 1.0,
      "margin": 4 / 3,
      "pairs": 3,
      "mean_reward": 1.5,
    }
  )


def test_agreement_compares_answers_to_one_prompt_only():
  """Scores follow the reward inside prompts and contradict it across them."""
  rows = [
    (10.0 * group + answer, -5.0 * group + answer, group, 1)
    for group in range(40)
    for answer in range(5)
  ]
  found = agreement(*columns(*rows))
  assert found["accuracy"] == 1.0
  assert found["pairs"] == 40 * 10
  # Rows may come in any order.
  rng = np.random.default_rng(0)
  shuffled = [rows[i] for i in rng.permutation(len(rows))]
  assert agreement(*columns(*shuffled))["accuracy"] == 1.0
  lonely = agreement(*columns((1.0, 1, 0, 1), (2.0, 2, 1, 1)))
  assert lonely["pairs"] == 0
  assert math.isnan(lonely["accuracy"])


def test_every_prompt_weighs_the_same():
  """Three answers in the wrong order, two in the right one: (0/3 + 1/1) / 2.

  The longer answer is better in two of the first three pairs (which are all
  wrong, 2/3 of a prompt) and in the other prompt's pair (1 of 1): of the
  pairs whose better answer is longer, 1 / (2/3 + 1) = 3/5 are right.
  """
  found = agreement(
    *columns(
      (1.0, 3, 0, 9),
      (2.0, 2, 0, 5),
      (3.0, 1, 0, 7),
      (0.0, 0, 1, 1),
      (1.0, 1, 1, 2),
    )
  )
  assert found["accuracy"] == pytest.approx(1 / 2)
  assert found["accuracy_longer_wins"] == pytest.approx((2 / 3 + 1) / 2)
  assert found["accuracy_if_longer"] == pytest.approx(3 / 5)
  assert found["accuracy_if_shorter"] == 0.0
  assert found["margin"] == pytest.approx((-4 / 3 + 1) / 2)
  assert found["pairs"] == 4
