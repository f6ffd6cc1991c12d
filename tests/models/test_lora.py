"""Adapters in the parameter tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.deberta import DebertaConfig
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


def test_every_architecture_names_layers_that_it_has(make):
  """Phi-3 has queries, keys and values in one layer."""
  for name in ("llama", "neox", "phi3", "gemma3", "gpt-neo"):
    targets = make(name)[0].config.lora_targets
    _, params = make(name, lora=LoraConfig(2, 4.0, targets=targets))
    assert set(lora.split(params)[0]["blocks"]) == set(targets)
  assert make("phi3")[0].config.lora_targets == ("qkv_proj",)


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


def test_the_projection_of_debertas_embeddings():
  config = LoraConfig(2, 4.0, dropout=0.5, targets=("embed_proj",))
  model = Model.build(DebertaConfig(31, 12, 2, 3, 20, embedding_size=8), config)
  rng = np.random.default_rng(0)

  def draw(s):
    return jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32)

  params = jax.tree.map(draw, model.shapes)
  assert set(lora.split(params)[0]) == {"embed_proj", "pooler", "score_head"}
  tokens = jnp.array([[3, 8, 1, 5], [4, 7, 1, 0]])

  def score(model, params, key=None):
    def run(p):
      return model.bind(p).score(tokens, tokens > 0, dropout_key=key)

    return jax.jit(run)(params)

  found = score(model, params)
  merged = score(*lora.merge(model, params))
  np.testing.assert_allclose(merged, found, atol=1e-5)
  plain = score(model.without_lora(), lora.strip(params))
  dropped = score(model, params, jax.random.key(0))
  for other in (plain, dropped):
    assert abs(other - found).max() > 1e-3


def test_dropout_keeps_the_mean():
  """At rate 1/4, ones become 4/3 in three of four places and 0 elsewhere."""
  x = jnp.ones((100, 100))
  found = np.asarray(dropout(x, 0.25, jax.random.key(0)))
  np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=1e-6)
  assert abs((found > 0).mean() - 0.75) < 0.02
  np.testing.assert_array_equal(dropout(x, 0.25, None), x)
  np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


LLAMA = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
NEOX = "dense, dense_4h_to_h, dense_h_to_4h, query_key_value"


@pytest.mark.parametrize(
  ("name", "head", "target", "known"),
  [
    ("llama-3", "lm", "q_prj", f"{LLAMA}, lm_head"),
    ("neox", "lm", "embed_in", f"{NEOX}, embed_out, lm_head"),
    ("neox", "score_last", "score", f"{NEOX}; its score head is trained in "),
    ("llama", "lm", "lm_head", f"{LLAMA}; its output matrix is the embedding "),
  ],
)
def test_an_unknown_target_is_told_the_known_ones(
  make, name, head, target, known
):
  model, _ = make(name, head, lora=LoraConfig(2, 2.0, targets=(target,)))
  with pytest.raises(UserError) as caught:
    lora.check_targets(model, "config.lora.targets")
  assert str(caught.value).startswith(
    f"config.lora.targets names {target}; the model's linear layers are {known}"
  )
