import math

import numpy as np

from jaxalign.algorithms.kto.evaluate import agreement


def test_agreement_is_a_mean_over_prompts():
  """Prompt 0: 1 of 2 pairs; prompt 1: 1 of 1; prompt 2 has one label only."""
  found = agreement(
    np.array([0.5, 0.1, 0.9, 2.0, 1.0, 3.0, 9.0]),
    np.array([True, False, False, True, False, True, False]),
    np.array([0, 0, 0, 1, 1, 2, -1]),
  )
  assert found["eval_prompts"] == 2
  assert math.isclose(found["eval_rewards/accuracies"], 0.75)
  none = agreement(np.zeros(2), np.ones(2, bool), np.array([0, 0]))
  assert none == {}
