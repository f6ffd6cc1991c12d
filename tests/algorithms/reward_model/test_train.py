import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.reward_model import train as reward_model
from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredBatch
from jaxalign.algorithms.reward_model.evaluate import Agreement
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models.layers import LoraConfig
from jaxalign.training.run import fit

LN2 = math.log(2)


def scored(toy, rows, width=6, micro=None):
  """(text, reward, group[, margin]) as `[M, B, T]`; text None = filler."""
  tokens = np.zeros((len(rows), width), np.int32)
  mask = np.zeros((len(rows), width), bool)
  for b, row in enumerate(rows):
    ids = toy.ids(row[0] or "a")
    tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True

  def cut(x):
    return jnp.asarray(x).reshape(-1, micro or len(rows), *x.shape[1:])

  return ScoredBatch(
    tokens=cut(tokens),
    mask=cut(mask),
    types=cut(np.zeros_like(tokens)),
    reward=cut(np.array([r[1] for r in rows], np.float32)),
    margin=cut(np.array([r[3] if len(r) > 3 else 0 for r in rows], np.float32)),
    group=cut(np.array([r[2] for r in rows], np.int32)),
    chars=cut(np.array([len(r[0] or "") for r in rows], np.int32)),
    real=cut(np.array([r[0] is not None for r in rows])),
  )


def first(batch):
  return jax.tree.map(lambda x: x[0], batch)


def config(**changes):
  optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant")
  return RewardModelConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def updated(toy, cfg, *batches, seed=0):
  """State and metrics after one update from the same start, for each batch."""
  model, params = toy.build("score_last", seed=seed)
  run = toy.run(cfg, model, params)
  update = run.jit(reward_model.make_update(run))
  return [update(run.state, batch, run.key) for batch in batches]


def scores_of(toy, batch, seed=0):
  model, params = toy.build("score_last", seed=seed)
  one = first(batch)
  score = jax.jit(lambda p, t, m: model.bind(p).score(t, m))
  return np.asarray(score(params, one.tokens, one.mask), np.float64)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_pairs_of_a_group(toy, wrap):
  """Group 0 has rewards 2, 1, 1, group 1 has 0 and 5: pairs 0>1, 0>2, 4>3.

  Scores 1, 1, 1 − ln 3 | 0, ln 3: −log σ(0) = ln 2, −log σ(ln 3) = ln 4/3,
  −log σ(ln 3) = ln 4/3. The equal rewards of 1 and 2 make no pair.
  """
  rows = [("a", 2, 0), ("b", 1, 0), ("c", 1, 0), ("d", 0, 1), ("e", 5, 1)]
  batch = first(scored(toy, rows))
  scores = jnp.array([1.0, 1.0, 1 - math.log(3), 0.0, math.log(3)])
  loss, pairs = wrap(reward_model.pair_loss)(scores, batch)
  assert np.argwhere(pairs).tolist() == [[0, 1], [0, 2], [4, 3]]
  found = np.asarray(loss)[np.asarray(pairs)]
  np.testing.assert_allclose(
    found, [LN2, math.log(4 / 3), math.log(4 / 3)], rtol=1e-5
  )
  np.testing.assert_allclose(loss.sum(), LN2 + 2 * math.log(4 / 3), rtol=1e-5)


def test_margin_is_the_better_answers(toy):
  """The chosen row asks for a lead of 1 and has one: ln 2."""
  batch = first(scored(toy, [("a", 1, 0, 1.0), ("b", 0, 0, 0.0)]))
  loss, _ = reward_model.pair_loss(jnp.array([3.0, 2.0]), batch)
  np.testing.assert_allclose(loss[0, 1], LN2, rtol=1e-6)


def test_fillers_form_no_pairs(toy):
  batch = first(scored(toy, [("a", 1, 0), (None, 0, 0), ("b", 1, 1)]))
  loss, pairs = reward_model.pair_loss(jnp.array([0.0, 9.0, 9.0]), batch)
  assert not pairs.any()
  assert float(loss.sum()) == 0.0


ROWS = [("abc", 1, 0), ("de", 0, 0), ("fghij", 0, 1), ("k", 1, 1)]


def test_metrics_by_hand(toy):
  """Two pairs: rows 0 > 1 and 3 > 2, from the model's own scores."""
  batch = scored(toy, ROWS)
  s = scores_of(toy, batch)
  ((_, found),) = updated(toy, config(center_rewards_coefficient=0.5), batch)
  leads = np.array([s[0] - s[1], s[3] - s[2]])
  nll = np.log1p(np.exp(-leads)).mean()
  sums = np.array([s[0] + s[1], s[3] + s[2]])
  wanted = {
    "loss/pairwise": nll,
    "loss/total": nll + 0.5 * (sums**2).mean(),
    "accuracy": (leads > 0).mean(),
    "margin": leads.mean(),
    "rewards/chosen": (s[0] + s[3]) / 2,
    "rewards/rejected": (s[1] + s[2]) / 2,
    "mean_reward": s.mean(),
  }
  assert {k: float(found[k]) for k in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
  ("loss", "weights", "label"),
  [
    ("distill", (0, 0.25), 1),
    ("both", (1, 0.25), 1),
    ("both", (1, 0.25), 1 / (1 + math.exp(-1))),
  ],
  ids=["distill", "both", "both-soft"],
)
def test_distillation_by_hand(toy, loss, weights, label):
  """0.25 · mean (s − r)² over the real rows, plus the pairs with `both`.

  A soft label is σ(1 − 0), the probability that the better one is better.
  """
  rows = [*ROWS, (None, 7.0, 9)]
  batch = scored(toy, rows)
  s = scores_of(toy, batch)[:4]
  cfg = config(loss=loss, distill_weight=0.25, soft_labels=label < 1)
  ((_, found),) = updated(toy, cfg, batch)
  square = ((s - np.array([1, 0, 0, 1])) ** 2).mean()
  leads = np.array([s[0] - s[1], s[3] - s[2]])
  nll = np.log1p(np.exp(-leads)) * label + np.log1p(np.exp(leads)) * (1 - label)
  np.testing.assert_allclose(found["loss/distill"], square, rtol=1e-4)
  np.testing.assert_allclose(
    found["loss/total"],
    weights[0] * nll.mean() + weights[1] * square,
    rtol=1e-4,
  )


def test_micro_batches_padding_and_fillers_change_no_update(toy):
  """Groups stay whole; the mean is over all pairs, 1 + 3 of two groups."""
  rows = [
    *(("abc", 1, 0), ("de", 0, 0), (None, 0, 5)),
    *(("fghij", 3, 1), ("k", 2, 1), ("ll", 1, 1)),
  ]
  cfg = config(
    center_rewards_coefficient=0.1,
    optimizer=OptimizerConfig(
      learning_rate=1.0, schedule="constant", eps=1e3, weight_decay=0.0
    ),
  )
  whole, cut, wide = updated(
    toy,
    cfg,
    scored(toy, [r for r in rows if r[0]]),
    scored(toy, rows, micro=3),
    scored(toy, rows, width=9),
  )
  for other in (cut, wide):
    for name in ("loss/total", "accuracy", "margin", "mean_reward"):
      np.testing.assert_allclose(other[1][name], whole[1][name], rtol=1e-4)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6),
      other[0].params,
      whole[0].params,
    )


def test_adapters_drop_in_training_alone(toy):
  """With B = 0 dropout changes no score and no loss, but B's gradient."""
  adapters = LoraConfig(2, 2.0, dropout=0.5, targets=("dense",))
  batch, found = scored(toy, ROWS), []
  for rate in (0.0, 0.5):
    model, params = toy.build(
      "score_last", dataclasses.replace(adapters, dropout=rate)
    )
    params["blocks"]["dense"]["lora_b"] *= 0
    run = toy.run(config(), model, params)
    update = run.jit(reward_model.make_update(run))
    found.append(update(run.state, batch, run.key))
  (plain, metrics), (dropped, others) = found
  assert float(metrics["loss/total"]) == float(others["loss/total"])
  b = [x.params["blocks"]["dense"]["lora_b"] for x in (plain, dropped)]
  assert not np.array_equal(*b)


def test_run_learns_to_prefer(toy):
  """Texts with an "e" are the better ones; pairs not seen agree as well."""
  rng = np.random.default_rng(0)

  def word(wanted):
    letters = list(rng.choice(list("abcdfgh"), rng.integers(2, 5)))
    letters.insert(rng.integers(len(letters) + 1), "e" if wanted else "i")
    return "".join(letters)

  def comparisons(count):
    return [(word(1 - k % 2), 1 - k % 2, k // 2) for k in range(2 * count)]

  batches = [scored(toy, comparisons(16)) for _ in range(4)]
  held = [scored(toy, comparisons(16)) for _ in range(2)]
  # Two held-out batches count their prompts on, as one data set does.
  held[1] = dataclasses.replace(held[1], group=held[1].group + 99)
  cfg = config(steps=40, validation_interval=25)
  model, params = toy.build("score_mean")
  run = toy.run(cfg, model, params)
  run.evaluators.append(Agreement(run, held))
  data = types.SimpleNamespace(batch=lambda step: batches[step % 4])
  state = fit(run, data, reward_model.make_update(run))
  log = run.recorder
  assert int(state.step) == len(log.states) == 40
  at = [i + 1 for i, m in enumerate(log.metrics) if "eval_accuracy" in m]
  assert at == [25, 40]
  assert log.metrics[-1]["eval_pairs"] == 32
  assert log.metrics[-1]["eval_accuracy"] > 0.9
  assert float(log.metrics[-1]["accuracy"]) > 0.9
  assert float(log.metrics[-1]["loss/total"]) < 0.3


def test_soft_labels_are_the_teachers_odds(toy):
  """p = σ(2 − 1); the best gap is the teacher's own, 1."""
  batch = first(scored(toy, [("a", 2.0, 0), ("b", 1.0, 0)]))

  def at(gap):
    return reward_model.pair_loss(jnp.array([gap, 0.0]), batch, True)

  p = 1 / (1 + math.exp(-1))
  by_hand = p * math.log1p(math.exp(-3)) + (1 - p) * math.log1p(math.exp(3))
  assert float(at(3.0)[0].sum()) == pytest.approx(by_hand, rel=1e-5)
  slope = jax.grad(lambda gap: at(gap)[0].sum())
  assert float(slope(1.0)) == pytest.approx(0, abs=1e-6)


def test_short_rows_at_half_the_width_get_the_same_update(toy):
  rows = [("ab", 1.0, 0), ("ba", 0.0, 0), ("abca", 2.0, 1), ("aacbac", 1.0, 1)]
  whole = scored(toy, rows)
  parted = dataclasses.replace(whole, short=2, half=3)
  # Plain sums of gradients: Adam would blow rounding up to the sign.
  plain = OptimizerConfig(learning_rate=1.0, schedule="constant", eps=1e3)
  cfg = config(loss="both", optimizer=plain)
  (a, found), (b, again) = updated(toy, cfg, whole, parted)
  for name, value in found.items():
    np.testing.assert_allclose(value, again[name], rtol=1e-5, err_msg=name)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    a.params,
    b.params,
  )
