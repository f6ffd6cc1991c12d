import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms import sft
from jaxalign.config import SFTConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.core.types import TextBatch
from jaxalign.models.layers import LoraConfig
from jaxalign.runtime.context import Task

PAIRS = [("ab", "cde"), ("c", "fghi"), ("ab", "j"), ("", "kla")]


def config(**changes):
  optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant")
  return SFTConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def gradient(model, params, batch):
  """The loss that is trained on, and its gradient."""

  def loss(params):
    parts = [
      sft.nll(model, params, jax.tree.map(lambda x, m=m: x[m], batch), None)
      for m in range(batch.tokens.shape[0])
    ]
    return sum(p[0] for p in parts) / sum(p[1] for p in parts)

  return jax.jit(jax.value_and_grad(loss))(params)


def close(a, b):
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), a, b)


def packed(toy, pairs, width):
  """All texts in one row, each its own segment with positions from 0."""
  columns = {"tokens": [], "positions": [], "segments": [], "loss_mask": []}
  for number, (prompt, completion) in enumerate(pairs):
    row = toy.ids(prompt + completion)
    columns["tokens"] += row
    columns["positions"] += range(len(row))
    columns["segments"] += [number + 1] * len(row)
    # Nothing predicts a text's first token, least of all its neighbour.
    columns["loss_mask"] += [max(len(prompt), 1) <= i for i in range(len(row))]
  fill = lambda x: x + [type(x[0])(0)] * (width - len(x))
  return TextBatch(**{k: jnp.array([[fill(v)]]) for k, v in columns.items()})


def test_uniform_model_has_loss_ln_v(toy):
  """All logits 0: −log p = ln 13 for each of the 3 + 4 tokens."""
  model, params = toy.build()
  params["lm_head"]["embedding"] *= 0
  batch = toy.text_batch(PAIRS[:2], 8)
  part = jax.tree.map(lambda x: x[0], batch)
  total, count = sft.nll(model, params, part, None)
  assert int(count) == 7
  np.testing.assert_allclose(total, 7 * math.log(13), rtol=1e-6)


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
  dirty = batch.tokens + jnp.where(batch.segments == 0, 5, 0)
  dirty = TextBatch(dirty, batch.positions, batch.segments, batch.loss_mask)
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
  ctx, _ = toy.context(cfg, model, params)
  update = jax.jit(sft.make_update(model, toy.optimizer(cfg), toy.rate(cfg)))
  whole, found = update(ctx.state, {}, toy.text_batch(PAIRS, 8), ctx.key)
  cut, again = update(
    ctx.state, {}, toy.text_batch(PAIRS, 8, micro=micro), ctx.key
  )
  assert int(found["num_tokens"]) == int(again["num_tokens"]) == 10
  np.testing.assert_allclose(again["loss/nll"], found["loss/nll"], rtol=1e-6)
  np.testing.assert_allclose(again["grad_norm"], found["grad_norm"], rtol=1e-5)
  close(cut.params, whole.params)
  assert int(cut.step) == 1


def test_adapters_alone_are_trained(toy):
  adapters = LoraConfig(rank=2, alpha=4.0, targets=("dense", "embed_out"))
  model, params = toy.build(adapters=adapters)
  ctx, _ = toy.context(config(), model, params)
  update = jax.jit(
    sft.make_update(model, toy.optimizer(config()), toy.rate(config()))
  )
  batch = toy.text_batch(PAIRS, 8)
  state, _ = update(ctx.state, ctx.frozen, batch, ctx.key)
  assert set(state.params) == {"blocks", "lm_head"}
  for module in (state.params["blocks"]["dense"], state.params["lm_head"]):
    assert set(module) == {"lora_a", "lora_b"}
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), state.params, ctx.state.params
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


def test_run_learns_reports_and_validates(toy):
  """Overfits four texts; validates after 20, 40 and the last of 50 steps."""
  model, params = toy.build()
  held = toy.text_batch([PAIRS[0], ("c", "a")], 8)
  held = tuple(
    jax.tree.map(lambda x, i=i: x[:, i : i + 1], held) for i in (0, 1)
  )
  cfg = config(steps=50, validation_interval=20)
  task = Task(lambda step: toy.text_batch(PAIRS, 8), held)
  ctx, log = toy.context(cfg, model, params)
  state = sft.run(ctx, task, toy.optimizer(cfg), toy.rate(cfg))
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
