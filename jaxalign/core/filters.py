"""Which samples are kept to be trained on."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int


def top_k(scores: Float[np.ndarray, " S"], keep: int) -> Int[np.ndarray, " K"]:
  """Indices of the `keep` highest scores, best first; ties keep their order.

  Scores of minus infinity mark samples that may not be kept (empty
  completions, non-finite rewards), so fewer than `keep` may come back.
  """
  order = np.argsort(-scores, kind="stable")[:keep]
  return order[np.isfinite(scores[order])]


def from_percentile(
  scores: Float[np.ndarray, " S"], share: float
) -> Int[np.ndarray, " K"]:
  """Indices of the scores at or above a percentile, best first.

  Of n usable scores the rank ⌈share (n − 1)⌉, from 0, is the least that
  stays, and with it whatever equals it; minus infinity as for `top_k`.

  Args:
    scores: of samples that are compared with one another.
    share: in [0, 1]; 0 keeps all, 1 the best.
  """
  usable = scores[np.isfinite(scores)]
  if not len(usable):
    return np.zeros(0, np.int64)
  least = np.quantile(usable, share, method="higher")
  return top_k(scores, int((usable >= least).sum()))


def per_prompt(
  choose: Callable[[Float[np.ndarray, " S"]], Int[np.ndarray, " K"]],
  scores: Float[np.ndarray, "P S"],
) -> Int[np.ndarray, " N"]:
  """Flat indices of what `choose` keeps of each prompt, prompt by prompt."""
  samples = scores.shape[1]
  kept = [p * samples + choose(row) for p, row in enumerate(scores)]
  return np.concatenate(kept) if kept else np.zeros(0, np.int64)
