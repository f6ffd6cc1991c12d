"""The trunk that all causal language models share.

An architecture gives its blocks, its embedding and its rotary angles; the
trunk scans the stacked blocks, keeps or reads keys and values, and applies
the head. `__call__` reads whole texts, `step` one token a row.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import heads
from jaxalign.models.cache import KV, attend
from jaxalign.models.layers import (
  Embedding,
  Linear,
  Output,
  adapter,
  layer_params,
  stack,
)


class CausalLM(heads.Scored, nnx.Module):
  """Embedding, L blocks, final norm, and a language-model or score head.

  Subclasses set `block`, and may override `embed` and `rope`.
  """

  block: type[Any]  # (config, lora=, rngs=) -> an nnx.Module
  outputs: tuple[str, ...] = ("lm_head",)  # names of the output matrix

  def __init__(self, config, *, lora=None, rngs: nnx.Rngs):
    self.config = config
    width = config.hidden_size
    self.embedding = Embedding(config.vocab_size, width, rngs=rngs)
    self.blocks = stack(
      lambda r: self.block(config, lora=lora, rngs=r), config.layers, rngs
    )
    self.final_norm = config.norm()
    if config.head != "lm":
      columns = len(config.groups) or 1
      self.score_head = Linear(width, columns, bias=False, rngs=rngs)
    elif not config.tied:
      own = adapter(lora, *self.outputs)
      self.lm_head = Output(config.vocab_size, width, lora=own, rngs=rngs)

  def embed(
    self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Token embeddings; learned positions are added by who has them."""
    del positions
    return self.embedding(tokens).astype(self.config.dtype)

  def rope(self, positions: Int[Array, "B T"]) -> tuple[Array, Array] | None:
    """Rotary `(cos, sin)` for these positions, or None without rotation."""
    del positions
    return None

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    past: tuple[KV, ...] = (),
    keep: bool = False,
    dropout_key: Array | None = None,
    parents: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T E"], KV | None]:
    """Reads whole texts.

    Args:
      tokens: ids; padding may stand anywhere.
      positions: position of each token in its own text, from 0.
      segments: 0 = padding; tokens of one row attend causally to those that
        carry the same number, so packed texts do not see each other.
      past: keys that every token attends to besides, see `KV`.
      keep: also return this text's own keys and values.
      dropout_key: turns LoRA dropout on (training); None turns it off.
      parents: number of another segment, earlier in the row, that a token
        attends to besides its own: the prompt that several texts share.

    Returns:
      Hidden states after the final norm, as `unembed` takes them (see
      `Output`), and the `KV` if `keep`.
    """
    near = positions[:, :, None] - positions[:, None, :]
    mask = _attended(segments, parents)
    rope = self.rope(positions)

    def layer(x, xs):
      params, window, past_kv, key = xs
      kept = []

      def attention(q, k, v, scale):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        own = (k, v, mask & _within(near, window))
        shared = _past_parts(past, past_kv, positions, window)
        kept.append((k, v))
        return attend(q, [*shared, own], scale=scale)

      block = nnx.merge(graph, params)
      x = block(x, attention, rope, key)
      return x, kept if keep else []

    graph, params = layer_params(self.blocks, self.config.dtype)
    keys = head_key = None
    if dropout_key is not None:
      keys = jax.random.split(dropout_key, self.config.layers + 1)
      keys, head_key = keys[:-1], keys[-1]
    xs = (params, self._windows(), [(p.k, p.v) for p in past], keys)
    body = jax.checkpoint(layer) if self.config.remat else layer
    x, kept = jax.lax.scan(body, self.embed(tokens, positions), xs)
    hidden = self._states(x, head_key)
    if not keep:
      return hidden, None
    [(k, v)] = kept
    return hidden, KV(k, v, positions, segments > 0)

  def step(
    self,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    past: tuple[KV, ...],
    own: KV,
    column: Int[Array, ""],
    layers: list[Any] | None = None,
  ) -> tuple[Float[Array, "B E"], KV]:
    """One more token a row: writes `column` of `own`, attends, returns both.

    Args:
      tokens: the rows' last tokens.
      positions: their positions.
      past: shared keys; row b reads group b // (B // G).
      own: the rows' own cache, `[L, B, K, C, H]` or one array a layer; columns
        after `column` are not read, whatever they hold.
      column: where this token goes, the same for all rows.
      layers: what `unstack` returned. A loop calls it once, outside.

    Returns:
      Hidden states as of a call, and `own` with one array a layer.
    """
    positions = positions[:, None]
    rope = self.rope(positions)
    own_positions = own.positions.at[:, column].set(positions[:, 0])
    own_mask = own.mask.at[:, column].set(True)
    near = positions[:, :, None] - own_positions[:, None, :]
    graph, _ = nnx.split(self.blocks)
    cache = []

    def attention_of(layer, window):
      def attention(q, k, v, scale):
        at = (0, 0, column, 0)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        k = jax.lax.dynamic_update_slice(own.k[layer], k, at)
        v = jax.lax.dynamic_update_slice(own.v[layer], v, at)
        cache.append((k, v))
        past_kv = [(p.k[layer], p.v[layer]) for p in past]
        shared = _past_parts(past, past_kv, positions, window)
        mine = (k, v, own_mask[:, None, :] & _within(near, window))
        return attend(q, [*shared, mine], scale=scale)

      return attention

    x = self.embed(tokens[:, None], positions)
    windows = self.config.windows
    for layer, params in enumerate(layers or self.unstack()):
      window = None if windows is None else jnp.asarray(windows[layer])
      block = nnx.merge(graph, params)
      x = block(x, attention_of(layer, window), rope, None)
    k, v = zip(*cache, strict=True)
    return self._states(x)[:, 0], KV(k, v, own_positions, own_mask)

  def unstack(self) -> list[Any]:
    """Each layer's parameters in the compute dtype, for `step`."""
    _, params = layer_params(self.blocks, self.config.dtype)
    take = operator.itemgetter
    count = self.config.layers
    return [jax.tree.map(take(i), params) for i in range(count)]

  def unembed(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
    """Float32 logits over the vocabulary, of a call's hidden states."""
    head = self.embedding if self.config.tied else self.lm_head
    return head.attend(hidden)

  def scores(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
  ) -> Float[Array, "B G"]:
    """The score head's values of each text, float32, one a group.

    See `heads` for where they are read.

    Args:
      tokens: ids, padded on either side.
      mask: True = a real token.
      types: ignored; encoders use it.
      dropout_key: as in a call.
    """
    del types
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    segments = mask.astype(jnp.int32)
    hidden, _ = self(tokens, positions, segments, dropout_key=dropout_key)
    pooled = heads.pool(self.config, hidden, tokens, mask)
    return self.score_head(pooled).astype(jnp.float32)

  def _states(
    self, x: Float[Array, "B T D"], dropout_key: Array | None = None
  ) -> Float[Array, "B T E"]:
    hidden = self.final_norm(x)
    if "lm_head" not in vars(self):
      return hidden
    return self.lm_head.extend(hidden, dropout_key)

  def _windows(self) -> Int[Array, " L"] | None:
    windows = self.config.windows
    return None if windows is None else jnp.asarray(windows)


def _attended(
  segments: Int[Array, "B T"], parents: Int[Array, "B T"] | None
) -> Bool[Array, "B T T"]:
  """Which columns each token reads: earlier ones of its own and its parent."""
  length = segments.shape[1]
  mask = segments[:, :, None] == segments[:, None, :]
  if parents is not None:
    mask |= parents[:, :, None] == segments[:, None, :]
  return mask & jnp.tril(jnp.ones((length, length), bool))


def _within(near: Int[Array, "B T C"], window) -> Bool[Array, "B T C"] | bool:
  """Keys less than `window` positions back; 0 or None = all of them."""
  if window is None:
    return True
  return (window == 0) | (near < window)


def _past_parts(past, past_kv, positions, window):
  """The shared groups as `attend` takes them, masks spread over the rows."""
  parts = []
  for shared, (k, v) in zip(past, past_kv, strict=True):
    repeat = positions.shape[0] // shared.mask.shape[0]
    mask = jnp.repeat(shared.mask, repeat, axis=0)[:, None, :]
    if window is not None:
      keys = jnp.repeat(shared.positions, repeat, axis=0)
      mask = mask & _within(positions[:, :, None] - keys[:, None, :], window)
    parts.append((k, v, jnp.broadcast_to(mask, (*positions.shape, k.shape[2]))))
  return parts
