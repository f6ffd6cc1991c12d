"""DPO on sampled completions: which pairs, which metrics, and a stop."""

import dataclasses

import numpy as np
import pytest

from jaxalign.algorithms.dpo.online import train as online
from jaxalign.algorithms.dpo.online.config import OnlineDPOConfig
from jaxalign.config.sections import OptimizerConfig

PROMPTS = ["ab", "c"]
TEXTS = ["de", "f", "g", "hh"]
SCORES = [0.5, 2.0, 3.0, 1.0]


def config(**changes):
  optimizer = OptimizerConfig(
    learning_rate=0.02, schedule="constant", weight_decay=0.0
  )
  return OnlineDPOConfig(
    **{"steps": 2, "batch_size": 2, "optimizer": optimizer} | changes
  )


def train(toy, cfg, choice):
  """Trains with a judge `step -> choices`; returns the state and the log."""
  model, params = toy.build()
  run = toy.run(cfg, model, params, (model, params))

  def sample(params, prompts, samples, key):
    return toy.completions(prompts, TEXTS)

  def score(prompts, texts):
    return SCORES

  def judge(step, rollout, stopping):
    return choice(step)

  state = online.train(run, toy.source(PROMPTS, sample, score), judge)
  return state, run.recorder


def test_choices_become_pairs():
  better, worse = online.order_pairs(np.array([1, -1, 0]))
  assert better.tolist() == [1, 4]
  assert worse.tolist() == [0, 5]
  with pytest.raises(ValueError, match="no prompt has a completion better"):
    online.order_pairs(np.array([-1, -1]))


def test_the_preferred_completion_becomes_likelier(toy):
  state, log = train(toy, config(steps=12), lambda step: np.array([1, 0]))
  first, last = log.metrics[0], log.metrics[-1]
  np.testing.assert_allclose(first["loss/preference"], np.log(2), rtol=1e-6)
  assert float(first["objective/kl"]) == 0.0
  assert last["rewards/accuracies"] == 1.0
  assert last["logps/chosen"] > first["logps/chosen"]
  # The first step's policy is the reference, the texts are always the same.
  names = ("logps/chosen", "logps/rejected")
  moved = np.mean([float(last[name] - first[name]) for name in names])
  assert float(last["objective/kl"]) == pytest.approx(moved, rel=1e-4)
  # Scores 2 over 0.5 and 3 over 1.
  assert first["objective/scores_margin"] == pytest.approx(1.75)
  assert first["score/kept_mean"] == pytest.approx(2.5)
  assert int(state.step) == 12
  kept = [r["completion"] for r in log.rows_of[0] if r["kept"]]
  assert kept == ["f", "g"]


def test_a_judge_may_prefer_what_the_reward_model_does_not(toy):
  _, log = train(toy, config(steps=1), lambda step: np.array([0, -1]))
  assert log.metrics[0]["objective/scores_margin"] == pytest.approx(-1.5)
  assert log.metrics[0]["num_pairs"] == 1


def test_a_step_without_a_preference_is_skipped(toy):
  cfg = config(steps=3, max_exception_count=1)
  none = np.array([-1, -1])

  def choose(step):
    return none if step == 1 else np.array([1, 0])

  state, log = train(toy, cfg, choose)
  assert int(state.step) == 3
  assert [m["exceptions"] for m in log.metrics] == [0, 1, 1]
  assert "loss/total" not in log.metrics[1]
  with pytest.raises(ValueError, match="no prompt has"):
    train(toy, dataclasses.replace(cfg, max_exception_count=0), choose)


def test_a_stop_while_people_think_leaves_the_step_undone(toy):
  def choose(step):
    return None if step == 1 else np.array([1, 0])

  state, log = train(toy, config(steps=3), choose)
  assert len(log.metrics) == 1
  # The step before is saved once more, because the run ends here.
  assert [int(saved.step) for saved in log.states] == [1, 1]
  assert int(state.step) == 1
