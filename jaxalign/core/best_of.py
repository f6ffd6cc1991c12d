"""The best of n answers: what it is worth, and how far it strays."""

import math

import numpy as np
from jaxtyping import Float


def sizes(samples: int) -> list[int]:
  """1, 2, 4 … below `samples`, and `samples` itself."""
  powers = [2**k for k in range((samples - 1).bit_length())]
  return [*powers, samples]


def weights(samples: int, n: int) -> Float[np.ndarray, " S"]:
  """wᵢ = C(S − i, n − 1) / C(S, n), i = 1 … S.

  The chance that the i-th best of S is the best of n of them: it is drawn, and
  the n − 1 others come from the S − i behind it.

  Args:
    samples: S.
    n: in [1, S].
  """
  ways = [math.comb(samples - i, n - 1) for i in range(1, samples + 1)]
  return np.array([w / math.comb(samples, n) for w in ways])


def expected(
  scores: Float[np.ndarray, "P S"], values: Float[np.ndarray, "P S"], n: int
) -> float:
  """What the best of n answers is worth, mean over prompts.

  The mean over all C(S, n) choices of n of a prompt's S answers. Each choice is
  a draw of n, so the mean is unbiased, and has the least variance of all that
  S answers give.

  Args:
    scores: what the best is chosen by; of equal ones the first.
    values: what an answer is worth: `scores`, or a second model's.
    n: in [1, S].
  """
  order = np.argsort(-scores, axis=1, kind="stable")
  ranked = np.take_along_axis(values, order, axis=1)
  return float((ranked @ weights(scores.shape[1], n)).mean())


def kl_bound(n: int) -> float:
  """log n − (n − 1) / n, nats an answer, >= KL(best of n ‖ policy).

  Stiennon 2020, appendix G.3; equal to the KL where no two answers score the
  same and every single one is rare, else above it (Beirami 2024).

  Args:
    n: answers that are chosen from, >= 1.
  """
  return math.log(n) - (n - 1) / n
