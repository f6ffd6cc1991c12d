"""Reward models from comparisons, from scores, or from both.

Stiennon 2020 (eq. 1), Ouyang 2022 (§3.5): loss −log σ(s_w − s_l) over all
pairs that the completions of one prompt form, each encoded once. A scored
completion (`prompt, completion, reward`) can also be learned by regression,
which distils a larger reward model.

A comparison is two rows of one group with rewards 1 and 0; a group's scored
completions are compared wherever their rewards differ.

Where the rows say who judged them, each of those has a column of the score
head to itself: a row is scored by its own judge's, and is compared with rows of
the same judge alone. All columns read one trunk, so the loss is the sum that
it would be over one head.

Differs from SuperHF's released reward models: padding never enters a score.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredBatch
from jaxalign.core import gradients, losses
from jaxalign.core.types import Metrics, Params, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.training.run import Run, Update


def pair_loss(
  scores: Float[Array, " B"], batch: ScoredBatch, soft: bool = False
) -> tuple[Array, Bool[Array, "B B"]]:
  """−log σ(sᵢ − sⱼ − mᵢ) for every pair of a group with rewardᵢ > rewardⱼ.

  With `soft`, the rewards are another model's logits, and its σ(rᵢ − rⱼ) is
  the pair's label in place of 1: a near tie then teaches little.
  """
  # [B, B]: row i is better than row j, in one group, and neither is filler.
  pairs = batch.reward[:, None] > batch.reward[None, :]
  pairs &= batch.group[:, None] == batch.group[None, :]
  pairs &= batch.real[:, None] & batch.real[None, :]
  loss = losses.bradley_terry_loss(
    scores[:, None],
    scores[None, :],
    batch.margin[:, None],
    jax.nn.sigmoid(batch.reward[:, None] - batch.reward) if soft else 1.0,
  )
  return jnp.where(pairs, loss, 0), pairs


def score_rows(
  model: Model, params: Params, batch: ScoredBatch, key: Array | None = None
) -> Float[Array, "B G"]:
  """Scores of a `[B, T]` micro-batch by each of G heads.

  The short rows are computed apart. A key turns dropout on.
  """
  module = model.bind(params)
  texts = (batch.tokens, batch.mask, batch.types)
  if not batch.short:
    return module.scores(*texts, key)
  keys = (None, None) if key is None else jax.random.split(key)
  # The first rows hold nothing but padding from column `half` on.
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
  # No gather, because rows may be sharded over many devices.
  own = batch.head[:, None] == jnp.arange(scores.shape[1])
  return jnp.where(own, scores, 0).sum(axis=1)


def make_update(run: Run[RewardModelConfig]) -> Update:
  """The update on a `ScoredBatch` `[M, B, T]`."""
  config = run.config
  compare = config.loss in ("pairwise", "both")
  regress = config.loss in ("distill", "both")

  def update(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: ScoredBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    del reference
    # Pairs and rows of the whole batch, because the losses of its passes add
    # up. Which rows form pairs depends on their rewards, not on their scores.
    pairs = jax.vmap(lambda b: pair_loss(jnp.zeros_like(b.reward), b)[1])(batch)
    pair_count = jnp.maximum(pairs.sum(), 1)
    rows = jnp.maximum(batch.real.sum(), 1)

    def loss(params: Params, micro: ScoredBatch, key: Array):
      whole = lora.join(params, frozen)
      scores = own_score(score_rows(run.model, whole, micro, key), micro)
      # Both losses are measured, also one that is not trained on.
      nll, pairs = pair_loss(scores, micro, config.soft_labels)
      gap = scores[:, None] - scores[None, :]
      square = jnp.where(micro.real, (scores - micro.reward) ** 2, 0)
      off_centre = losses.reward_centering(scores[:, None], scores[None, :])
      off_centre = jnp.where(pairs, off_centre, 0).sum() / pair_count
      total = config.center_rewards_coefficient * off_centre
      if compare:
        total += nll.sum() / pair_count
      if regress:
        total += config.distill_weight * square.sum() / rows
      # Metrics: sums over pairs or rows, divided by the batch's counts.
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

    value, metrics, grads = gradients.accumulate(loss, state.params, batch, key)
    state, update_metrics = run.apply_gradients(state, grads, value)
    return state, update_metrics | metrics | {"loss/total": value}

  return update
