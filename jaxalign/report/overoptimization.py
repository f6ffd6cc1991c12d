"""Train and held-out reward next to each other, and where they part.

A policy learns to fool the reward model that chooses the completions. A
held-out one is fooled later or not at all: when its reward falls while the
train reward still rises, nothing of worth is learned any more. Everything here
is a function of the lines of metrics.jsonl, so a resumed run says the same as
an uninterrupted one.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxalign.core.types import Metrics
from jaxalign.runtime.metrics import LogRow, number

TRAIN, HELD_OUT = "score/mean", "test_score/mean"
RECENT = 5  # validations that `test_score/recent` is the mean of
_PART = 10  # a window is a tenth of the validations,
_LEAST = 5  # or five
_WINDOWS = 4  # fewer windows are not judged
# How far the means must be apart, in standard errors. The best of many windows
# is above the truth, and the test is made after every validation: with 2 and 2
# one run in six that is noise alone would be called turned.
_FELL, _ROSE = 4.0, 2.0


class Validation(NamedTuple):
  """Both rewards after a step, means over its completions."""

  step: int
  train: float
  held_out: float


class Turn(NamedTuple):
  """Where the held-out reward was best, and both rewards since then."""

  step: int  # the middle of the best window
  window: int  # validations in a window
  train: tuple[float, float]  # mean in the best window and in the last one
  held_out: tuple[float, float]


def validations(rows: Iterable[LogRow]) -> list[Validation]:
  """The lines of metrics.jsonl that have both rewards, finite ones."""
  seen = []
  for row in rows:
    train, held_out = number(row.get(TRAIN)), number(row.get(HELD_OUT))
    if train is None or held_out is None:
      continue
    if math.isfinite(train) and math.isfinite(held_out):
      seen.append(Validation(row["step"], train, held_out))
  return seen


def measure(seen: Sequence[Validation]) -> Metrics:
  """Metrics for the line of the last validation; `seen` is not empty."""
  first, last = seen[0], seen[-1]
  train_rise = last.train - first.train
  recent = [v.held_out for v in seen[-RECENT:]]
  return {
    "score/gap": train_rise - (last.held_out - first.held_out),
    "test_score/recent": sum(recent) / len(recent),
  }


def find_turn(seen: Sequence[Validation]) -> Turn | None:
  """Where the held-out reward turned while the train reward still rose.

  Means over windows of w = max(5, a tenth) validations in a row are compared:
  the last one with the one in which the held-out mean is highest. A turn: the
  held-out mean has fallen by 4 standard errors since, and the train mean has
  risen by 2. The standard error of a difference is σ √(2 / w); σ² is half the
  mean squared step from one validation to the next, which a trend hardly
  changes.

  Returns:
    None if there is no turn, or there are fewer than 4 w validations.
  """
  w = max(_LEAST, len(seen) // _PART)
  if len(seen) < _WINDOWS * w:
    return None
  train, train_error = _windows(np.array([v.train for v in seen]), w)
  held_out, held_out_error = _windows(np.array([v.held_out for v in seen]), w)
  # Windows that overlap the last one are no candidates.
  best = int(np.argmax(held_out[:-w]))
  if train[-1] - train[best] <= _ROSE * train_error:
    return None
  if held_out[best] - held_out[-1] <= _FELL * held_out_error:
    return None
  return Turn(
    step=seen[best + w // 2].step,
    window=w,
    train=(float(train[best]), float(train[-1])),
    held_out=(float(held_out[best]), float(held_out[-1])),
  )


def _windows(
  x: Float[np.ndarray, " T"], w: int
) -> tuple[Float[np.ndarray, " W"], float]:
  """Means of all windows, and the standard error of a difference of two."""
  sums = np.cumsum(np.concatenate([[0.0], x]))
  variance = np.mean(np.diff(x) ** 2) / 2
  return (sums[w:] - sums[:-w]) / w, float(np.sqrt(2 * variance / w))


def message(turn: Turn) -> str:
  """One sentence about the turn, for the log and the report."""
  return (
    f"The held-out reward turned near step {turn.step}: it fell from "
    f"{turn.held_out[0]:.2f} to {turn.held_out[1]:.2f} since, while the train "
    f"reward rose from {turn.train[0]:.2f} to {turn.train[1]:.2f} (means of "
    f"{turn.window} validations). What was learned since may only fool the "
    "reward model: stop earlier, or hold the policy closer to its start."
  )
