"""How often a reward model agrees with the people who judged held-out rows."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredBatch
from jaxalign.algorithms.reward_model.train import score_rows
from jaxalign.core.types import Metrics, Params
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program, largest
from jaxalign.training.run import Run

MOST = 100  # completions of one group whose pairs are compared


class Agreement:
  """An evaluator over held-out numpy rows `[1, B, T]`: agreement, by group."""

  name = "agreement"

  def __init__(
    self, run: Run[RewardModelConfig], batches: Sequence[ScoredBatch]
  ):
    self.every = run.config.validation_interval
    self._run, self._batches = run, batches

    def score(params: Params, batch: ScoredBatch):
      return score_rows(run.model, params, jax.tree.map(lambda x: x[0], batch))

    # Replicated, so that every host can read all scores.
    whole = meshes.replicated(run.mesh)
    self._score = meshes.jit(score, run.mesh, out_shardings=whole)

  def programs(self, params: Params) -> list[Program]:
    """The scores of the largest batch."""
    batch = meshes.row_shapes(largest(self._batches), self._run.mesh)
    return [Program("score", self._score, (params, batch), len(self._batches))]

  def __call__(self, params: Params, step: int) -> Metrics:
    """See `agreement` and `agreement_by_group`; names begin with `eval_`."""
    del step
    put = self._run.put
    scores = [self._score(params, put(b)) for b in self._batches]

    def column(name: str) -> np.ndarray:
      return np.concatenate([getattr(b, name)[0] for b in self._batches])

    # Filler rows are left out of every column.
    real = column("real")
    found = np.concatenate(jax.device_get(scores))[real]
    columns = [column(name)[real] for name in ("reward", "group", "chars")]
    groups = self._run.model.config.groups
    if groups:
      head = column("head")[real]
      values = agreement_by_group(groups, found, head, *columns)
    else:
      values = agreement(found[:, 0], *columns)
    return {f"eval_{name}": value for name, value in values.items()}


def agreement(
  scores: Float[np.ndarray, " B"],
  reward: Float[np.ndarray, " B"],
  group: Int[np.ndarray, " B"],
  chars: Int[np.ndarray, " B"],
) -> Metrics:
  """How often scores order two answers to one prompt as the rewards do.

  All pairs of a group's answers count, those of equal reward aside; of more
  than 100 answers, those of 100 drawn at random. Every group weighs the same,
  however many answers it has: a prompt with hundreds would otherwise stand for
  thousands of pairs, one with two for a single one. A group is a prompt, or a
  comparison where the data are comparisons.

  Returns:
    `accuracy`; `accuracy_if_longer` and `accuracy_if_shorter`, of the pairs
    whose better answer is the longer or the shorter one;
    `accuracy_longer_wins`, of always taking the longer one, the baseline that
    a reward model has to beat; `margin`, better less worse; `pairs`, their
    number; `mean_reward`, the mean score.
  """
  rng = np.random.default_rng(0)
  # Groups one after another, the rows of each in random order.
  order = np.lexsort((rng.random(len(group)), group))
  ends = np.flatnonzero(np.diff(group[order])) + 1
  better, worse, weight = [], [], []
  for rows in np.split(order, ends):
    rows = rows[:MOST]
    # Every pair of rows once; equal rewards are no pair.
    first, second = rows[np.stack(np.triu_indices(len(rows), 1))]
    lead = reward[first] - reward[second]
    better.append(np.where(lead > 0, first, second)[lead != 0])
    worse.append(np.where(lead > 0, second, first)[lead != 0])
    # The pairs of a group weigh 1 together.
    count = len(better[-1])
    weight.append(np.full(count, 1 / max(count, 1)))
  better, worse, weight = map(np.concatenate, (better, worse, weight))
  right = scores[better] > scores[worse]
  longer = chars[better] > chars[worse]

  # Weighted means over some of the pairs; NaN where there are none.
  def mean(x, among=True):
    share = np.where(among, weight, 0)
    # Both sums in the same order, so that the mean of ones is 1.
    total = (x * share).sum()
    return float(total / share.sum()) if share.any() else float("nan")

  return {
    "accuracy": mean(right),
    "accuracy_if_longer": mean(right, longer),
    "accuracy_if_shorter": mean(right, ~longer),
    "accuracy_longer_wins": mean(longer),
    "margin": mean(scores[better] - scores[worse]),
    "pairs": len(right),
    "mean_reward": float(scores.mean()),
  }


def agreement_by_group(
  names: Sequence[str],
  scores: Float[np.ndarray, "B G"],
  head: Int[np.ndarray, " B"],
  *columns: np.ndarray,
) -> Metrics:
  """`agreement` of each row's own head with it, of all rows and by group.

  Args:
    names: of the G groups.
    scores: of each row by every head.
    head: whose judgement a row is.
    *columns: reward, group and chars, as in `agreement`.

  Returns:
    What `agreement` gives; `accuracy_mean`, of the equally weighted mean of
    all heads; for each group that has rows `accuracy/NAME`, `pairs/NAME` and
    `accuracy_mean/NAME`, which is below the first by what it loses where
    people are averaged.
  """
  # All rows, then those of each group.
  own, mean = scores[np.arange(len(head)), head], scores.mean(axis=1)
  found = agreement(own, *columns)
  found["accuracy_mean"] = agreement(mean, *columns)["accuracy"]
  for index, name in enumerate(names):
    rows = head == index
    if rows.any():
      its = [x[rows] for x in columns]
      alone = agreement(own[rows], *its)
      found[f"accuracy/{name}"] = alone["accuracy"]
      found[f"pairs/{name}"] = alone["pairs"]
      averaged = agreement(mean[rows], *its)
      found[f"accuracy_mean/{name}"] = averaged["accuracy"]
  return found
