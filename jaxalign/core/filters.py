"""Which samples are kept to be trained on."""

import numpy as np
from jaxtyping import Float, Int


def top_k(scores: Float[np.ndarray, " S"], keep: int) -> Int[np.ndarray, " K"]:
  """Indices of the `keep` highest scores, best first; ties keep their order.

  Scores of minus infinity mark samples that may not be kept (empty
  completions, non-finite rewards), so fewer than `keep` may come back.
  """
  order = np.argsort(-scores, kind="stable")[:keep]
  return order[np.isfinite(scores[order])]


def top_k_per_prompt(
  scores: Float[np.ndarray, "P S"], keep: int
) -> Int[np.ndarray, " N"]:
  """Flat indices of each prompt's `keep` best samples, prompt by prompt."""
  samples = scores.shape[1]
  kept = [p * samples + top_k(row, keep) for p, row in enumerate(scores)]
  return np.concatenate(kept) if kept else np.zeros(0, np.int64)
