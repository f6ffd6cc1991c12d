"""Prompts and completions in, rewards out: the one way to score text."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxalign.scoring.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """One or several reward models as one: Σ weight · score.

  Attributes:
    scorers: at least one; each reads texts by its own tokenizer.
    weights: one per scorer, of any sign and sum.
  """

  scorers: tuple[Scorer, ...]
  weights: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    assert 0 < len(self.scorers) == len(self.weights), self.weights

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str]
  ) -> Float[np.ndarray, " B"]:
    """The reward of each completion: a float32 logit, higher is better.

    NaN or infinite where a scorer's is; see `Scorer`.
    """
    scores = [scorer(prompts, completions) for scorer in self.scorers]
    # float64: large weights of opposite sign may cancel.
    total = np.tensordot(np.asarray(self.weights, np.float64), scores, 1)
    return total.astype(np.float32)
