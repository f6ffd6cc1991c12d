"""A head for each group: what it learns, what it leaves alone, by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.reward_model import train as reward_model
from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredBatch
from jaxalign.algorithms.reward_model.evaluate import (
  agreement_by_group,
)
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models import groups

LN2 = math.log(2)
NAMES = ("plain", "fancy")


def scored(toy, rows, width=6):
  """(text, reward, number, head) as `[1, B, T]`; head None = there is one."""
  tokens = np.zeros((len(rows), width), np.int32)
  for b, row in enumerate(rows):
    tokens[b, : len(row[0])] = toy.ids(row[0])

  def column(i, kind):
    return jnp.asarray([[row[i] for row in rows]], kind)

  return ScoredBatch(
    tokens=jnp.asarray(tokens)[None],
    mask=jnp.asarray(tokens > 0)[None],
    types=jnp.zeros((1, *tokens.shape), jnp.int32),
    reward=column(1, jnp.float32),
    margin=jnp.zeros((1, len(rows))),
    group=column(2, jnp.int32),
    chars=jnp.asarray([[len(row[0]) for row in rows]]),
    real=jnp.ones((1, len(rows)), bool),
    head=None if rows[0][3] is None else column(3, jnp.int32),
  )


def first(batch):
  return jax.tree.map(lambda x: x[0], batch)


def with_heads(toy, count=2, seed=0):
  model, params = toy.build("score_last", seed=seed)
  names = tuple(map(str, range(count)))
  return model.replace(groups=names), groups.widen(params, count, seed)


def config(**changes):
  optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant")
  return RewardModelConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def updated(toy, cfg, model, params, batch):
  run = toy.run(cfg, model, params)
  return run.jit(reward_model.make_update(run))(run.state, batch, run.key)


def test_each_row_is_scored_by_its_own_head(toy):
  """Heads give (3, 0), (1, 5), (2, 7), (9, 2); rows 0, 1 are head 0's.

  Own scores 3, 1 | 7, 2, so leads of 2 and of −5 (row 3 is the better one):
  −log σ(2) = log(1 + e⁻²), −log σ(−5) = log(1 + e⁵).
  """
  rows = [("a", 1, 0, 0), ("b", 0, 0, 0), ("a", 0, 1, 1), ("b", 1, 1, 1)]
  batch = first(scored(toy, rows))
  scores = jnp.array([[3.0, 0], [1, 5], [2, 7], [9, 2]])
  own = reward_model.own_score(scores, batch)
  assert own.tolist() == [3, 1, 7, 2]
  loss, pairs = reward_model.pair_loss(own, batch)
  assert np.argwhere(pairs).tolist() == [[0, 1], [3, 2]]
  wanted = [math.log1p(math.exp(-2)), math.log1p(math.exp(5))]
  np.testing.assert_allclose(loss[pairs], wanted, rtol=1e-5)


def test_one_group_of_rows_leaves_the_other_head_alone(toy):
  """Its gradient is 0 to the last bit; the trunk's and the own head's not."""
  model, params = with_heads(toy)
  batch = first(
    scored(toy, [("abc", 1, 0, 0), ("de", 0, 0, 0), ("e", 2, 0, 0)])
  )

  def loss(params):
    scores = reward_model.score_rows(model, params, batch)
    own = reward_model.own_score(scores, batch)
    return reward_model.pair_loss(own, batch)[0].sum() + (own**2).sum()

  found = jax.jit(jax.grad(loss))(params)
  head = np.asarray(found["score_head"]["kernel"])
  assert np.abs(head[:, 0]).min() > 0
  assert not head[:, 1].any()
  assert np.asarray(found["blocks"]["dense"]["kernel"]).any()


@pytest.mark.parametrize("loss", ["pairwise", "distill", "both"])
def test_one_head_for_all_rows_is_the_model_without_groups(loss, toy):
  """The same update to the last bit but for the column nobody asks for."""
  rows = [("abc", 1, 0), ("de", 0, 0), ("fghij", 0, 1), ("k", 2, 1)]
  model, params = toy.build("score_last")
  cfg = config(loss=loss, center_rewards_coefficient=0.1)
  plain = scored(toy, [(*row, None) for row in rows])
  state, metrics = updated(toy, cfg, model, params, plain)
  own = groups.widen(params, 1, 0)["score_head"]["kernel"]
  both = jnp.concatenate([params["score_head"]["kernel"], own], axis=1)
  wide = params | {"score_head": {"kernel": both}}
  several, found = updated(
    toy,
    cfg,
    model.replace(groups=NAMES),
    wide,
    scored(toy, [(*row, 0) for row in rows]),
  )
  for name in ("loss/total", "accuracy", "margin", "mean_reward"):
    np.testing.assert_allclose(found[name], metrics[name], rtol=1e-6)
  new = several.params["score_head"]["kernel"]
  np.testing.assert_allclose(
    new[:, :1], state.params["score_head"]["kernel"], atol=1e-5
  )


def test_short_rows_apart_keep_their_heads(toy):
  model, params = with_heads(toy)
  rows = [
    ("ab", 1, 0, 1),
    ("ba", 0, 0, 1),
    ("abca", 2, 1, 0),
    ("aacb", 1, 1, 0),
  ]
  batch = first(scored(toy, rows))
  cut = dataclasses.replace(batch, short=2, half=3)
  score = jax.jit(
    lambda p, b: reward_model.own_score(reward_model.score_rows(model, p, b), b)
  )
  np.testing.assert_allclose(
    score(params, cut), score(params, batch), atol=1e-6
  )


def test_agreement_by_group_by_hand():
  """Two groups, three comparisons; own head, then the mean of both heads.

  head 0: 4 > 1 right, mean (4 + 0)/2 = 2 > (1 + 1)/2 = 1 right
  head 0: 2 > 1 right, mean (2 + 0)/2 = 1 < (1 + 3)/2 = 2 wrong
  head 1: 1 < 5 wrong, mean (3 + 1)/2 = 2 < (1 + 5)/2 = 3 wrong
  """
  scores = np.array(
    [[4, 0], [1, 1], [2, 0], [1, 3], [3, 1], [1, 5]], np.float32
  )
  found = agreement_by_group(
    ("alice", "bob", "nobody"),
    scores,
    np.array([0, 0, 0, 0, 1, 1]),
    np.array([1, 0, 1, 0, 1, 0], np.float32),
    np.array([0, 0, 1, 1, 2, 2]),
    np.array([9, 5, 2, 5, 7, 3]),
  )
  assert found["accuracy"] == pytest.approx(2 / 3)
  assert found["accuracy_mean"] == pytest.approx(1 / 3)
  assert found["pairs"] == 3
  by_group = {name: x for name, x in found.items() if "/" in name}
  assert by_group == {
    "accuracy/alice": 1.0,
    "pairs/alice": 2,
    "accuracy_mean/alice": 0.5,
    "accuracy/bob": 0.0,
    "pairs/bob": 1,
    "accuracy_mean/bob": 0.0,
  }
