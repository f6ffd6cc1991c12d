"""The trunk that all causal language models share.

An architecture defines its blocks, embedding and rotary angles. The trunk scans
the stacked blocks, stores and reads keys and values, and applies the head.
`__call__` reads whole texts, `step` one token per row.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.types import Params
from jaxalign.models import attention as attentions
from jaxalign.models import heads, remat
from jaxalign.models.cache import KV, UNROLLED, attend
from jaxalign.models.config import CausalConfig
from jaxalign.models.layers import (
  Embedding,
  Linear,
  Output,
  adapter,
  cast_small,
  layer_params,
  stack,
)
from jaxalign.parallel.mesh import (
  ROWS,
  SHORT_ROWS,
  Axes,
  constrain,
  constrain_rows,
  constrain_tokens,
  gather_tokens,
  gathered,
  scatter_tokens,
)

C = TypeVar("C", bound=CausalConfig)


class CausalLM(heads.Scored, nnx.Module, Generic[C]):
  """Embedding, L blocks, final norm, and a language-model or score head.

  Subclasses set `block`, and may override `embed` and `rope`.
  """

  config: C
  block: type[Any]  # called with (config, lora=, rngs=), which Module has not
  outputs: tuple[str, ...] = ("lm_head",)  # names of the output matrix

  def __init__(self, config: C, *, lora=None, rngs: nnx.Rngs):
    self.config = config
    width = config.hidden_size
    self.embedding = Embedding(config.vocab_size, width, rngs=rngs)
    self.blocks = stack(
      lambda r: self.block(config, lora=lora, rngs=r), config.layers, rngs
    )
    self.final_norm = config.norm()
    # A score head instead of the output matrix, which is then not read at all.
    if config.head != "lm":
      columns = len(config.groups) or 1
      self.score_head = Linear(width, columns, bias=False, rngs=rngs)
    elif not config.tied:
      own = adapter(lora, *self.outputs)
      self.lm_head = Output(config.vocab_size, width, lora=own, rngs=rngs)

  def embed(
    self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Token embeddings; GPT-Neo adds its learned positions."""
    del positions
    return self.embedding(tokens).astype(self.config.dtype)

  def rope(
    self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
  ) -> tuple[Array, Array] | None:
    """Rotary `(cos, sin)`, or None without rotation; see `rope.angles`."""
    del positions, lengths
    return None

  def layer_rope(self, rope, window):
    """What a layer with this window gets of `rope`; Gemma 3 has two kinds."""
    del window
    return rope

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    past: tuple[KV, ...] = (),
    keep: bool = False,
    dropout_key: Array | None = None,
    prompt_segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T E"], KV | None]:
    """Reads whole texts.

    Args:
      tokens: ids; padding may be anywhere.
      positions: position of each token in its own text, from 0.
      segment_ids: 0 = padding; tokens of one row attend causally to those that
        carry the same number, so packed texts do not see each other.
      past: more keys that every token attends to, see `KV`.
      keep: also return the keys and values of this text.
      dropout_key: turns LoRA dropout on (training); None turns it off.
      prompt_segment_ids: a second segment, earlier in the row, that a token
        attends to: the prompt p that two texts share, segments p + 1 and p + 2.

    Returns:
      Hidden states after the final norm, as `unembed` takes them (see
      `Output`), and the `KV` if `keep`.
    """
    # What each token attends to is the same in every layer but for the window.
    near = constrain_tokens(positions[:, :, None] - positions[:, None, :])
    mask = _attended(segment_ids, prompt_segment_ids)
    # Of texts that share a prompt the longest counts, as the prompt is theirs.
    texts = segment_ids if prompt_segment_ids is None else prompt_segment_ids
    same = texts[:, :, None] == texts[:, None, :]
    lengths = jnp.where(same, positions[:, None, :], 0).max(axis=2) + 1
    rope = self.rope(positions, lengths)
    windows, length = self.config.windows, tokens.shape[1]
    kind = attentions.kind_of_call(
      self.config,
      attentions.Mask(
        windows=attentions.sees_part(windows, length),
        capped=bool(getattr(self.config, "attention_cap", 0)),
        shared_prompt=prompt_segment_ids is not None,
        past=bool(past),
        length=length,
      ),
    )

    # One block, on its slice of each array in `xs`.
    def layer(x, xs):
      params, window, past_kv, key = xs
      kept = []

      def attention(q, k, v, scale, cap=0.0):
        # [B, T, K, H] to [B, K, T, H], as a cache keeps them.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        own_mask = mask & _within(near, window)
        kept.append((k, v))
        if kind != "dense":  # what it keeps is small: no policy is needed
          return attentions.attend_text(
            kind,
            q,
            k,
            v,
            own_mask,
            segment_ids,
            prompt_segment_ids,
            scale=scale,
            cap=cap,
            window=window,
            windows=windows,
          )
        own = (gather_tokens(k), gather_tokens(v), own_mask)
        shared = _past_parts(past, past_kv, positions, window)
        read = functools.partial(attend, scale=scale, cap=cap)
        return remat.of_attention(read, policy)(q, [*shared, own])

      # The block calls `attention` once, which leaves its keys in `kept`.
      block = nnx.merge(graph, cast_small(params, self.config.dtype))
      x = remat.block_input(x)
      x = block(x, attention, self.layer_rope(rope, window), key)
      # XLA would otherwise move whole batches rather than parameters.
      return constrain_tokens(x), _constrain_heads(kept) if keep else []

    # Scanning the stacked blocks: one is compiled, whatever the depth.
    graph, params = layer_params(self.blocks)
    policy = self.config.remat
    keys = head_key = None
    if dropout_key is not None:
      # One key per block, the last for the output matrix's adapter.
      keys = jax.random.split(dropout_key, self.config.layers + 1)
      keys, head_key = keys[:-1], keys[-1]
    # All with a leading layer axis; None has no leaves and stays None.
    xs = (params, self._windows(), [(p.k, p.v) for p in past], keys)
    body = remat.of_block(layer, policy)
    x = scatter_tokens(self.embed(tokens, positions))
    x, kept = jax.lax.scan(body, x, xs)
    hidden = self._states(x, head_key)
    if not keep:
      return hidden, None
    # The scan has stacked the layers: [L, B, K, T, H].
    [(k, v)] = kept
    return hidden, KV(k, v, positions, segment_ids > 0)

  def step(
    self,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    past: tuple[KV, ...],
    own: KV,
    column: Int[Array, ""],
    layers: list[Params] | Params | None = None,
  ) -> tuple[Float[Array, "B E"], KV]:
    """Reads one more token per row and writes its keys to `column` of `own`.

    Args:
      tokens: the rows' last tokens.
      positions: their positions.
      past: shared keys; row b reads group b // (B // G).
      own: the rows' own cache, `[L, B, K, C, H]` or one array per layer;
        columns after `column` are not read.
      column: where this token goes, the same for all rows.
      layers: what `unstack` returned. A loop calls it once, outside.

    Returns:
      Hidden states as of `__call__`, and `own` as `KV.unstack` gives it.
    """
    # The new token is the last, so every key that is real may be attended to.
    positions = positions[:, None]
    rope = self.rope(positions, positions + 1)
    own_positions = own.positions.at[:, column].set(positions[:, 0])
    own_mask = own.mask.at[:, column].set(True)
    near = positions[:, :, None] - own_positions[:, None, :]
    # One graph serves all layers, which differ in their parameters alone.
    graph, _ = nnx.split(self.blocks)

    # One block; `write` puts the token's keys and values into the cache.
    def read(x, params, window, past_kv, write):
      def attention(q, k, v, scale, cap=0.0):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        k, v = write(*_constrain_heads((k, v), SHORT_ROWS))
        shared = _past_parts(past, past_kv, positions, window)
        mine = (k, v, own_mask[:, None, :] & _within(near, window))
        return attend(q, [*shared, mine], scale=scale, cap=cap)

      block = nnx.merge(graph, params)
      x = block(x, attention, self.layer_rope(rope, window), None)
      return constrain(x, SHORT_ROWS)

    # The cache is written in place, as it is a loop's carry, or donated.
    put = jax.lax.dynamic_update_slice
    x = constrain(self.embed(tokens[:, None], positions), SHORT_ROWS)
    layers = self.unstack() if layers is None else layers
    if isinstance(layers, list):
      cache = []  # filled layer by layer
      windows = self.config.windows
      for layer, params in enumerate(layers):

        def write(k, v, layer=layer):
          at = (0, 0, column, 0)
          cache.append((put(own.k[layer], k, at), put(own.v[layer], v, at)))
          return cache[-1]

        window = None if windows is None else jnp.asarray(windows[layer])
        past_kv = [(p.k[layer], p.v[layer]) for p in past]
        x = read(x, params, window, past_kv, write)
      k, v = zip(*cache, strict=True)
    else:

      def body(carry, xs):
        x, *cache = carry
        layer, params, window, past_kv = xs

        def write(k, v):
          at = (layer, 0, 0, column, 0)
          cache[:] = put(cache[0], k[None], at), put(cache[1], v[None], at)
          return cache[0][layer], cache[1][layer]

        # Here, and not before, where all layers together have not been.
        x = read(x, gathered(params), window, past_kv, write)
        return (x, *cache), None

      past_kv = [(p.k, p.v) for p in past]
      xs = (jnp.arange(len(own.k)), layers, self._windows(), past_kv)
      # In the carry: as `xs` every layer's cache would be copied in and out.
      (x, k, v), _ = jax.lax.scan(body, (x, own.k, own.v), xs)
    return self._states(x)[:, 0], KV(k, v, own_positions, own_mask)

  def unstack(self, stacked: bool = False) -> list[Params] | Params:
    """The layers' parameters in the compute dtype, for `step`.

    One tree per layer; beyond `UNROLLED` layers, or if `stacked`, one tree of
    stacked ones.
    """
    dtype = self.config.dtype
    params = jax.tree.map(
      lambda p: p.astype(dtype), layer_params(self.blocks)[1]
    )
    count = self.config.layers
    if stacked or count > UNROLLED:
      return params
    take = operator.itemgetter
    return [jax.tree.map(take(i), params) for i in range(count)]

  def unembed(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
    """Float32 logits over the vocabulary, of a call's hidden states."""
    head = self.embedding if self.config.tied else self.lm_head
    return head.attend(hidden)

  def chunked_unembed(self) -> Callable[[Array], Array]:
    """`unembed` for loops over chunks: its matrix is gathered once, before."""
    if self.config.head != "lm":  # there is none
      return self.unembed
    head = self.embedding if self.config.tied else self.lm_head
    graph, state = nnx.split(head)
    return nnx.merge(graph, gathered(nnx.to_pure_dict(state))).attend

  def scores(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
  ) -> Float[Array, "B G"]:
    """The score head's values of each text, float32, one per group.

    `heads.pool` says which hidden state it reads.

    Args:
      tokens: ids, padded on either side.
      mask: True = a real token.
      types: ignored; encoders use it.
      dropout_key: as in a call.
    """
    del types
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    segment_ids = mask.astype(jnp.int32)
    # Left padding gets position 0, which its mask hides.
    hidden, _ = self(tokens, positions, segment_ids, dropout_key=dropout_key)
    # XLA would replicate what is gathered by index.
    pooled = constrain_rows(heads.pool(self.config, hidden, tokens, mask))
    return self.score_head(pooled.astype(jnp.float32))

  def _states(
    self, x: Float[Array, "B T D"], dropout_key: Array | None = None
  ) -> Float[Array, "B T E"]:
    hidden = self.final_norm(x)
    if "lm_head" not in vars(self):  # tied, or a score model
      return hidden
    return self.lm_head.extend(hidden, dropout_key)

  def _windows(self) -> Int[Array, " L"] | None:
    windows = self.config.windows
    return None if windows is None else jnp.asarray(windows)


def _constrain_heads(kv, rows: Axes = ROWS):
  """Keys and values `[B, K, T, H]`: rows and heads split over the mesh."""
  return jax.tree.map(lambda x: constrain(x, rows, "tensor"), kv)


def _attended(
  segment_ids: Int[Array, "B T"], prompt_segment_ids: Int[Array, "B T"] | None
) -> Bool[Array, "B T T"]:
  """Which columns a token attends to: earlier ones, of its two segments."""
  length = segment_ids.shape[1]
  # Padding is segment 0 and attends to padding, which nothing reads.
  mask = segment_ids[:, :, None] == segment_ids[:, None, :]
  if prompt_segment_ids is not None:
    mask |= prompt_segment_ids[:, :, None] == segment_ids[:, None, :]
  return constrain_tokens(mask & jnp.tril(jnp.ones((length, length), bool)))


def _within(near: Int[Array, "B T C"], window) -> Bool[Array, "B T C"] | bool:
  """Keys less than `window` positions back; 0 or None = all of them."""
  if window is None:  # no layer of the model has a window
    return True
  return (window == 0) | (near < window)


def _past_parts(past, past_kv, positions, window):
  """The shared groups as parts of `attend`; each row gets its group's mask."""
  parts = []
  for shared, (k, v) in zip(past, past_kv, strict=True):
    # Keys stay one per group; the mask is needed for each row.
    repeat = positions.shape[0] // shared.mask.shape[0]
    mask = jnp.repeat(shared.mask, repeat, axis=0)[:, None, :]
    if window is not None:
      keys = jnp.repeat(shared.positions, repeat, axis=0)
      mask = mask & _within(positions[:, :, None] - keys[:, None, :], window)
    parts.append((k, v, jnp.broadcast_to(mask, (*positions.shape, k.shape[2]))))
  return parts
