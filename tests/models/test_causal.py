"""The trunk: padding, packing, and cached decoding with shared prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # no public name

from jaxalign.models import causal
from jaxalign.models.cache import KV

rng = np.random.default_rng(0)


def read(model, params, tokens, positions, segments, prompts=None):
  def run(params, prompts, *arrays):
    module = model.bind(params)
    return module.unembed(module(*arrays, prompt_segment_ids=prompts)[0])

  arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))
  return np.asarray(jax.jit(run)(params, prompts, *arrays))


def test_two_texts_in_one_row_equal_two_rows(any_causal):
  model, params = any_causal
  a, b = rng.integers(1, 31, 5), rng.integers(1, 31, 4)
  packed = read(
    model,
    params,
    np.concatenate([a, b, [0, 0]])[None],
    np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]]),
    np.array([[1] * 5 + [2] * 4 + [0] * 2]),
  )[0]
  tokens = np.stack([a, np.pad(b, (1, 0))])
  positions = np.array([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
  segments = np.array([[1] * 5, [0] + [1] * 4])
  alone = read(model, params, tokens, positions, segments)
  np.testing.assert_allclose(packed[:5], alone[0], atol=1e-5)
  np.testing.assert_allclose(packed[5:9], alone[1, 1:], atol=1e-5)


def test_a_long_text_leaves_the_rotation_of_its_neighbour(make):
  """LongRoPE, which rotates texts of more than 4 tokens otherwise."""
  model, params = make("phi3")
  scaling = model.config.rotary_scaling
  model = model.replace(rotary_scaling=dataclasses.replace(scaling, original=4))
  tokens = rng.integers(1, 31, (1, 9))
  positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
  segments = np.array([[1] * 5 + [2] * 4])
  both = read(model, params, tokens, positions, segments)[0]
  # The long text, then the short one, with padding in the other's place.
  for number, here in ((1, slice(0, 5)), (2, slice(5, 9))):
    alone = read(model, params, tokens, positions, segments == number)[0]
    np.testing.assert_allclose(both[here], alone[here], atol=1e-5)
  # Without the limit the long text reads otherwise.
  model = model.replace(rotary_scaling=scaling)
  short = read(model, params, tokens, positions, segments)[0]
  assert abs(short[:5] - both[:5]).max() > 1e-3
  np.testing.assert_allclose(short[5:], both[5:], atol=1e-6)


def test_two_texts_that_share_their_start_equal_two_rows(any_causal):
  model, params = any_causal
  start, a, b = (rng.integers(1, 31, n) for n in (4, 3, 2))
  segments = np.array([[1] * 4 + [2] * 3 + [3] * 2 + [0]])
  shared = read(
    model,
    params,
    np.concatenate([start, a, b, [0]])[None],
    np.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 0]]),
    segments,
    np.minimum(segments, 1),
  )[0]
  for text, here in ((a, slice(4, 7)), (b, slice(7, 9))):
    tokens = np.concatenate([start, text])[None]
    places = np.arange(tokens.size)[None]
    alone = read(model, params, tokens, places, np.ones_like(tokens))[0]
    np.testing.assert_allclose(shared[:4], alone[:4], atol=1e-5)
    np.testing.assert_allclose(shared[here], alone[4:], atol=1e-5)


def test_cached_decoding_equals_the_full_forward(any_causal, monkeypatch):
  """A prefix common to all, 2 prompts of unequal length, 3 samples of each."""
  model, params = any_causal
  prefix, prompts = rng.integers(1, 31, 3), rng.integers(1, 31, (2, 4))
  lengths, samples, new = [4, 2], 3, 5
  drawn = rng.integers(1, 31, (6, new))
  texts = [
    np.concatenate([prefix, prompts[p][4 - n :], drawn[p * samples + s]])
    for p, n in enumerate(lengths)
    for s in range(samples)
  ]
  full = np.zeros((6, 12), int)
  for row, text in zip(full, texts, strict=True):
    row[: len(text)] = text
  real = np.arange(12) < [[len(t)] for t in texts]
  place = np.minimum(np.arange(12), real.sum(1, keepdims=True) - 1)
  expected = read(model, params, full, place, real)

  def stacked(own):
    k, v = (jnp.stack(tuple(x)) for x in (own.k, own.v))
    return dataclasses.replace(own, k=k, v=v)

  config = model.config
  mask = jnp.arange(4) >= 4 - jnp.array(lengths)[:, None]

  @jax.jit
  def decode(params, prefix, prompts, drawn):
    module = model.bind(params)
    at = jnp.arange(3)[None]
    _, first = module(prefix[None], at, jnp.ones_like(at), keep=True)
    at = 3 + jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    segments = mask.astype(jnp.int32)
    # The prompts read the prefix, too: one group for both rows.
    _, second = module(prompts, at, segments, past=(first,), keep=True)
    shape = (config.layers, 6, config.kv_heads, new, config.head_dim)
    own = KV(
      jnp.zeros(shape),
      jnp.zeros(shape),
      jnp.zeros((6, new), jnp.int32),
      jnp.zeros((6, new), bool),
    )
    start = jnp.repeat(3 + jnp.array(lengths), samples)
    out = []
    for column in range(new):
      hidden, own = module.step(
        drawn[:, column], start + column, (first, second), own,
        jnp.int32(column),
      )  # fmt: skip
      out.append(module.unembed(hidden))
      if config.windows:  # every second token by scanned layers
        depth = 0 if column % 2 == 0 else config.layers
        monkeypatch.setattr(causal, "UNROLLED", depth)
        own = stacked(own)
    return jnp.stack(out, 1)

  got = np.asarray(
    decode(
      params, *(jnp.asarray(x, jnp.int32) for x in (prefix, prompts, drawn))
    )
  )
  for row, text in enumerate(texts):
    last = expected[row, len(text) - new : len(text)]
    np.testing.assert_allclose(got[row], last, atol=1e-5)


def test_scores_do_not_depend_on_padding(make):
  for head in ("score_last", "score_eos", "score_mean"):
    model, params = make("neox", head, eos_id=7)
    text = np.array([4, 9, 7, 3])
    tokens = np.full((3, 7), 7)  # pad = end of text, as is common
    mask = np.zeros((3, 7), bool)
    for row, start in enumerate((0, 3, 1)):
      tokens[row, start : start + 4], mask[row, start : start + 4] = text, True
    score = jax.jit(lambda p, t, m, model=model: model.bind(p).score(t, m))
    scores = np.asarray(score(params, jnp.asarray(tokens), jnp.asarray(mask)))
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)
    assert abs(scores[0]) > 1e-3


def test_score_heads_read_where_they_say(make):
  """With the same parameters: last = eos if the text ends there."""
  tokens = jnp.array([[4, 9, 7, 3], [4, 9, 3, 7]])
  mask = jnp.ones((2, 4), bool)
  scores = {}
  for head in ("score_last", "score_eos", "score_mean"):
    model, params = make("neox", head, eos_id=7)
    score = jax.jit(lambda p, model=model: model.bind(p).score(tokens, mask))
    scores[head] = np.asarray(score(params))
    cut = jax.jit(lambda p, m, model=model: model.bind(p).score(tokens, m))
    scores[head, 3] = np.asarray(cut(params, mask & (jnp.arange(4) < 3)))
  # Row 0 has its first end of text in column 2, row 1 in the last one.
  assert scores["score_eos"][0] == scores["score_last", 3][0]
  assert scores["score_eos"][1] == scores["score_last"][1]
  assert abs(scores["score_mean"] - scores["score_last"]).min() > 1e-4


def test_bfloat16_leaves_the_result(make):
  model, params = make("neox")
  tokens = np.array([[4, 9, 7, 3]])
  args = (tokens, np.arange(4)[None], np.ones((1, 4)))
  exact = read(model, params, *args)
  rough = read(model.replace(dtype="bfloat16"), params, *args)
  assert rough.dtype == np.float32
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert dataclasses.replace(model.config, dtype="bfloat16") != model.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_remat_policy_leaves_the_gradient(make, dtype):
  """And keeps less the further down it stands in the list."""
  model, params = make("neox")
  tokens = jnp.array([[4, 9, 7, 3, 5, 8]])
  where = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)

  def loss_of(policy):
    module = model.replace(remat=policy, dtype=dtype)

    def loss(params):
      bound = module.bind(params)
      hidden, _ = bound(tokens, *where)
      return (bound.unembed(hidden) ** 2).mean()

    return loss

  def kept(policy):
    found = saved_residuals(loss_of(policy), params)
    return sum(
      x.size * x.dtype.itemsize for x, why in found if "argument" not in why
    )

  exact = jax.jit(jax.grad(loss_of("none")))(params)
  for policy in ("attention", "dots", "full", "offload"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5),
      jax.jit(jax.grad(loss_of(policy)))(params),
      exact,
    )
  sizes = [kept(p) for p in ("none", "attention", "dots", "full")]
  assert sizes == sorted(sizes, reverse=True)
  assert len(set(sizes)) == 4, sizes
