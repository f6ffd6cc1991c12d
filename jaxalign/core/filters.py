"""Which completions are kept for training."""

import numpy as np
from jaxtyping import Float, Int


def top_k(scores: Float[np.ndarray, " S"], keep: int) -> Int[np.ndarray, " K"]:
  """Indices of the `keep` highest scores, best first; ties keep their order.

  A score of minus infinity marks a completion that must not be kept (it is
  empty or its reward is not finite), so fewer than `keep` may come back.
  """
  # Negated rather than reversed: reversing would turn ties around.
  order = np.argsort(-scores, kind="stable")[:keep]
  return order[np.isfinite(scores[order])]


def from_percentile(
  scores: Float[np.ndarray, " S"], share: float
) -> Int[np.ndarray, " K"]:
  """Indices of the scores at or above a percentile, best first.

  Of n usable scores, the one of rank ⌈share (n − 1)⌉, counted from 0, is the
  lowest that stays, with all that equal it; minus infinity as for `top_k`.

  Args:
    scores: of completions that are compared with one another.
    share: in [0, 1]; 0 keeps all, 1 the best.
  """
  # "higher" returns one of the scores, so at least that one is kept.
  usable = scores[np.isfinite(scores)]
  if not len(usable):
    return np.zeros(0, np.int64)
  least = np.quantile(usable, share, method="higher")
  return top_k(scores, int((usable >= least).sum()))


def top_k_per_group(
  scores: Float[np.ndarray, "P S"], keep: int
) -> Int[np.ndarray, " N"]:
  """Flat indices of `top_k` of each row, row by row."""
  kept = [top_k(row, keep) for row in scores]
  return _flat(kept, scores.shape[1])


def from_percentile_per_group(
  scores: Float[np.ndarray, "P S"], share: float
) -> Int[np.ndarray, " N"]:
  """Flat indices of `from_percentile` of each row, row by row."""
  kept = [from_percentile(row, share) for row in scores]
  return _flat(kept, scores.shape[1])


def _flat(
  kept: list[Int[np.ndarray, "..."]], samples: int
) -> Int[np.ndarray, " N"]:
  flat = [g * samples + row for g, row in enumerate(kept)]
  return np.concatenate(flat) if flat else np.zeros(0, np.int64)
