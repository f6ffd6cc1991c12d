"""A reference that was run before training gives the updates of a live one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms import dpo, kto
from jaxalign.config import DPOConfig, KTOConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.runtime import stored
from jaxalign.runtime.context import Task

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
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def labelled(toy, micro):
  others = [answer for _, answer in [*REJECTED[1:], REJECTED[0]]]
  crossed = [(p, a) for (p, _), a in zip(CHOSEN, others, strict=True)]
  return kto.LabelledBatch(
    text=toy.text_batch(CHOSEN, 8, micro),
    desirable=np.array([1, 0, 1, 0], bool).reshape(-1, micro),
    group=np.array([0, 0, 1, 1]).reshape(-1, micro),
    mismatched=toy.text_batch(crossed, 8, micro),
  )


@pytest.mark.parametrize("micro", [4, 1], ids=["whole", "micro-batches"])
@pytest.mark.parametrize(
  ("algorithm", "cfg", "make"),
  [
    (dpo, DPOConfig(steps=2, optimizer=STEADY, beta=0.5), pairs),
    (kto, KTOConfig(steps=2, optimizer=STEADY, beta=0.5), labelled),
  ],
  ids=["dpo", "kto"],
)
def test_updates_and_validation_are_those_of_a_live_reference(
  algorithm, cfg, make, micro, toy
):
  model, prior = toy.build()
  _, other = toy.build(seed=1)
  params = jax.tree.map(lambda a, b: a + 0.3 * b, prior, other)
  batch, held = make(toy, micro), make(toy, 4)
  put = lambda tree, axis: jax.tree.map(jnp.asarray, tree)
  # Measured in other batches than those of the steps.
  texts = [
    jax.tree.map(lambda x, m=m: np.asarray(x[m : m + 1]), text)
    for text in stored.texts_of(batch)
    for m in range(4 // micro)
  ]
  found = stored.measure(model, prior, texts, put)

  def trained(task, prior):
    ctx, log = toy.context(cfg, model, params, prior)
    algorithm.run(ctx, task, toy.optimizer(cfg), toy.rate(cfg))
    return log

  live = trained(Task(lambda step: batch, (held,)), (model, prior))
  attach = lambda tree: stored.attach(found, tree)
  task = Task(lambda step: attach(batch), (attach(held),))
  from_store = trained(task, None)
  close(from_store.metrics, live.metrics)
  # Two steps of gradients that are no rounding.
  close(from_store.states[-1].params, live.states[-1].params)
  moved = jax.tree.map(lambda a, b: a - b, params, live.states[-1].params)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved)) > 1e-2
  assert "eval_rewards/margins" in from_store.metrics[-1]


def test_what_is_stored_counts_and_nothing_else(toy):
  """Numbers that are wrong show in the rewards; the prior is not looked at."""
  cfg = KTOConfig(steps=1, optimizer=STEADY, beta=0.5)
  model, params = toy.build()
  ctx, _ = toy.context(cfg, model, params)
  batch = labelled(toy, 4)
  update = jax.jit(kto.make_update(ctx, toy.optimizer(cfg), toy.rate(cfg)))

  def rewards(shift):
    logps = jnp.full((1, 4), float(shift))
    texts = {
      name: dataclasses.replace(getattr(batch, name), reference_logps=logps)
      for name in ("text", "mismatched")
    }
    found = update(
      ctx.state, {}, {}, dataclasses.replace(batch, **texts), ctx.key
    )[1]
    return float(found["rewards/chosen"])

  assert rewards(-30) - rewards(-50) == pytest.approx(-0.5 * 20, rel=1e-5)
