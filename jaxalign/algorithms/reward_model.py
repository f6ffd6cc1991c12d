"""Reward models from comparisons, from scores, or from both.

Stiennon 2020 (eq. 1), Ouyang 2022 (§3.5): loss −log σ(s_w − s_l) over all
pairs that the answers to one prompt form, each answer encoded once. A scored
answer (`prompt, completion, reward`) can also be learned by regression, which
distils a larger reward model.

A comparison is two rows of one group with rewards 1 and 0; a group's scored
answers are compared wherever their rewards differ.

Where the rows say who judged them, each of those has a column of the score
head to itself: a row is scored by its own judge's, and is compared with rows of
the same judge alone. All columns read one trunk, so the loss is the sum that
it would be over one head.

Differs from SuperHF's released reward models: padding never enters a score.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core import gradients, losses, optim
from jaxalign.core.types import Metrics, Params, TrainState
from jaxalign.models import lora
from jaxalign.runtime.context import Context, Task, fit

MOST = 100  # answers of one group whose pairs are judged


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredBatch:
  """Answers with the rewards they should get, the shorter ones first."""

  tokens: Int[Array, "*M B T"]
  mask: Bool[Array, "*M B T"]  # True = a real token
  types: Int[Array, "*M B T"]  # 0 = prompt, 1 = answer, with `pair` encoding
  reward: Float[Array, "*M B"]  # target; only its order counts in pairs
  margin: Float[Array, "*M B"]  # by how much a chosen answer should win
  group: Int[Array, "*M B"]  # answers to one prompt carry one number
  chars: Int[Array, "*M B"]  # length of the answer in characters
  real: Bool[Array, "*M B"]  # True = a row, False = filler
  # Whose judgement it is: a column of the score head; None = it has one.
  head: Int[Array, "*M B"] | None = None
  # Rows that end before column `half`; only so much of them is computed.
  short: int = dataclasses.field(default=0, metadata={"static": True})
  half: int = dataclasses.field(default=0, metadata={"static": True})


def pair_loss(
  scores: Float[Array, " B"], batch: ScoredBatch, soft: bool = False
) -> tuple[Array, Bool[Array, "B B"]]:
  """−log σ(sᵢ − sⱼ − mᵢ) for every pair of a group with rewardᵢ > rewardⱼ.

  With `soft`, the rewards are another model's logits, and its σ(rᵢ − rⱼ) is
  the pair's label in place of 1: a near tie then teaches little.
  """
  pairs = batch.reward[:, None] > batch.reward[None, :]
  pairs &= batch.group[:, None] == batch.group[None, :]
  pairs &= batch.real[:, None] & batch.real[None, :]
  loss = losses.pairwise(
    scores[:, None],
    scores[None, :],
    batch.margin[:, None],
    jax.nn.sigmoid(batch.reward[:, None] - batch.reward) if soft else 1.0,
  )
  return jnp.where(pairs, loss, 0), pairs


def score_rows(
  module: Any, batch: ScoredBatch, key: Array | None = None
) -> Float[Array, "B G"]:
  """Scores of a batch without its micro axis, the short rows computed apart.

  A key turns dropout on.
  """
  texts = (batch.tokens, batch.mask, batch.types)
  if not batch.short:
    return module.scores(*texts, key)
  keys = (None, None) if key is None else jax.random.split(key)
  near = [x[: batch.short, : batch.half] for x in texts]
  far = [x[batch.short :] for x in texts]
  return jnp.concatenate(
    [module.scores(*near, keys[0]), module.scores(*far, keys[1])]
  )


def own_score(
  scores: Float[Array, "B G"], batch: ScoredBatch
) -> Float[Array, " B"]:
  """Each row's score by the head of who judged it."""
  if batch.head is None:
    return scores[:, 0]
  # No gather: rows may lie on many devices.
  own = batch.head[:, None] == jnp.arange(scores.shape[1])
  return jnp.where(own, scores, 0).sum(axis=1)


def make_update(
  ctx: Context,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The update `(state, frozen, batch, key) -> (state, metrics)`."""
  config = ctx.config
  compare = config.loss in ("pairwise", "both")
  regress = config.loss in ("distill", "both")

  def update(
    state: TrainState, frozen: Params, batch: ScoredBatch, key: Array
  ) -> tuple[TrainState, Metrics]:
    pair_count, rows = _counts(batch)

    def loss(params, micro, key):
      module = ctx.model.bind(lora.join(params, frozen))
      scores = own_score(score_rows(module, micro, key), micro)
      nll, pairs = pair_loss(scores, micro, config.soft_labels)
      gap = scores[:, None] - scores[None, :]
      square = jnp.where(micro.real, (scores - micro.reward) ** 2, 0)
      together = jnp.where(
        pairs, losses.centring(scores[:, None], scores[None, :]), 0
      )
      total = config.centring * together.sum() / pair_count
      if compare:
        total += nll.sum() / pair_count
      if regress:
        total += config.distill_weight * square.sum() / rows
      better = jnp.where(pairs, scores[:, None], 0).sum()
      worse = jnp.where(pairs, scores[None, :], 0).sum()
      return total, {
        "accuracy": (pairs & (gap > 0)).sum() / pair_count,
        "margin": jnp.where(pairs, gap, 0).sum() / pair_count,
        "rewards/chosen": better / pair_count,
        "rewards/rejected": worse / pair_count,
        "mean_reward": jnp.where(micro.real, scores, 0).sum() / rows,
        "loss/pairwise": nll.sum() / pair_count,
        "loss/distill": square.sum() / rows,
      }

    value, found, grads = gradients.accumulate(loss, state.params, batch, key)
    state, metrics = optim.train_step(
      state, grads, value, rate, optimizer, config.optimizer.ema
    )
    return state, metrics | found | {"loss/total": value}

  return update


def _counts(batch: ScoredBatch) -> tuple[Array, Array]:
  """Pairs and rows of the whole batch, at least 1 each."""
  pairs = jax.vmap(lambda b: pair_loss(jnp.zeros_like(b.reward), b)[1])(batch)
  return jnp.maximum(pairs.sum(), 1), jnp.maximum(batch.real.sum(), 1)


def run(
  ctx: Context,
  task: Task,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Trains for the config's steps; validates at its interval and at the end."""
  update = ctx.compile(make_update(ctx, optimizer, rate))
  validate = make_validate(ctx, task.validation) if task.validation else None
  return fit(ctx, task.batch, update, validate)


def make_validate(
  ctx: Context, batches: tuple[ScoredBatch, ...]
) -> Callable[[TrainState], Metrics]:
  """Agreement over held-out pairs, by group where there are groups.

  See `agreement` and `agreement_by_group`.
  """
  names = ctx.model.config.groups

  @jax.jit
  def score(params, frozen, batch):
    module = ctx.model.bind(lora.join(params, frozen))
    return score_rows(module, jax.tree.map(lambda x: x[0], batch))

  def validate(state: TrainState) -> Metrics:
    scores = [score(state.result, ctx.frozen, ctx.put(b, 1)) for b in batches]
    whole = lambda name: np.concatenate([getattr(b, name)[0] for b in batches])
    real = whole("real")
    found = np.concatenate(jax.device_get(scores))[real]
    columns = [whole(name)[real] for name in ("reward", "group", "chars")]
    if names:
      values = agreement_by_group(names, found, whole("head")[real], *columns)
    else:
      values = agreement(found[:, 0], *columns)
    return {f"eval_{k}": v for k, v in values.items()}

  return validate


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
  order = np.lexsort((rng.random(len(group)), group))
  ends = np.flatnonzero(np.diff(group[order])) + 1
  better, worse, weight = [], [], []
  for rows in np.split(order, ends):
    rows = rows[:MOST]
    first, second = rows[np.stack(np.triu_indices(len(rows), 1))]
    lead = reward[first] - reward[second]
    better.append(np.where(lead > 0, first, second)[lead != 0])
    worse.append(np.where(lead > 0, second, first)[lead != 0])
    count = len(better[-1])
    weight.append(np.full(count, 1 / max(count, 1)))
  better, worse, weight = map(np.concatenate, (better, worse, weight))
  right = scores[better] > scores[worse]
  longer = chars[better] > chars[worse]

  def mean(x, among=True):
    share = np.where(among, weight, 0)
    return float(x @ share / share.sum()) if share.any() else float("nan")

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
