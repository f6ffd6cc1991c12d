"""Where train and held-out reward part: named if they do, silent if not."""

import math

import numpy as np
import pytest

from jaxalign.report import overoptimization

STEPS = 100


def validations(train, held_out):
  return [
    overoptimization.Validation(step, float(a), float(b))
    for step, (a, b) in enumerate(zip(train, held_out, strict=True), 1)
  ]


def noise(seed):
  return np.random.default_rng(seed).normal(size=STEPS)


def rising(seed, deviation=1.0):
  return np.linspace(0, 5, STEPS) + deviation * noise(seed)


def turning(seed, deviation=1.0):
  """Up by 3 until step 60, then down to where it began."""
  course = np.interp(np.arange(1, STEPS + 1), (1, 60, STEPS), (0, 3, 0))
  return course + deviation * noise(seed)


def ever(seen):
  """Whether a run that asks after each validation would be told of a turn."""
  return any(
    overoptimization.find_turn(seen[:end]) for end in range(1, len(seen) + 1)
  )


def test_gap_and_recent_by_hand():
  """Train rose by 4 − 1 = 3, held-out by −3 − (−2) = −1: apart by 4."""
  seen = validations([1, 2, 4], [-2, 0, -3])
  found = overoptimization.measure(seen)
  assert found == {"score/gap": 4.0, "test_score/recent": pytest.approx(-5 / 3)}
  assert overoptimization.measure(seen[:1])["score/gap"] == 0
  seen = validations(range(7), range(7))
  assert (
    overoptimization.measure(seen)["test_score/recent"] == 4.0
  )  # 2, 3, 4, 5, 6


def test_a_validation_has_both_rewards_and_finite_ones():
  rows = [
    {"step": 1, "score/mean": 1.0},
    {"step": 2, "score/mean": 1.5, "test_score/mean": "NaN"},
    {"step": 3, "score/mean": 2, "test_score/mean": -0.5, "lr": 0.1},
    {"step": 4, "score/mean": "-Infinity", "test_score/mean": 1.0},
  ]
  assert overoptimization.validations(rows) == [
    overoptimization.Validation(3, 2.0, -0.5)
  ]


@pytest.mark.parametrize("seed", range(10))
def test_a_turn_is_named_within_its_window(seed):
  seen = validations(rising(seed, 0.3), turning(seed + 100, 0.3))
  turn = overoptimization.find_turn(seen)
  assert abs(turn.step - 60) <= turn.window == 10
  assert turn.held_out[0] > turn.held_out[1]
  assert turn.train[0] < turn.train[1]
  said = overoptimization.message(turn)
  assert f"turned near step {turn.step}: it fell" in said


def test_a_turn_is_found_through_noise():
  """A third of the fall is one standard deviation of a validation."""
  turns = [
    overoptimization.find_turn(validations(rising(seed), turning(seed + 1000)))
    for seed in range(40)
  ]
  assert sum(turn is not None for turn in turns) >= 34
  assert all(abs(turn.step - 60) <= 20 for turn in turns if turn)


def test_noise_is_no_turn():
  """Asked after every validation, at most one run in twenty is called one."""
  called = sum(
    ever(validations(noise(seed), noise(seed + 1000))) for seed in range(200)
  )
  assert called <= 10


def test_two_that_rise_have_not_parted():
  assert not any(
    ever(validations(rising(seed), rising(seed + 1000))) for seed in range(40)
  )


def test_a_held_out_reward_that_stays_has_not_turned():
  called = sum(
    ever(validations(rising(seed), noise(seed + 1000))) for seed in range(100)
  )
  assert called <= 10


def test_a_policy_that_gets_worse_at_both_fools_nobody():
  seen = validations(turning(0, 0.3), turning(1, 0.3))
  assert overoptimization.find_turn(seen) is None


@pytest.mark.parametrize(("count", "found"), [(19, False), (20, True)])
def test_it_takes_four_windows(count, found):
  """Without noise it is as plain as can be, but 19 are fewer than 4 x 5."""
  train = np.arange(count)
  held_out = -np.abs(train - count // 3)
  turn = overoptimization.find_turn(validations(train, held_out))
  assert (turn is not None) == found


def test_scale_and_steps_do_not_matter():
  """Validations every 7 steps, rewards of other units: the same place."""
  one = overoptimization.find_turn(validations(rising(0, 0.3), turning(1, 0.3)))
  far = [
    overoptimization.Validation(
      7 * v.step, 50 * v.train + 3, v.held_out / 20 - 9
    )
    for v in validations(rising(0, 0.3), turning(1, 0.3))
  ]
  assert overoptimization.find_turn(far).step == 7 * one.step


def test_constants_are_no_turn():
  assert overoptimization.find_turn(validations([1.0] * 40, [2.0] * 40)) is None
  assert not math.isnan(
    overoptimization.measure(validations([1], [2]))["score/gap"]
  )
