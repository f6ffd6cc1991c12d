"""Reward against N, with a generator and reward models that are stubs."""

import types
from unittest import mock

import jax
import numpy as np
import pytest

from jaxalign.data.rows import PromptRow
from jaxalign.evals.best_of_n import BestOfN
from jaxalign.sampling.generator import Generator
from jaxalign.scoring.reward_model import RewardModel

PROMPTS = tuple(map(PromptRow, "abc"))


def generate(params, prompts, n, key):
  del params, key
  texts = [f"{prompt} {i}" for prompt in prompts for i in range(n)]
  each = [prompt for prompt in prompts for _ in range(n)]
  return types.SimpleNamespace(texts=texts, prompt_of_each=each)


def evaluated(train, heldout):
  """What is measured where the rewards are `train` and `heldout`."""
  generator = mock.Mock(spec=Generator, side_effect=generate)
  judges = [
    mock.Mock(spec=RewardModel, return_value=np.array(rewards, np.float32))
    for rewards in (train, heldout)
  ]
  key = jax.random.key(0)
  return BestOfN(1, 2, generator, *judges, PROMPTS, key)({}, 0)


def test_the_train_reward_picks_and_both_are_measured():
  """The best by it: 3, 5, 1, worth 10, 40, 60 to the other."""
  found = evaluated([3, 1, 2, 5, 1, 0], [10, 20, 30, 40, 60, 50])
  assert found["eval_score/best_of_2"] == pytest.approx(3)
  assert found["eval_score/best_of_1"] == pytest.approx(2)
  assert found["eval_score/mean"] == pytest.approx(2)
  assert found["eval_test_score/best_of_2"] == pytest.approx(110 / 3)
  assert found["eval_test_score/mean"] == pytest.approx(35)
  assert found["eval_score/unscored"] == 0


def test_a_prompt_without_finite_rewards_is_left_out():
  """Of both rewards, so that they are means over the same prompts."""
  nan, inf = float("nan"), float("inf")
  found = evaluated([3, nan, 2, 5, 1, 0], [10, 20, 30, inf, 60, 50])
  assert found["eval_score/unscored"] == 2
  assert found["eval_score/best_of_2"] == pytest.approx(1)
  assert found["eval_score/mean"] == pytest.approx(0.5)
  assert found["eval_test_score/best_of_2"] == pytest.approx(60)
  found = evaluated([nan] * 6, [0] * 6)
  assert found["eval_score/unscored"] == 3
  assert "eval_score/mean" not in found
