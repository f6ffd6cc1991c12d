"""DPO on the policy's own answers: which pairs, which metrics, and a stop."""

import dataclasses

import numpy as np
import pytest

from jaxalign.algorithms import dpo
from jaxalign.config import OnlineDPOConfig
from jaxalign.config.sections import OptimizerConfig

PROMPTS = ["ab", "c"]
TEXTS = ["de", "f", "g", "hh"]
SCORES = [0.5, 2.0, 3.0, 1.0]


def config(**changes):
  optimizer = OptimizerConfig(
    learning_rate=0.02, schedule="constant", weight_decay=0.0
  )
  return OnlineDPOConfig(
    **{"steps": 2, "pairs": 2, "optimizer": optimizer} | changes
  )


def tools(toy, choice, log=None):
  def encode(answers, better, worse):
    if log is not None:
      log.append((better.tolist(), worse.tolist()))
    sides = [[(answers.asked[i], answers.texts[i]) for i in better]]
    sides += [[(answers.asked[i], answers.texts[i]) for i in worse]]
    return toy.text_batch([*sides[0], *sides[1]], 8)

  return dpo.OnlineTools(
    prompts=lambda step: PROMPTS,
    sample=lambda params, asked, each, key: toy.answers(asked, TEXTS),
    score=lambda asked, texts: np.array(SCORES, np.float32),
    held_out=None,
    encode=encode,
    diversity=lambda *_: {},
    prefer=lambda step, scored, stopping: choice(step),
  )


def run(toy, cfg, given):
  model, params = toy.build()
  ctx, log = toy.context(cfg, model, params, (model, params))
  state = dpo.run_online(ctx, given, toy.optimizer(cfg), toy.rate(cfg))
  return state, log


def test_choices_become_pairs():
  better, worse = dpo.ordered(np.array([1, -1, 0]))
  assert better.tolist() == [1, 4]
  assert worse.tolist() == [0, 5]
  with pytest.raises(
    ValueError, match="no prompt has an answer that is better"
  ):
    dpo.ordered(np.array([-1, -1]))


def test_the_preferred_answer_becomes_likelier(toy):
  seen = []
  given = tools(toy, lambda step: np.array([1, 0]), seen)
  state, log = run(toy, config(steps=12), given)
  assert seen[0] == ([1, 2], [0, 3])
  first, last = log.metrics[0], log.metrics[-1]
  np.testing.assert_allclose(first["loss/preference"], np.log(2), rtol=1e-6)
  assert float(first["objective/kl"]) == 0.0
  assert last["rewards/accuracies"] == 1.0
  assert last["logps/chosen"] > first["logps/chosen"]
  # Scores 2 over 0.5 and 3 over 1.
  assert first["objective/scores_margin"] == pytest.approx(1.75)
  assert first["score/kept_mean"] == pytest.approx(2.5)
  assert int(state.step) == 12
  kept = [r["completion"] for r in log.rows[0] if r["kept"]]
  assert kept == ["f", "g"]


def test_a_judge_may_prefer_what_the_reward_model_does_not(toy):
  given = tools(toy, lambda step: np.array([0, -1]))
  _, log = run(toy, config(steps=1), given)
  assert log.metrics[0]["objective/scores_margin"] == pytest.approx(-1.5)
  assert log.metrics[0]["num_pairs"] == 1


def test_a_step_without_a_preference_is_left_out(toy):
  cfg = config(steps=3, max_exception_count=1)
  none = np.array([-1, -1])
  given = tools(toy, lambda step: none if step == 1 else np.array([1, 0]))
  state, log = run(toy, cfg, given)
  assert int(state.step) == 3
  assert [m["exceptions"] for m in log.metrics] == [0, 1, 1]
  assert "loss/total" not in log.metrics[1]
  with pytest.raises(ValueError, match="no prompt has"):
    run(toy, dataclasses.replace(cfg, max_exception_count=0), given)


def test_a_stop_while_people_think_leaves_the_step_undone(toy):
  given = tools(toy, lambda step: None if step == 1 else np.array([1, 0]))
  state, log = run(toy, config(steps=3), given)
  assert len(log.metrics) == len(log.states) == 1
  assert int(state.step) == 1
