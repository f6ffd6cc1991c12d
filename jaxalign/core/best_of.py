"""The best of n completions: its score, and its distance from the policy."""

import math

import numpy as np
from jaxtyping import Float


def sizes(samples: int) -> list[int]:
  """1, 2, 4 … below `samples`, and `samples` itself."""
  powers = [2**k for k in range((samples - 1).bit_length())]
  return [*powers, samples]


def weights(samples: int, n: int) -> Float[np.ndarray, " S"]:
  """wᵢ = C(S − i, n − 1) / C(S, n), i = 1 … S.

  The chance that the i-th best of S is the best of n drawn from them: it is
  drawn, and the n − 1 others are among the S − i that score lower.

  Args:
    samples: S.
    n: in [1, S].
  """
  # Python's integers are exact: C(S, n) outgrows a float64 near S = 1000.
  ways = [math.comb(samples - i, n - 1) for i in range(1, samples + 1)]
  return np.array([w / math.comb(samples, n) for w in ways])


def expected(
  scores: Float[np.ndarray, "P S"], values: Float[np.ndarray, "P S"], n: int
) -> float:
  """The expected value of the best of n completions, mean over prompts.

  It averages over all C(S, n) ways to choose n of a prompt's S completions.
  Each choice is a draw of n, so the mean is unbiased, and no other unbiased
  estimate from S completions has a smaller variance.

  Args:
    scores: the best is chosen by these; of equal ones it is the first.
    values: what a completion is worth: `scores`, or a second model's scores.
    n: in [1, S].
  """
  order = np.argsort(-scores, axis=1, kind="stable")
  ranked = np.take_along_axis(values, order, axis=1)
  return float((ranked @ weights(scores.shape[1], n)).mean())


def kl_bound(n: int) -> float:
  """log n − (n − 1) / n, nats a completion, >= KL(best of n ‖ policy).

  Stiennon 2020, appendix G.3; equal to the KL where no two completions
  score the same and each one is rare, else above it (Beirami 2024).

  Args:
    n: completions to choose from, >= 1.
  """
  return math.log(n) - (n - 1) / n
