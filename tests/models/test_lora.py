"""Adapters in the parameter tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.layers import Linear, LoraConfig, dropout
from jaxalign.models.model import Model

CONFIG = LoraConfig(2, 6.0, targets=("q_proj", "down_proj"))


def logits(model, params):
  def run(params):
    module = model.bind(params)
    tokens = jnp.array([[3, 8, 1, 5]])
    at = jnp.arange(4)[None]
    return module.unembed(module(tokens, at, jnp.ones_like(at))[0])

  return np.asarray(jax.jit(run)(params))


def test_merged_kernel_by_hand():
  """W + 3 A B with A = (1, 2)ᵀ and B = (1, 10)."""
  kernel = jnp.ones((2, 2))
  a, b = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 10.0]])
  found = lora.merged(kernel, a, b, 3.0)
  np.testing.assert_allclose(found, [[4, 31], [7, 61]])


def test_split_takes_the_adapters_and_join_puts_them_back(make):
  _, params = make(lora=CONFIG)
  trainable, frozen = lora.split(params)
  assert set(trainable) == {"blocks"}
  assert set(trainable["blocks"]) == {"q_proj", "down_proj"}
  assert set(trainable["blocks"]["q_proj"]) == {"lora_a", "lora_b"}
  again = lora.join(trainable, frozen)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_score_head_is_trained_with_the_adapters(make):
  _, params = make(head="score_last", lora=CONFIG)
  trainable, frozen = lora.split(params)
  assert "score_head" in trainable
  assert "score_head" not in frozen


def test_stripped_model_is_the_reference(make):
  model, params = make(lora=CONFIG)
  plain = logits(model.without_lora(), lora.strip(params))
  zeroed, frozen = lora.split(params)
  zeroed = lora.join(jax.tree.map(jnp.zeros_like, zeroed), frozen)
  np.testing.assert_allclose(logits(model, zeroed), plain, atol=1e-6)
  assert abs(logits(model, params) - plain).max() > 0.1


def test_a_fresh_adapter_changes_nothing(make):
  model, _ = make(lora=CONFIG)
  params = model.init(jax.random.key(0))
  plain = logits(model.without_lora(), lora.strip(params))
  np.testing.assert_array_equal(logits(model, params), plain)


def test_merging_keeps_the_logits(make):
  model, params = make(lora=CONFIG)
  merged_model, merged = lora.merge(model, params)
  assert merged_model.lora is None
  assert jax.tree.structure(merged) == jax.tree.structure(merged_model.shapes)
  found = logits(merged_model, merged)
  np.testing.assert_allclose(found, logits(model, params), atol=1e-4)


def test_dropout_acts_on_the_adapter_with_a_key_alone():
  from flax import nnx

  config = LoraConfig(2, 2.0, dropout=0.5)
  layer = Linear(8, 3, rngs=nnx.Rngs(0), lora=config)
  layer.lora_b = nnx.Param(jnp.ones((2, 3)))
  x = jnp.ones((1, 8))
  np.testing.assert_array_equal(layer(x), layer(x))
  dropped = layer(x, jax.random.key(0))
  assert not np.array_equal(dropped, layer(x))
  frozen = Linear(8, 3, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(frozen(x, jax.random.key(0)), frozen(x))


def test_dropout_keeps_the_mean():
  """At rate 1/4, ones become 4/3 in three of four places and 0 elsewhere."""
  x = jnp.ones((100, 100))
  found = np.asarray(dropout(x, 0.25, jax.random.key(0)))
  np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=1e-6)
  assert abs((found > 0).mean() - 0.75) < 0.02
  np.testing.assert_array_equal(dropout(x, 0.25, None), x)
  np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def test_a_misspelt_target_is_refused(make):
  model, _ = make()
  wrong = Model.build(model.config, LoraConfig(2, 2.0, targets=("q_prj",)))
  with pytest.raises(UserError, match=r"q_prj; the model's .* are down_proj, "):
    lora.check_targets(wrong, "config.lora.targets")
