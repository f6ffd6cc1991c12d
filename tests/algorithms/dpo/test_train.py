import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.dpo import train as dpo
from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.core.types import PairBatch
from jaxalign.models.layers import LoraConfig
from jaxalign.training.run import fit

# (prompt, chosen, rejected)
PAIRS = [("ab", "cde", "f"), ("c", "a", "gh"), ("def", "ab", "cdea")]
close = functools.partial(
  jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-5)
)


def config(**changes):
  optimizer = OptimizerConfig(
    learning_rate=0.02, schedule="constant", weight_decay=0.0
  )
  return DPOConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def pairs(toy, rows=PAIRS, width=8, micro=None):
  """`[M, 2B, T]`: within a micro-batch chosen first; None = a filler pair."""
  parts = []
  for start in range(0, len(rows), micro or len(rows)):
    part = rows[start : start + (micro or len(rows))]
    texts = [
      (row[0], row[side]) if row else ("", "")
      for side in (1, 2)
      for row in part
    ]
    text = toy.text_batch(texts, width)
    parts.append(
      PairBatch(
        text.tokens, text.position_ids, text.segment_ids, text.loss_mask
      )
    )
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def prepared(toy, cfg, seed=0):
  """A run whose policy has moved away from its reference."""
  model, reference = toy.build()
  _, other = toy.build(seed=seed + 1)
  params = jax.tree.map(lambda a, b: a + 0.3 * b, reference, other)
  return toy.run(cfg, model, params, reference=(model, reference))


def update_of(run, batch):
  """The state and the metrics after one update of a run."""
  return run.jit(dpo.make_update(run, run.config))(run.state, batch, run.key)


def updated(toy, cfg, batch):
  return update_of(prepared(toy, cfg), batch)


def by_hand(toy, run, params):
  """log π of each answer, one text and one token at a time, in float64."""
  found = {}
  for prompt, *answers in PAIRS:
    for answer in answers:
      ids = toy.ids(prompt + answer)
      logp = toy.log_softmax(run.model, params, ids)
      steps = range(len(prompt), len(ids))
      found[prompt, answer] = sum(float(logp[t - 1, ids[t]]) for t in steps)
  return found


@pytest.mark.parametrize(
  ("changes", "formula"),
  [
    ({}, lambda d, n: math.log1p(math.exp(-0.5 * d))),
    (
      {"label_smoothing": 0.2},
      lambda d, n: (
        0.8 * math.log1p(math.exp(-0.5 * d))
        + 0.2 * math.log1p(math.exp(0.5 * d))
      ),
    ),
    ({"loss": "hinge"}, lambda d, n: max(0.0, 1 - 0.5 * d)),
    ({"loss": "ipo"}, lambda d, n: (d - 1) ** 2),
    ({"loss": "ipo", "length_normalised": True}, lambda d, n: (n - 1) ** 2),
  ],
  ids=["sigmoid", "smoothed", "hinge", "ipo", "ipo of means"],
)
def test_the_first_update_by_hand(toy, changes, formula):
  cfg = config(beta=0.5, sft_coefficient=0.25, **changes)
  run = prepared(toy, cfg)
  _, found = updated(toy, cfg, pairs(toy))
  now, before = (
    by_hand(toy, run, p) for p in (run.state.params, run.reference[1])
  )
  ratio = {key: now[key] - before[key] for key in now}
  wanted = dict.fromkeys(("total", "chosen", "rejected", "right"), 0.0)
  for prompt, good, bad in PAIRS:
    d = ratio[prompt, good] - ratio[prompt, bad]
    n = ratio[prompt, good] / len(good) - ratio[prompt, bad] / len(bad)
    nll = -now[prompt, good] / len(good)
    wanted["total"] += (formula(d, n) + 0.25 * nll) / 3
    wanted["chosen"] += 0.5 * ratio[prompt, good] / 3
    wanted["rejected"] += 0.5 * ratio[prompt, bad] / 3
    wanted["right"] += (d > 0) / 3
  got = {
    "total": found["loss/total"],
    "chosen": found["rewards/chosen"],
    "rejected": found["rewards/rejected"],
    "right": found["rewards/accuracies"],
  }
  assert {k: float(v) for k, v in got.items()} == pytest.approx(
    wanted, rel=1e-4
  )
  np.testing.assert_allclose(
    found["rewards/margins"], wanted["chosen"] - wanted["rejected"], rtol=1e-3
  )
  assert int(found["num_tokens"]) == 3 + 1 + 1 + 2 + 2 + 4


def test_a_fresh_policy_is_its_reference(toy):
  """Loss ln 2, rewards 0, nothing in the right order."""
  model, params = toy.build()
  run = toy.run(config(), model, params, reference=(model, params))
  _, found = update_of(run, pairs(toy))
  np.testing.assert_allclose(found["loss/total"], math.log(2), rtol=1e-6)
  assert float(found["rewards/margins"]) == 0.0
  assert float(found["rewards/accuracies"]) == 0.0


@pytest.mark.parametrize(
  "other",
  [{"micro": 1}, {"width": 13}, {"rows": [*PAIRS, None, None]}],
  ids=["micro-batches", "padding", "fillers"],
)
def test_what_changes_no_update(toy, other):
  # Adam with a large eps: steps are proportional to gradients, so that one of
  # rounding alone (of a key's bias, say) stays as small as it is.
  optimizer = OptimizerConfig(
    learning_rate=1.0, schedule="constant", eps=1e3, weight_decay=0.0
  )
  cfg = config(sft_coefficient=0.5, optimizer=optimizer)
  whole, found = updated(toy, cfg, pairs(toy))
  cut, again = updated(toy, cfg, pairs(toy, **other))
  close(again, found)
  close(cut.params, whole.params)


def test_swapped_pairs_turn_the_signs(toy):
  turned = [(prompt, bad, good) for prompt, good, bad in PAIRS]
  _, found = updated(toy, config(), pairs(toy))
  _, other = updated(toy, config(), pairs(toy, turned))
  np.testing.assert_allclose(
    other["rewards/margins"], -found["rewards/margins"], rtol=1e-5
  )
  assert float(other["rewards/accuracies"]) == pytest.approx(
    1 - float(found["rewards/accuracies"])
  )


def test_adapters_are_compared_with_their_base(toy):
  """With B = 0 the policy is the base: ln 2; then the adapters alone move."""
  targets = ("dense", "embed_out")
  adapters = LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=targets)
  model, params = toy.build(adapters=adapters)
  params["blocks"]["dense"]["lora_b"] *= 0
  params["lm_head"]["lora_b"] *= 0
  run = toy.run(config(), model, params)
  run.reference = (model.without_lora(), run.frozen)
  state, found = update_of(run, pairs(toy))
  # No dropout either, or the two would differ.
  np.testing.assert_allclose(found["loss/total"], math.log(2), rtol=1e-6)
  for module in (state.params["blocks"]["dense"], state.params["lm_head"]):
    assert float(jnp.abs(module["lora_b"]).max()) > 1e-3


def test_run_learns_to_prefer(toy):
  """Answers with an "e" are preferred; held-out pairs follow."""
  rng = np.random.default_rng(0)

  def word(wanted):
    letters = list(rng.choice(list("abcd"), 2))
    letters.insert(rng.integers(3), "e" if wanted else "f")
    return "".join(letters)

  def comparisons(count):
    return [("gh", word(True), word(False)) for _ in range(count)]

  batches = [pairs(toy, comparisons(8)) for _ in range(4)]
  # The second held-out batch is filled up.
  held = [
    pairs(toy, comparisons(8)),
    pairs(toy, [*comparisons(3), *[None] * 5]),
  ]
  cfg = config(steps=30, validation_interval=15)
  model, params = toy.build()
  run = toy.run(cfg, model, params, reference=(model, params))
  run.evaluators.append(dpo.PairMetrics(run, held))
  data = types.SimpleNamespace(batch=lambda step: batches[step % 4])
  fit(run, data, dpo.make_update(run, cfg))
  log = run.recorder
  assert log.metrics[-1]["rewards/accuracies"] > 0.9
  assert log.metrics[-1]["eval_rewards/accuracies"] > 0.9
  at = [i + 1 for i, m in enumerate(log.metrics) if "eval_loss/total" in m]
  assert at == [15, 30]
  assert isinstance(batches[0], PairBatch)


def test_a_loss_below_zero_is_an_update(toy):
  """`robust` is unbounded below; only what is not finite is left out."""
  cfg = config(loss="robust", label_smoothing=0.4, beta=2.0)
  _, found = updated(toy, cfg, pairs(toy, PAIRS[:1]))
  turned = [(prompt, bad, good) for prompt, good, bad in PAIRS[:1]]
  ahead = PAIRS[:1] if found["rewards/margins"] > 0 else turned
  state, found = updated(toy, cfg, pairs(toy, ahead))
  assert float(found["loss/total"]) < 0
  assert int(state.skipped) == 0
