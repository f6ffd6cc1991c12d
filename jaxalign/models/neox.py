"""GPT-NeoX (Black et al. 2022), the architecture of every Pythia model."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from jaxalign.models import rope as rotary
from jaxalign.models.causal import CausalLM
from jaxalign.models.layers import ACTIVATIONS, LayerNorm, Linear, adapter


@dataclasses.dataclass(frozen=True)
class NeoXConfig:
  """Sizes and switches of a GPT-NeoX model.

  Attributes:
    rotary_fraction: share of each head's features that is rotated.
    rotary_scaling: stretches the context, see `rope.Scaling`.
    parallel: attention and MLP read the same input (Pythia) or one after the
      other.
    tied: the output matrix is the embedding.
    groups: whose score each column of the score head is; () = one column.
    eos_id: end-of-text id, read by the `score_eos` head only.
    pad_id: passed over at a text's end by the `score_last` head only; -1 =
      none. Not in the repr: a reference has no such head.
    dtype: compute dtype; parameters may have another.
    remat: what the backward pass computes again, see `models.remat`.
    attention: one of `attention.KINDS`; not in the repr, as it changes nothing
      but rounding.
  """

  vocab_size: int
  hidden_size: int
  layers: int
  heads: int
  intermediate_size: int
  max_positions: int = 2048
  rotary_fraction: float = 0.25
  rotary_base: float = 10000.0
  rotary_scaling: rotary.Scaling | None = None
  eps: float = 1e-5
  activation: str = "gelu"
  parallel: bool = True
  attention_bias: bool = True
  tied: bool = False
  head: str = "lm"
  groups: tuple[str, ...] = ()
  eos_id: int = 0
  pad_id: int = dataclasses.field(default=-1, repr=False)
  dtype: str = "float32"
  remat: str = "none"
  attention: str = dataclasses.field(default="dense", repr=False)

  model_type = "gpt_neox"
  windows = None  # every layer attends to everything before it
  context_switch = 0

  @property
  def kv_heads(self) -> int:
    """Key and value heads: as many as query heads."""
    return self.heads

  @property
  def head_dim(self) -> int:
    """Features of a head."""
    return self.hidden_size // self.heads

  @property
  def lora_targets(self) -> tuple[str, ...]:
    """The layers that get adapters where a run names none, as in peft."""
    return ("query_key_value",)

  @property
  def module(self) -> type[nnx.Module]:
    """The module that these sizes describe."""
    return NeoX

  def norm(self) -> nnx.Module:
    """A new normalisation layer."""
    return LayerNorm(self.hidden_size, eps=self.eps)


class NeoXBlock(nnx.Module):
  """LayerNorm, attention and MLP, in parallel or in sequence."""

  def __init__(self, config: NeoXConfig, *, lora=None, rngs: nnx.Rngs):
    self.config = config
    width = config.hidden_size

    def linear(name, din, dout, bias=True):
      return Linear(din, dout, bias=bias, lora=adapter(lora, name), rngs=rngs)

    self.input_layernorm = config.norm()
    self.post_attention_layernorm = config.norm()
    bias = config.attention_bias
    # One product gives q, k and v; `_attention` takes it apart.
    self.query_key_value = linear("query_key_value", width, 3 * width, bias)
    self.dense = linear("dense", width, width, bias)
    inner = config.intermediate_size
    self.dense_h_to_4h = linear("dense_h_to_4h", width, inner)
    self.dense_4h_to_h = linear("dense_4h_to_h", inner, width)

  def __call__(self, x: Float[Array, "B T D"], attend, rope, key):
    """One layer; `attend(q, k, v, scale=...)` knows masks and caches."""
    attended = self._attention(self.input_layernorm(x), attend, rope, key)
    # Pythia adds both to the same input: one residual, two norms.
    if self.config.parallel:
      return x + attended + self._mlp(self.post_attention_layernorm(x), key)
    x = x + attended
    return x + self._mlp(self.post_attention_layernorm(x), key)

  def _attention(self, x, attend, rope, key):
    config = self.config
    qkv = self.query_key_value(x, key)
    # The released weights interleave q, k and v head by head.
    qkv = qkv.reshape(*x.shape[:2], config.heads, 3, config.head_dim)
    q, k, v = (qkv[..., i, :] for i in range(3))
    q, k = rotary.rotate(q, rope), rotary.rotate(k, rope)
    out = attend(q, k, v, scale=config.head_dim**-0.5)
    return self.dense(out.reshape(x.shape), key)

  def _mlp(self, x, key):
    act = ACTIVATIONS[self.config.activation]
    return self.dense_4h_to_h(act(self.dense_h_to_4h(x, key)), key)


class NeoX(CausalLM[NeoXConfig]):
  """A GPT-NeoX language model or score model."""

  block = NeoXBlock
  outputs = ("embed_out", "lm_head")  # in files, and in newer transformers

  def rope(self, positions, lengths):
    """Rotary angles of these positions."""
    config = self.config
    # Rounded down as in transformers; Pythia rotates a quarter of a head.
    width = int(config.head_dim * config.rotary_fraction)
    return rotary.angles(
      positions,
      lengths,
      width,
      config.rotary_base,
      scaling=config.rotary_scaling,
      max_positions=config.max_positions,
    )
