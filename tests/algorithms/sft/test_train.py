import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.sft import train as sft
from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.core.types import TextBatch
from jaxalign.models.layers import LoraConfig
from jaxalign.training.run import fit

PAIRS = [("ab", "cde"), ("c", "fghi"), ("ab", "j"), ("", "kla")]


def config(**changes):
  optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant")
  return SFTConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def gradient(model, params, batch):
  """The loss that is trained on, and its gradient."""

  def loss(params):
    parts = [
      sft.sum_nll(model, params, jax.tree.map(lambda x, m=m: x[m], batch))
      for m in range(batch.tokens.shape[0])
    ]
    return sum(p[0] for p in parts) / sum(p[1] for p in parts)

  return jax.jit(jax.value_and_grad(loss))(params)


def close(a, b):
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), a, b)


def packed(toy, pairs, width):
  """All texts in one row, each its own segment with positions from 0."""
  names = ("tokens", "position_ids", "segment_ids", "loss_mask")
  columns = {name: [] for name in names}
  for number, (prompt, completion) in enumerate(pairs):
    row = toy.ids(prompt + completion)
    columns["tokens"] += row
    columns["position_ids"] += range(len(row))
    columns["segment_ids"] += [number + 1] * len(row)
    # Nothing predicts a text's first token, least of all its neighbour.
    columns["loss_mask"] += [max(len(prompt), 1) <= i for i in range(len(row))]
  return TextBatch(
    **{
      name: jnp.array([[column + [type(column[0])(0)] * (width - len(column))]])
      for name, column in columns.items()
    }
  )


def test_uniform_model_has_loss_ln_v(toy):
  """All logits 0: −log p = ln 13 for each of the 3 + 4 tokens."""
  model, params = toy.build()
  params["lm_head"]["embedding"] *= 0
  batch = toy.text_batch(PAIRS[:2], 8)
  part = jax.tree.map(lambda x: x[0], batch)
  total, count = sft.sum_nll(model, params, part)
  assert int(count) == 7
  np.testing.assert_allclose(total, 7 * math.log(13), rtol=1e-6)


def test_the_loss_is_of_the_next_token(toy):
  """Against numpy: what state t says of token t + 1."""
  model, params = toy.build()
  part = jax.tree.map(lambda x: x[0], toy.text_batch(PAIRS[:2], 8))
  total, _ = sft.sum_nll(model, params, part)
  module = model.bind(params)
  states, _ = module(part.tokens, part.position_ids, part.segment_ids)
  logits = np.asarray(module.unembed(states), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  wanted = -sum(
    logp[row, t - 1, part.tokens[row, t]]
    for row, t in zip(*np.nonzero(part.loss_mask), strict=True)
  )
  np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_packed_is_unpacked(toy):
  model, params = toy.build()
  # A first token has nobody to predict it, in both forms.
  batch = toy.text_batch(PAIRS, 8)
  loss, grads = gradient(model, params, batch)
  one_row = packed(toy, PAIRS, 24)
  assert int(one_row.loss_mask.sum()) == 3 + 4 + 1 + 2
  again, packed_grads = gradient(model, params, one_row)
  np.testing.assert_allclose(again, loss, rtol=1e-6)
  close(packed_grads, grads)
  # In another order, with other neighbours.
  other = packed(toy, PAIRS[::-1], 24)
  close(gradient(model, params, other)[1], grads)


def test_padding_and_prompts_count_in_nothing(toy):
  model, params = toy.build()
  close(
    gradient(model, params, toy.text_batch(PAIRS, 8)),
    gradient(model, params, toy.text_batch(PAIRS, 13)),
  )
  # Letters behind the end are padding, whatever they are.
  batch = toy.text_batch(PAIRS, 8)
  dirty = batch.tokens + jnp.where(batch.segment_ids == 0, 5, 0)
  dirty = dataclasses.replace(batch, tokens=dirty)
  close(gradient(model, params, dirty), gradient(model, params, batch))


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_change_no_update(toy, micro):
  """Texts of 3, 4, 1 and 2 counted tokens: a mean of means would differ."""
  model, params = toy.build()
  cfg = config(
    optimizer=OptimizerConfig(
      learning_rate=1.0, schedule="constant", eps=1e3, weight_decay=0.0
    )
  )
  run = toy.run(cfg, model, params)
  update = run.jit(sft.make_update(run))
  whole, found = update(run.state, toy.text_batch(PAIRS, 8), run.key)
  cut, again = update(run.state, toy.text_batch(PAIRS, 8, micro=micro), run.key)
  assert int(found["num_tokens"]) == int(again["num_tokens"]) == 10
  np.testing.assert_allclose(again["loss/nll"], found["loss/nll"], rtol=1e-6)
  np.testing.assert_allclose(again["grad_norm"], found["grad_norm"], rtol=1e-5)
  close(cut.params, whole.params)
  # A step is counted once, where it ends, not by its update.
  assert int(cut.step) == 0
  assert int(run.end_step(0, cut, again).step) == 1


def test_adapters_alone_are_trained(toy):
  """With dropout on, a different key gives a different loss."""
  targets = ("dense", "embed_out")
  adapters = LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=targets)
  model, params = toy.build(adapters=adapters)
  run = toy.run(config(), model, params)
  update = run.jit(sft.make_update(run))
  batch = toy.text_batch(PAIRS, 8)
  state, found = update(run.state, batch, run.key)
  _, others = update(run.state, batch, jax.random.key(1))
  assert abs(found["loss/nll"] - others["loss/nll"]) > 1e-4
  assert set(state.params) == {"blocks", "lm_head"}
  for module in (state.params["blocks"]["dense"], state.params["lm_head"]):
    assert set(module) == {"lora_a", "lora_b"}
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), state.params, run.state.params
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


def test_run_learns_reports_and_validates(toy):
  """Overfits four texts; validates after 20, 40 and the last of 50 steps."""
  model, params = toy.build()
  held = toy.text_batch([PAIRS[0], ("c", "a")], 8)
  held = [jax.tree.map(lambda x, i=i: x[:, i : i + 1], held) for i in (0, 1)]
  cfg = config(steps=50, validation_interval=20)
  data = types.SimpleNamespace(batch=lambda step: toy.text_batch(PAIRS, 8))
  run = toy.run(cfg, model, params)
  run.evaluators.append(sft.Perplexity(run, held))
  state = fit(run, data, sft.make_update(run))
  log = run.recorder
  assert int(state.step) == len(log.states) == 50
  losses = [float(m["loss/nll"]) for m in log.metrics]
  assert losses[0] > 2.0
  assert losses[-1] < 0.7
  at = [i + 1 for i, m in enumerate(log.metrics) if "eval_loss/nll" in m]
  assert at == [20, 40, 50]
  last = log.metrics[-1]
  both = toy.text_batch([PAIRS[0], ("c", "a")], 8)
  wanted, _ = gradient(model, state.params, both)
  np.testing.assert_allclose(last["eval_loss/nll"], wanted, rtol=1e-5)
  np.testing.assert_allclose(
    last["eval_perplexity"], math.exp(wanted), rtol=1e-5
  )
