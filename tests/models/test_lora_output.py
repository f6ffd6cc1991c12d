"""Adapters on the output matrix: logits, losses, gradients, dropout."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.core import logprobs
from jaxalign.models import lora
from jaxalign.models.layers import LoraConfig, Output

# One of each architecture that can have an output matrix of its own.
TARGETS = {
  "neox": ("dense", "embed_out"),
  "llama-3": ("lm_head",),
  "gpt-neo": ("lm_head", "c_fc"),
}
TOKENS = jnp.array([[3, 8, 1, 5, 2, 9], [4, 4, 7, 1, 6, 3]])


@pytest.fixture(params=TARGETS)
def adapted(request, make):
  """A model with an adapter on its output matrix, and its parameters."""
  config = LoraConfig(3, 6.0, targets=TARGETS[request.param])
  return make(request.param, lora=config, tied=False)


def hidden(module, key=None):
  at = jnp.broadcast_to(jnp.arange(6), TOKENS.shape)
  return module(TOKENS, at, jnp.ones_like(at), dropout_key=key)[0]


def logits(model, params, key=None):
  def run(params):
    module = model.bind(params)
    return module.unembed(hidden(module, key))

  return np.asarray(jax.jit(run)(params))


def test_by_hand():
  """W = ((1, 2), (0, 1), (1, 0)), 3 A B = (3, 6)ᵀ (0, 1, 2), x = (1, 1).

  x Wᵀ = (3, 1, 1); 3 x A = 9 stands beside x; 9 B = (0, 9, 18).
  """
  layer = Output(3, 2, rngs=nnx.Rngs(0), lora=LoraConfig(1, 3.0))
  w = jnp.array([[1.0, 2], [0, 1], [1, 0]])
  a, b = jnp.array([[1.0], [2.0]]), jnp.array([[0.0, 1, 2]])
  layer.embedding, layer.lora_a, layer.lora_b = map(nnx.Param, (w, a, b))
  extended = layer.extend(jnp.ones(2))
  np.testing.assert_allclose(extended, [1, 1, 9])
  np.testing.assert_allclose(layer.attend(extended), [3, 10, 19])
  merged = lora.merged(w, a, b, 3.0, "embedding")
  np.testing.assert_allclose(merged @ jnp.ones(2), [3, 10, 19])


def test_merged_stripped_and_fresh(adapted):
  model, params = adapted
  found = logits(model, params)
  whole, merged = lora.merge(model, params)
  assert jax.tree.structure(merged) == jax.tree.structure(whole.shapes)
  np.testing.assert_allclose(found, logits(whole, merged), atol=1e-4)
  assert abs(found - logits(whole, lora.strip(params))).max() > 0.1
  fresh = model.init(jax.random.key(0))
  plain = logits(whole, lora.strip(fresh))
  np.testing.assert_array_equal(logits(model, fresh), plain)


def chunked_losses(policy, prior, targets, mask):
  """Losses of (module, states) of a policy and of its prior."""
  (module, states), (before, old) = policy, prior
  chosen = logprobs.target_logprobs(states, targets, mask, module.unembed)
  both = logprobs.logprobs_and_kl(
    states, old, targets, mask, module.unembed, before.unembed
  )
  weights = mask.astype(jnp.float32)
  nll, _ = logprobs.weighted_nll(
    states, targets, weights, module.unembed, tokens_a_chunk=512
  )
  return chosen, *both, nll


def whole_losses(policy, prior, targets, mask):
  """The same from all logits at once."""
  logp, old = (jax.nn.log_softmax(m.unembed(x)) for m, x in (policy, prior))
  chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
  kl = (jnp.exp(old) * (old - logp)).sum(axis=-1)
  chosen, kl = jnp.where(mask, chosen, 0), jnp.where(mask, kl, 0)
  return chosen, chosen, kl, -chosen.sum()


def test_losses_are_those_of_the_merged_model(adapted):
  """Their gradients too: adapters get one each, and nothing else does."""
  model, params = adapted
  trainable, frozen = lora.split(params)
  assert set(trainable["lm_head"]) == {"lora_a", "lora_b"}
  mask = jnp.array([[True, False, True, True, True], [True] * 4 + [False]])

  def losses(trainable, merge):
    found = model, lora.join(trainable, frozen)
    pairs = (
      lora.merge(*found) if merge else found,
      (lora.merge(*found)[0], frozen),
    )
    modules = [m.bind(p) for m, p in pairs]
    states = [(m, hidden(m)[:, :-1]) for m in modules]
    fn = whole_losses if merge else chunked_losses
    found = fn(*states, TOKENS[:, 1:], mask)
    # Squares, so that each position has a weight of its own.
    return sum((x**2).sum() for x in found), found

  run = jax.jit(jax.grad(losses, has_aux=True), static_argnums=1)
  grads, found = run(trainable, False)
  wanted, expected = run(trainable, True)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  for ours, theirs in zip(*map(jax.tree.leaves, (grads, wanted)), strict=True):
    scale = float(jnp.abs(theirs).max())
    assert scale > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale)


def test_no_loss_holds_all_logits(make):
  """900 positions times 31 ids are more than any array of their program."""
  model, params = make("neox", lora=LoraConfig(2, 2.0, targets=("embed_out",)))
  mask = jnp.ones((2, 450), bool)

  def total(params, losses):
    policy = model.bind(params), jnp.ones((2, 450, 20 + 2))
    prior = model.without_lora().bind(lora.strip(params))
    found = losses(policy, (prior, jnp.ones((2, 450, 20))), mask + 0, mask)
    return sum(x.sum() for x in found)

  def largest(losses):
    text = str(jax.make_jaxpr(jax.grad(lambda p: total(p, losses)))(params))
    shapes = re.findall(r"\w\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)

  assert largest(chunked_losses) < 900 * 31 <= largest(whole_losses)


def test_dropout_is_drawn_once(make):
  """It is on the inner features, so no chunk of logits draws its own."""
  config = LoraConfig(2, 2.0, dropout=0.5, targets=("embed_out",))
  model, params = make("neox", lora=config)
  key, other = jax.random.key(0), jax.random.key(1)
  plain, dropped = logits(model, params), logits(model, params, key)
  np.testing.assert_array_equal(dropped, logits(model, params, key))
  for found in (plain, logits(model, params, other)):
    assert abs(dropped - found).max() > 0.01
  states = jax.jit(lambda p, key: hidden(model.bind(p), key))
  whole, some = states(params, None), states(params, key)
  np.testing.assert_array_equal(some[..., :20], whole[..., :20])
  assert not np.isclose(some[..., 20:], whole[..., 20:]).any()
