"""Train and held-out reward side by side, and where they part.

A policy learns what fools the reward model that chooses. The one that only
watches is fooled later or not at all: when it turns down while the other still
goes up, what is learned since is worth nothing. All of it is a function of the
lines of metrics.jsonl, so a resumed run says what an uninterrupted one says.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxalign.core.types import Metrics
from jaxalign.runtime.metrics import number

TRAIN, HELD_OUT = "score/mean", "test_score/mean"
RECENT = 5  # validations that `test_score/recent` is the mean of
_PART = 10  # a mean is over this part of the validations,
_LEAST = 5  # or over so many
_WINDOWS = 4  # as many of them make up the least that is judged
# How far the means have to lie apart, in standard errors. The best of many
# windows lies above the truth, and the question is asked after every
# validation: with 2 and 2 one run in six is called turned that is noise alone.
_FELL, _ROSE = 4.0, 2.0


class Validation(NamedTuple):
  """Both rewards after a step, means over its answers."""

  step: int
  train: float
  held_out: float


class Turn(NamedTuple):
  """The held-out reward's best time, and what came of it."""

  step: int  # the middle of the window in which it was best
  window: int  # validations that the means are over
  train: tuple[float, float]  # mean in that window and in the last one
  held_out: tuple[float, float]


def validations(rows: Iterable[Mapping[str, Any]]) -> list[Validation]:
  """The lines of metrics.jsonl that have both rewards, and finite ones."""
  found = []
  for row in rows:
    values = [number(row.get(name)) for name in (TRAIN, HELD_OUT)]
    train, held_out = (np.nan if v is None else v for v in values)
    if np.isfinite(train) and np.isfinite(held_out):
      found.append(Validation(row["step"], train, held_out))
  return found


def measure(seen: Sequence[Validation]) -> Metrics:
  """What the validations so far, at least one, add to the last one's line."""
  first, last = seen[0], seen[-1]
  rises = last.train - first.train, last.held_out - first.held_out
  recent = [v.held_out for v in seen[-RECENT:]]
  return {
    "score/gap": rises[0] - rises[1],
    "test_score/recent": sum(recent) / len(recent),
  }


def find_turn(seen: Sequence[Validation]) -> Turn | None:
  """Where the held-out reward turned while the train reward still rose.

  Means over windows of w = max(5, a tenth) validations in a row are compared,
  the last with that in which the held-out mean is highest. A turn: the
  held-out mean has fallen by 4 standard errors since, and the train mean has
  risen by 2. The standard error of a difference is σ √(2 / w), σ² half the
  mean squared step from one validation to the next, which a trend hardly
  enters.

  Returns:
    None where there is none, or there are fewer than 4 w validations.
  """
  w = max(_LEAST, len(seen) // _PART)
  if len(seen) < _WINDOWS * w:
    return None
  train, held_out = (
    np.array([getattr(v, name) for v in seen]) for name in ("train", "held_out")
  )
  means, errors = zip(*(_means(x, w) for x in (train, held_out)), strict=True)
  best = int(np.argmax(means[1][:-w]))
  rose = means[0][-1] - means[0][best]
  fell = means[1][best] - means[1][-1]
  if rose <= _ROSE * errors[0] or fell <= _FELL * errors[1]:
    return None
  then_and_now = ((float(m[best]), float(m[-1])) for m in means)
  return Turn(seen[best + w // 2].step, w, *then_and_now)


def _means(
  x: Float[np.ndarray, " T"], w: int
) -> tuple[Float[np.ndarray, " W"], float]:
  """Means of all windows, and the standard error of a difference of two."""
  sums = np.cumsum(np.concatenate([[0.0], x]))
  variance = np.mean(np.diff(x) ** 2) / 2
  return (sums[w:] - sums[:-w]) / w, float(np.sqrt(2 * variance / w))


def told(turn: Turn) -> str:
  """The turn in a sentence, for a log and a report."""
  train, held_out = (
    f"{then:.2f} to {now:.2f}" for then, now in (turn.train, turn.held_out)
  )
  return (
    f"The held-out reward turned near step {turn.step}: it fell from "
    f"{held_out} since, while the train reward rose from {train} (means of "
    f"{turn.window} validations). What was learned since may only fool the "
    "reward model: stop earlier, or hold the policy closer to its start."
  )
