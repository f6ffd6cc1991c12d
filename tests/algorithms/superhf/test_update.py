"""The update of SuperHF against numbers worked out one text at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.superhf import train as superhf
from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models import lora
from jaxalign.models.layers import LoraConfig

PAIRS = [("ab", "cde"), ("c", "fghijkl"), ("abcd", "a"), ("j", "cc")]


def config(**changes):
  given = {
    "steps": 1,
    "optimizer": OptimizerConfig(learning_rate=0.01, schedule="constant"),
    "kl_coefficient": -1.0,
  }
  return SuperHFConfig(**given | changes)


def by_hand(toy, model, params, reference, pairs):
  """NLLs of all completion tokens, and each text's KLs, one text at a time.

  Without padding, without batches: log p of the distributions *before* each
  completion token, in numpy.
  """
  reference_model, reference_params = reference
  nlls, kls = [], []

  for prompt, completion in pairs:
    row = toy.ids(prompt + completion)
    p = toy.log_softmax(model, params, row)
    p0 = toy.log_softmax(reference_model, reference_params, row)
    before = np.arange(len(prompt) - 1, len(row) - 1)
    nlls += [-p[t, row[t + 1]] for t in before]
    kls.append([(np.exp(p0[t]) * (p0[t] - p[t])).sum() for t in before])
  return nlls, kls


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize(
  ("kl", "inverse"), [(0.0, 0.0), (0.35, 0.0), (0.35, 0.1)]
)
def test_loss_against_numpy(toy, micro, kl, inverse):
  """total = NLL + C / NLL + β Σ_texts mean_t KL, texts of unequal length."""
  if inverse and micro == 1:
    micro = 4  # the config refuses micro-batches here
  model, params = toy.build(seed=0)
  reference = (model, toy.build(seed=1)[1])
  cfg = config(kl_coefficient=kl, inverse_loss_penalty=inverse)
  run = toy.run(cfg, model, params, reference)
  update = run.jit(superhf.make_update(run))
  batch = toy.kept_batch(PAIRS, micro=micro)
  _, found = update(run.state, batch, run.key)
  nlls, kls = by_hand(toy, model, params, reference, PAIRS)
  assert len(nlls) == 3 + 7 + 1 + 2 == int(found["num_tokens"])
  nll = np.mean(nlls)
  wanted = nll + kl * sum(map(np.mean, kls))
  if inverse:
    wanted += inverse / nll
  np.testing.assert_allclose(found["loss/nll"], nll, rtol=1e-5)
  np.testing.assert_allclose(found["kl_sum"], sum(map(sum, kls)), rtol=1e-5)
  np.testing.assert_allclose(found["loss/total"], wanted, rtol=1e-5)
  assert sum(map(sum, kls)) > 0.1


def test_micro_batches_and_filler_rows_change_no_parameter(toy):
  model, params = toy.build()
  reference = (model, toy.build(seed=1)[1])
  # Plain sums of gradients: Adam would blow rounding up to the sign.
  cfg = config(
    kl_coefficient=0.35,
    optimizer=OptimizerConfig(
      learning_rate=1.0, schedule="constant", eps=1e3, weight_decay=0.0
    ),
  )
  run = toy.run(cfg, model, params, reference)
  update = run.jit(superhf.make_update(run))
  cuts = {
    "whole": toy.kept_batch(PAIRS),
    "singles": toy.kept_batch(PAIRS, micro=1),
    "pairs": toy.kept_batch(PAIRS, width=16, micro=2),
    "filled": toy.kept_batch([*PAIRS, ("", ""), ("", "")], micro=3),
  }
  moved = {}
  for name, batch in cuts.items():
    state, _ = update(run.state, batch, run.key)
    moved[name] = jax.tree.map(
      lambda a, b: 1e3 * np.asarray(a - b), state.params, params
    )
  assert max(np.abs(x).max() for x in jax.tree.leaves(moved["whole"])) > 1e-2
  for name in ("singles", "pairs", "filled"):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-3),
      moved[name],
      moved["whole"],
    )


ADAPTERS = LoraConfig(rank=2, alpha=8.0, targets=("dense", "embed_out"))


def test_adapters_off_is_the_base_policy(toy):
  """With B = 0 the KL is 0; with drawn adapters it is that of two models."""
  model, params = toy.build(adapters=ADAPTERS)
  trained, frozen = lora.split(params)
  reference = (model.without_lora(), frozen)
  cfg = config(kl_coefficient=0.35)
  run = toy.run(cfg, model, params, reference)
  update = run.jit(superhf.make_update(run))
  batch = toy.kept_batch(PAIRS)
  state, found = update(run.state, batch, run.key)
  _, kls = by_hand(toy, model, params, reference, PAIRS)
  np.testing.assert_allclose(found["kl_sum"], sum(map(sum, kls)), rtol=1e-4)
  assert sum(map(sum, kls)) > 0.1
  # Only the adapters are trained.
  assert jax.tree.structure(state.params) == jax.tree.structure(trained)
  names = {str(p[-1].key) for p, _ in jax.tree.leaves_with_path(state.params)}
  assert names == {"lora_a", "lora_b"}
  fresh = jax.tree_util.tree_map_with_path(
    lambda p, x: jnp.zeros_like(x) if p[-1].key == "lora_b" else x, trained
  )
  before = dataclasses.replace(run.state, params=fresh)
  _, found = update(before, batch, run.key)
  assert abs(float(found["kl_sum"])) < 1e-6


def test_sampler_and_trainer_are_compared_on_known_tokens_only(toy):
  """Log-probs 0 against the trainer's −log p: the largest of the known."""
  model, params = toy.build()
  cfg = config()
  run = toy.run(cfg, model, params)
  update = run.jit(superhf.make_update(run))
  batch = toy.kept_batch(PAIRS)
  nlls, _ = by_hand(toy, model, params, (model, params), PAIRS)
  known = np.zeros(batch.sampled.shape, bool)
  known[0, 0, 1:4] = True  # the completion of the first text
  batch = dataclasses.replace(batch, sampled=jnp.asarray(known))
  _, found = update(run.state, batch, run.key)
  np.testing.assert_allclose(found["logp_diff_max"], max(nlls[:3]), rtol=1e-5)


def test_a_negative_loss_is_left_out(toy):
  """A mean −log p cannot be one; C / loss < 0 stands in for a fault."""
  model, params = toy.build()
  cfg = config(inverse_loss_penalty=-1e6)
  run = toy.run(cfg, model, params)
  update = run.jit(superhf.make_update(run))
  state, found = update(run.state, toy.kept_batch(PAIRS), run.key)
  assert int(found["skipped_updates"]) == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
