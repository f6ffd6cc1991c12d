"""DeBERTa-v2 and v3 (He et al. 2021) as a reward model.

To the product of contents, attention adds the products of the query's content
with the key's relative position (c2p) and of the key's content with the query's
(p2c). Both depend on the position only through the distance i - j, so they are
matrix products with one row per distance, sheared into place. Nothing is
gathered over [T, T]: that gather would dominate the forward pass, and its
scatter the backward pass even more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import remat
from jaxalign.models.cache import NEGATIVE
from jaxalign.models.heads import Scored
from jaxalign.models.layers import (
  ACTIVATIONS,
  Embedding,
  LayerNorm,
  Linear,
  adapter,
  cast_small,
  dropout,
  layer_params,
  stack,
)
from jaxalign.parallel.mesh import SHORT_ROWS, constrain, scatter_tokens

BLOCK = 128  # rows of attention that are compared with positions at once


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
  """Sizes and switches of a DeBERTa-v2 or v3 encoder with a score head.

  Attributes:
    max_positions: rows of the absolute position table, if there is one.
    relative: whether attention uses relative positions at all.
    max_distance: > 0; larger distances count as this one.
    buckets: > 0: distances above buckets / 2 fall into logarithmic buckets,
      so that there are 2 * buckets relative positions; 0: one each.
    pos_att_type: subset of ("c2p", "p2c").
    share_att_key: relative positions go through the content projections.
    norm_relative: layer norm on the relative position table.
    conv_kernel_size: odd; of v2's convolution, parallel to the first layer; 0 =
      none.
    embedding_size: width of the embeddings before their projection; 0 =
      hidden_size, no projection.
    type_vocab_size: rows of the segment-type table; 0 = types are ignored.
    position_biased_input: absolute positions are added to the embeddings.
    head: "score_context" (first token, dense, activation, linear) or
      "score_mean" (linear on the mean over real tokens).
    groups: whose score each column of the score head is; () = one column.
    dropout: probability of dropping a feature in training, of the embeddings
      and of what attention and MLP add; attention weights are not dropped.
    dtype: compute dtype; parameters may have another.
    remat: what the backward pass computes again, see `models.remat`.
  """

  vocab_size: int
  hidden_size: int
  layers: int
  heads: int
  intermediate_size: int
  max_positions: int = 512
  relative: bool = True
  max_distance: int = 512
  buckets: int = 256
  pos_att_type: tuple[str, ...] = ("c2p", "p2c")
  share_att_key: bool = True
  norm_relative: bool = True
  conv_kernel_size: int = 0
  conv_groups: int = 1
  conv_activation: str = "tanh"
  embedding_size: int = 0
  type_vocab_size: int = 0
  position_biased_input: bool = False
  eps: float = 1e-7
  activation: str = "gelu"
  pooler_activation: str = "gelu"
  head: str = "score_context"
  groups: tuple[str, ...] = ()
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"

  model_type = "deberta-v2"

  @property
  def head_dim(self) -> int:
    """H, features of one head."""
    return self.hidden_size // self.heads

  @property
  def span(self) -> int:
    """Relative positions run from -span to span - 1."""
    return self.buckets or self.max_distance

  @property
  def lora_targets(self) -> tuple[str, ...]:
    """The layers that get adapters where a run names none, as in peft."""
    return ("query_proj", "value_proj")

  @property
  def module(self) -> type[nnx.Module]:
    """The nnx class of this architecture."""
    return Deberta

  def norm(self) -> nnx.Module:
    """A new layer norm of the hidden states."""
    return LayerNorm(self.hidden_size, eps=self.eps)


def relative_rows(
  config: DebertaConfig, distances: Int[np.ndarray, " C"]
) -> Int[np.ndarray, " C"]:
  """The row of the relative position table for each distance i - j.

  Short distances have a row each; from buckets / 2 = m on,
  bucket = m + ⌈(m − 1) ln(|d| / m) / ln((max_distance − 1) / m)⌉.
  """
  signed = distances
  if config.buckets:
    middle = config.buckets // 2
    # float32 as in transformers: the rounding decides at bucket borders.
    far = np.maximum(np.abs(distances), middle).astype(np.float32) / middle
    reach = np.log(np.float32((config.max_distance - 1) / middle))
    bucket = np.ceil(np.log(far) / reach * np.float32(middle - 1)) + middle
    near = np.abs(distances) <= middle
    signed = np.where(near, distances, np.sign(distances) * bucket).astype(int)
  # Row 0 is the distance -span; transformers clips in the same way.
  return np.clip(signed + config.span, 0, 2 * config.span - 1)


def shear(x: Float[Array, "*N R C"], columns: int) -> Float[Array, "*N R T"]:
  """Shifts row i left by R - 1 - i: out[i, j] = x[i, j - i + R - 1].

  Args:
    x: C = R + columns; the last column is not read.
    columns: T, how many columns to keep.
  """
  *lead, rows, width = x.shape
  # A reshape instead of a gather: read as rows that are one shorter, each row
  # starts one column further left than the row above it.
  flat = x.reshape(*lead, rows * width)
  flat = flat[..., rows - 1 : rows - 1 + rows * (width - 1)]
  return flat.reshape(*lead, rows, width - 1)[..., :columns]


class DebertaBlock(nnx.Module):
  """Disentangled attention and an MLP, each followed by its layer norm."""

  def __init__(self, config: DebertaConfig, *, lora=None, rngs: nnx.Rngs):
    self.config = config
    width, inner = config.hidden_size, config.intermediate_size

    def linear(name, din, dout):
      return Linear(din, dout, lora=adapter(lora, name), rngs=rngs)

    self.query_proj = linear("query_proj", width, width)
    self.key_proj = linear("key_proj", width, width)
    self.value_proj = linear("value_proj", width, width)
    # v2 without shared keys projects positions by matrices of their own.
    if config.relative and not config.share_att_key:
      if "c2p" in config.pos_att_type:
        self.pos_key_proj = linear("pos_key_proj", width, width)
      if "p2c" in config.pos_att_type:
        self.pos_query_proj = linear("pos_query_proj", width, width)
    self.attention_output = linear("attention_output", width, width)
    self.attention_norm = config.norm()
    self.intermediate = linear("intermediate", width, inner)
    self.output = linear("output", inner, width)
    self.output_norm = config.norm()

  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
    relative: Float[Array, "E D"] | None,
    queries: int,
    key: Array | None = None,
  ) -> Float[Array, "B Q D"]:
    """The block's output at the first `queries` tokens."""
    rate = self.config.dropout
    # For q, k, v; attention's output, its dropout; the MLP's two, its dropout.
    keys = [None] * 8 if key is None else list(jax.random.split(key, 8))
    attention = functools.partial(self._attention, queries=queries)
    attention = remat.of_attention(attention, self.config.remat)
    attended = attention(x, mask, relative, keys=keys[:3])
    attended = self.attention_output(attended, keys[3])
    attended = dropout(attended, rate, keys[4])
    # Normalised after each residual sum; the causal models do so before.
    x = self.attention_norm(x[:, :queries] + attended)
    act = ACTIVATIONS[self.config.activation]
    out = self.output(act(self.intermediate(x, keys[5])), keys[6])
    return self.output_norm(x + dropout(out, rate, keys[7]))

  def _attention(self, x, mask, relative, queries, keys):
    config = self.config
    kinds = config.pos_att_type if config.relative else ()
    # A score sums 1 + kinds products, hence 1 / sqrt((1 + kinds) H).
    # As released: the kinds count here even if `relative` is off.
    scale = (config.head_dim * (1 + len(config.pos_att_type))) ** -0.5
    q = self._heads(self.query_proj(x[:, :queries], keys[0])) * scale
    k = self._heads(self.key_proj(x, keys[1]))
    v = self._heads(self.value_proj(x, keys[2]))
    # Content with content. Heads come first, so that a product with distances
    # is one matrix product per head over all rows of the batch.
    scores = _product("binh,bjnh->nbij", q, k)
    length = x.shape[1]
    # The query's content with the key's relative position.
    if "c2p" in kinds:
      # Row c stands for the distance queries - 1 - c; `shear` lines them up.
      project = self.key_proj if config.share_att_key else self.pos_key_proj
      distances = queries - 1 - np.arange(queries + length)
      rows = self._positions(project, relative, distances)
      scores += _by_distance(q, rows, length)
    # The key's content with the query's relative position.
    if "p2c" in kinds:
      project = self.query_proj if config.share_att_key else self.pos_query_proj
      # k carries no scale, so the positions are scaled.
      if queries == 1:  # one distance per key: nothing to shear
        rows = self._positions(project, relative, -np.arange(length)) * scale
        scores += _product("bjnh,jnh->nbj", k, rows)[:, :, None]
      else:
        # Keys are the rows: entry c is the distance c - length + 1.
        distances = np.arange(queries + length) - length + 1
        rows = self._positions(project, relative, distances) * scale
        seen = _by_distance(k, rows, queries)
        scores += jnp.swapaxes(seen, -1, -2)

    # Heads come first: the mask [B, 1, T] lines up with [N, B, Q, T].
    scores = jnp.where(mask[:, None, :], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    out = jnp.einsum("nbij,bjnh->binh", weights, v)
    return out.reshape(*out.shape[:2], config.hidden_size)

  def _positions(self, project, relative, distances) -> Float[Array, "C N H"]:
    """One projected relative position per distance."""
    # Distances are known at trace time, so the rows are constants.
    rows = relative_rows(self.config, distances)
    # Short texts use a narrow band of the table; only that is projected.
    low, high = rows.min(), rows.max() + 1
    return self._heads(project(relative[low:high]))[rows - low]

  def _heads(self, x: Float[Array, "... D"]) -> Float[Array, "... N H"]:
    return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_dim)


def _by_distance(
  x: Float[Array, "B R N H"], positions: Float[Array, "C N H"], columns: int
) -> Float[Array, "N B R T"]:
  """Products with the position that each column has, seen from each row.

  Args:
    x: queries, or keys.
    positions: one for each of C = R + T distances; those of row r, from its
      first column to its last, begin at R - 1 - r.
    columns: T.
  """
  count, parts = x.shape[1], []
  # b rows see b + T of the R + T distances; `shear` throws the others away.
  for start in range(0, count, BLOCK):
    end = min(start + BLOCK, count)
    near = positions[count - end : count - start + columns]
    products = _product("binh,cnh->nbic", x[:, start:end], near)
    parts.append(shear(products, columns))
  return jnp.concatenate(parts, axis=2)


# Scores are summed in float32 whatever the compute dtype.
def _product(subscripts: str, a: Array, b: Array) -> Array:
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


class Convolution(nnx.Module):
  """v2's layer parallel to the first block: mixes neighbouring embeddings."""

  def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, size = config.hidden_size, config.conv_kernel_size
    # Width, input features of a group, output features: WIO below.
    shape = (size, width // config.conv_groups, width)
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs(), shape))
    self.bias = nnx.Param(jnp.zeros(width))
    self.norm = config.norm()

  def __call__(
    self,
    embedded: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """The first block's output plus the convolved embeddings, normalised."""
    out = jax.lax.conv_general_dilated(
      embedded,
      self.kernel[...].astype(embedded.dtype),
      window_strides=(1,),
      padding="SAME",
      dimension_numbers=("NWC", "WIO", "NWC"),
      feature_group_count=self.config.conv_groups,
    )
    out = out + self.bias[...].astype(out.dtype)
    act = ACTIVATIONS[self.config.conv_activation]
    # Padding is set to zero, as transformers does after this layer.
    return self.norm(hidden + act(out)) * mask[..., None]


class Deberta(Scored, nnx.Module):
  """Embeddings, L blocks and a score head."""

  def __init__(self, config: DebertaConfig, *, lora=None, rngs: nnx.Rngs):
    # The embeddings.
    self.config = config
    width = config.hidden_size
    inner = config.embedding_size or width
    self.embedding = Embedding(config.vocab_size, inner, rngs=rngs)
    if config.position_biased_input:
      self.position_embeddings = Embedding(
        config.max_positions, inner, rngs=rngs
      )
    if config.type_vocab_size:
      self.type_embeddings = Embedding(config.type_vocab_size, inner, rngs=rngs)
    if inner != width:
      own = adapter(lora, "embed_proj")
      self.embed_proj = Linear(inner, width, bias=False, lora=own, rngs=rngs)
    self.embedding_norm = config.norm()

    # The blocks, and what they share.
    self.blocks = stack(
      lambda r: DebertaBlock(config, lora=lora, rngs=r), config.layers, rngs
    )
    if config.relative:
      self.rel_embeddings = Embedding(2 * config.span, width, rngs=rngs)
      if config.norm_relative:
        self.relative_norm = config.norm()
    if config.conv_kernel_size:
      self.conv = Convolution(config, rngs=rngs)

    # The head.
    if config.head == "score_context":
      self.pooler = Linear(width, width, rngs=rngs)
    self.score_head = Linear(width, len(config.groups) or 1, rngs=rngs)

  def scores(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
  ) -> Float[Array, "B G"]:
    """The score head's values of each text, float32, one per group.

    Args:
      tokens: ids, [CLS] first; padded on either side.
      mask: True = a real token.
      types: segment of each token; None = all 0.
      dropout_key: turns dropout on (training); None turns it off.
    """
    context = self.config.head == "score_context"
    hidden, mask = self.encode(tokens, mask, types, context, dropout_key)
    if context:  # the [CLS] token, as in transformers' ContextPooler
      act = ACTIVATIONS[self.config.pooler_activation]
      pooled = act(self.pooler(hidden[:, 0].astype(jnp.float32)))
    else:
      kept = mask[..., None]
      total = jnp.where(kept, hidden.astype(jnp.float32), 0).sum(axis=1)
      pooled = total / jnp.maximum(mask.sum(axis=1), 1)[:, None]
    return self.score_head(pooled).astype(jnp.float32)

  def encode(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    first_only: bool = False,
    dropout_key: Array | None = None,
  ) -> tuple[Float[Array, "B Q D"], Bool[Array, "B T"]]:
    """Hidden states after the last block, and the mask that goes with them.

    Texts are moved to column 0, so that padding may be on either side.

    Args:
      tokens: see `scores`.
      mask: see `scores`.
      types: see `scores`.
      first_only: return only the first token, Q = 1 instead of T; the last
        block then computes little more than its keys and values.
      dropout_key: see `scores`.
    """
    # Moving each text to column 0.
    config, length = self.config, tokens.shape[1]
    start = jnp.argmax(mask, axis=1, keepdims=True)
    # What stands before the text wraps around to the end of the row.
    columns = (jnp.arange(length) + start) % length
    tokens, mask = (
      constrain(jnp.take_along_axis(a, columns, axis=1), SHORT_ROWS)
      for a in (tokens, mask)
    )
    if types is not None:
      types = jnp.take_along_axis(types, columns, axis=1)

    # Embedding.
    keys = proj_key = None
    if dropout_key is not None:
      # For the embeddings, the blocks, and the projection's adapter.
      dropout_key, layers_key, proj_key = jax.random.split(dropout_key, 3)
      keys = jax.random.split(layers_key, config.layers)
    embedded = constrain(
      self._embed(tokens, mask, types, dropout_key, proj_key), SHORT_ROWS
    )
    relative = self._relative()
    graph, params = layer_params(self.blocks)

    # A block that gives the states of the first `queries` tokens.
    def layer(queries, scanned=False):
      def run(x, one):
        params, key = one
        block = nnx.merge(graph, cast_small(params, config.dtype))
        x = block(remat.block_input(x), mask, relative, queries, key)
        return constrain(x, SHORT_ROWS)

      return remat.of_block(run, config.remat, scanned=scanned)

    def block(i):
      return jax.tree.map(lambda p: p[i], (params, keys))

    # Running the blocks: a scan over those that read and give whole texts. v2's
    # first has a convolution next to it, the last may give one token only.
    full = layer(length)
    x, first = embedded, 0
    if config.conv_kernel_size:
      x, first = self.conv(embedded, full(x, block(0)), mask), 1
    last = config.layers
    if first_only and last > first:
      last -= 1
    if last > first:
      middle = jax.tree.map(lambda p: p[first:last], (params, keys))
      body = layer(length, scanned=True)
      x, _ = jax.lax.scan(lambda x, p: (body(x, p), None), x, middle)
    if first_only:
      # A lone block with a convolution has already run in full.
      x = layer(1)(x, block(-1)) if last < config.layers else x[:, :1]
    return x, mask

  def _embed(self, tokens, mask, types, key, proj_key) -> Float[Array, "B T D"]:
    x = scatter_tokens(self.embedding(tokens), SHORT_ROWS)
    if self.config.position_biased_input:
      x = x + self.position_embeddings(jnp.arange(tokens.shape[1]))
    if self.config.type_vocab_size:
      types = jnp.zeros_like(tokens) if types is None else types
      x = x + self.type_embeddings(types)
    if "embed_proj" in vars(self):
      x = self.embed_proj(x, proj_key)
    # Zero at padding: the convolution reads across the text's end.
    x = self.embedding_norm(x) * mask[..., None]
    return dropout(x, self.config.dropout, key).astype(self.config.dtype)

  def _relative(self) -> Float[Array, "E D"] | None:
    """The table of relative positions, in the compute dtype."""
    if not self.config.relative:
      return None
    table = self.rel_embeddings.embedding[...]
    # Normalised once, as all blocks share the table.
    if self.config.norm_relative:
      table = self.relative_norm(table)
    return table.astype(self.config.dtype)
