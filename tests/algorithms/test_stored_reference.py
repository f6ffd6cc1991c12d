"""A reference that was run before training gives the updates of a live one."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.dpo import train as dpo
from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.kto import evaluate as kto_evaluate
from jaxalign.algorithms.kto import train as kto
from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.config.sections import OptimizerConfig
from jaxalign.core.types import PairBatch
from jaxalign.parallel import mesh as meshes
from jaxalign.training import reference_cache
from jaxalign.training.run import fit

# Adam whose eps is as good as alone: a step is the gradient itself.
STEADY = OptimizerConfig(
  learning_rate=1e6, schedule="constant", eps=1e6, weight_decay=0.0
)
CHOSEN = [("ab", "cde"), ("c", "a"), ("def", "ab"), ("gh", "ca")]
REJECTED = [("ab", "f"), ("c", "gh"), ("def", "cdea"), ("gh", "b")]


def close(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def pairs(toy, micro):
  parts = [
    toy.text_batch(CHOSEN[i : i + micro] + REJECTED[i : i + micro], 8)
    for i in range(0, 4, micro)
  ]
  text = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  return PairBatch(
    text.tokens, text.position_ids, text.segment_ids, text.loss_mask
  )


def dpo_update(run):
  return dpo.make_update(run, run.config)


def labelled(toy, micro):
  others = [answer for _, answer in [*REJECTED[1:], REJECTED[0]]]
  crossed = [(p, a) for (p, _), a in zip(CHOSEN, others, strict=True)]
  return LabelledBatch(
    text=toy.text_batch(CHOSEN, 8, micro),
    desirable=np.array([1, 0, 1, 0], bool).reshape(-1, micro),
    group=np.array([0, 0, 1, 1]).reshape(-1, micro),
    mismatched=toy.text_batch(crossed, 8, micro),
  )


def on_host(tree):
  return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(
  ("make_update", "evaluator", "cfg", "make"),
  [
    (
      dpo_update,
      dpo.PairMetrics,
      DPOConfig(steps=2, optimizer=STEADY, beta=0.5),
      pairs,
    ),
    (
      kto.make_update,
      kto_evaluate.LabelledMetrics,
      KTOConfig(steps=2, optimizer=STEADY, beta=0.5),
      labelled,
    ),
  ],
  ids=["dpo", "kto"],
)
def test_updates_and_validation_are_those_of_a_live_reference(
  make_update, evaluator, cfg, make, toy
):
  """Steps of four micro-batches; the held-out rows are one batch."""
  model, reference = toy.build()
  _, other = toy.build(seed=1)
  params = jax.tree.map(lambda a, b: a + 0.3 * b, reference, other)
  batch, held = on_host(make(toy, 1)), on_host(make(toy, 4))
  # Computed in other batches than those of the steps.
  texts = [
    jax.tree.map(lambda x, m=m: x[m : m + 1], text)
    for text in reference_cache.texts_of(batch)
    for m in range(4)
  ]
  cache = reference_cache.precompute(
    model, reference, texts, meshes.make_mesh(), {}
  )

  def trained(batch, held, reference):
    run = toy.run(cfg, model, params, reference)
    run.evaluators.append(evaluator(run, [held]))
    fit(run, types.SimpleNamespace(batch=lambda step: batch), make_update(run))
    return run.recorder

  live = trained(batch, held, (model, reference))
  cached = trained(cache.attach(batch), cache.attach(held), None)
  close(cached.metrics, live.metrics)
  # Two steps of gradients that are no rounding.
  close(cached.states[-1].params, live.states[-1].params)
  moved = jax.tree.map(lambda a, b: a - b, params, live.states[-1].params)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved)) > 1e-2
  assert "eval_rewards/margins" in cached.metrics[-1]


def test_what_is_stored_counts_and_nothing_else(toy):
  """Numbers that are wrong show in the rewards; nothing else is looked at."""
  cfg = KTOConfig(steps=1, optimizer=STEADY, beta=0.5)
  model, params = toy.build()
  run = toy.run(cfg, model, params)
  batch = labelled(toy, 4)
  update = run.jit(kto.make_update(run))

  def rewards(shift):
    logps = jnp.full((1, 4), float(shift))
    texts = {
      name: dataclasses.replace(getattr(batch, name), reference_logps=logps)
      for name in ("text", "mismatched")
    }
    found = update(run.state, dataclasses.replace(batch, **texts), run.key)[1]
    return float(found["rewards/chosen"])

  assert rewards(-30) - rewards(-50) == pytest.approx(-0.5 * 20, rel=1e-5)
