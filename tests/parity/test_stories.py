"""A trained LLaMA of 260K parameters tells its story, greedily."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.cache import KV
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model

STORY = (
  "Once upon a time, there was a little girl named Lily."
  " She loved to play outside in the park."
)
FIRST = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]


def read_weights(path):
  """llama2.c's first format: seven numbers, then float32 tables in order."""
  raw = path.read_bytes()
  width, inner, layers, heads, kv, vocab, length = struct.unpack("7i", raw[:28])
  head_dim = width // heads
  config = LlamaConfig(
    vocab,
    width,
    layers,
    heads,
    kv,
    head_dim,
    inner,
    max_positions=length,
    eps=1e-5,
    tied=True,
  )
  floats = np.frombuffer(raw, np.float32, offset=28)
  cursor = 0

  def take(*shape):
    nonlocal cursor
    cursor += int(np.prod(shape))
    return floats[cursor - int(np.prod(shape)) : cursor].reshape(shape)

  def linear(dout, din):
    return {"kernel": take(layers, dout, din).transpose(0, 2, 1)}

  def rotated(count):
    """Neighbouring pairs are rotated there, halves of a head here."""
    kernel = take(layers, count, head_dim // 2, 2, width)
    kernel = kernel.transpose(0, 4, 1, 3, 2)
    return {"kernel": kernel.reshape(layers, width, count * head_dim)}

  params = {"embedding": {"embedding": take(vocab, width)}}
  params["blocks"] = {
    "input_layernorm": {"scale": take(layers, width)},
    "q_proj": rotated(heads),
    "k_proj": rotated(kv),
    "v_proj": linear(kv * head_dim, width),
    "o_proj": linear(width, width),
    "post_attention_layernorm": {"scale": take(layers, width)},
    "gate_proj": linear(inner, width),
    "down_proj": linear(width, inner),
    "up_proj": linear(inner, width),
  }
  params["final_norm"] = {"scale": take(width)}
  return config, jax.tree.map(jnp.asarray, params)


def read_pieces(path):
  raw, at, pieces = path.read_bytes(), 4, []
  while at < len(raw):
    _, size = struct.unpack_from("fi", raw, at)
    pieces.append(raw[at + 8 : at + 8 + size].decode("latin-1"))
    at += 8 + size
  return pieces


def test_greedy_text_is_the_known_story(shared_data):
  weights = shared_data / "weights"
  config, params = read_weights(weights / "stories260K.bin")
  model = Model.build(config)
  expected = jax.tree.map(lambda s: s.shape, model.shapes)
  assert jax.tree.map(lambda p: p.shape, params) == expected
  new = 40
  shape = (config.layers, 1, config.kv_heads, new, config.head_dim)
  own = KV(
    jnp.zeros(shape),
    jnp.zeros(shape),
    jnp.zeros((1, new), jnp.int32),
    jnp.zeros((1, new), bool),
  )

  @jax.jit
  def step(params, token, column, own):
    module = model.bind(params)
    hidden, own = module.step(token, column[None], (), own, column)
    own = dataclasses.replace(own, k=jnp.stack(own.k), v=jnp.stack(own.v))
    return module.unembed(hidden).argmax(-1).astype(jnp.int32), own

  token, ids = jnp.array([1], jnp.int32), []
  for column in range(new):
    token, own = step(params, token, jnp.int32(column), own)
    ids.append(int(token[0]))
  assert ids[: len(FIRST)] == FIRST
  pieces = read_pieces(weights / "stories260K_tok512.bin")
  text = "".join(pieces[i] for i in ids)
  assert text.strip().startswith(STORY)
