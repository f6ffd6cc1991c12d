"""LLaMA 1, 2 and 3.x (Touvron et al. 2023; Dubey et al. 2024)."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxalign.models import rope as rotary
from jaxalign.models.causal import CausalLM
from jaxalign.models.layers import ACTIVATIONS, Linear, RMSNorm, adapter


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and switches of a LLaMA model.

  Attributes:
    kv_heads: key and value heads; each serves heads / kv_heads query heads.
    head_dim: features of a head; heads * head_dim may differ from hidden_size.
    rotary_scaling: stretches the context, see `rope.Scaling`.
    tied: the output matrix is the embedding.
    groups: whose score each column of the score head is; () = one column.
    eos_id: end-of-text id, read by the `score_eos` head only.
    dtype: compute dtype; parameters may have another.
    remat: recompute each block's activations in the backward pass.
  """

  vocab_size: int
  hidden_size: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  intermediate_size: int
  max_positions: int = 2048
  rotary_base: float = 10000.0
  rotary_scaling: rotary.Scaling | None = None
  eps: float = 1e-6
  activation: str = "silu"
  attention_bias: bool = False
  mlp_bias: bool = False
  tied: bool = False
  head: str = "lm"
  groups: tuple[str, ...] = ()
  eos_id: int = 2
  dtype: str = "float32"
  remat: bool = False

  windows = None  # every layer attends to everything before it

  @property
  def module(self) -> type[nnx.Module]:
    """The module that these sizes describe."""
    return Llama

  def norm(self) -> nnx.Module:
    """A new normalisation layer."""
    return RMSNorm(self.hidden_size, eps=self.eps)


class LlamaBlock(nnx.Module):
  """RMSNorm, grouped-query attention, and a gated MLP."""

  def __init__(self, config: LlamaConfig, *, lora=None, rngs: nnx.Rngs):
    self.config = config

    def linear(name, din, dout, bias):
      return Linear(din, dout, bias=bias, lora=adapter(lora, name), rngs=rngs)

    width, inner = config.hidden_size, config.intermediate_size
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    bias = config.attention_bias
    self.input_layernorm = config.norm()
    self.post_attention_layernorm = config.norm()
    self.q_proj = linear("q_proj", width, queries, bias)
    self.k_proj = linear("k_proj", width, keys, bias)
    self.v_proj = linear("v_proj", width, keys, bias)
    self.o_proj = linear("o_proj", queries, width, bias)
    self.gate_proj = linear("gate_proj", width, inner, config.mlp_bias)
    self.up_proj = linear("up_proj", width, inner, config.mlp_bias)
    self.down_proj = linear("down_proj", inner, width, config.mlp_bias)

  def __call__(self, x: Float[Array, "B T D"], attend, rope, key):
    """One layer; `attend(q, k, v, scale=...)` knows masks and caches."""
    x = x + self._attention(self.input_layernorm(x), attend, rope, key)
    return x + self._mlp(self.post_attention_layernorm(x), key)

  def _attention(self, x, attend, rope, key):
    config = self.config
    shape = (*x.shape[:2], -1, config.head_dim)
    # -1: queries and keys differ in their number of heads.
    q = rotary.rotate(self.q_proj(x, key).reshape(shape), rope)
    k = rotary.rotate(self.k_proj(x, key).reshape(shape), rope)
    v = self.v_proj(x, key).reshape(shape)
    # Fewer key heads than query heads: `attend` shares them in runs.
    out = attend(q, k, v, scale=config.head_dim**-0.5)
    return self.o_proj(out.reshape(*x.shape[:2], -1), key)

  def _mlp(self, x, key):
    # A gated linear unit, with silu the SwiGLU of Shazeer (2020).
    act = ACTIVATIONS[self.config.activation]
    return self.down_proj(
      act(self.gate_proj(x, key)) * self.up_proj(x, key), key
    )


class Llama(CausalLM[LlamaConfig]):
  """A LLaMA language model or score model."""

  block = LlamaBlock

  def rope(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Rotary angles of these positions."""
    config = self.config
    return rotary.angles(
      positions,
      config.head_dim,
      config.rotary_base,
      scaling=config.rotary_scaling,
      max_positions=config.max_positions,
    )
