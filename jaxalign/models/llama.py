"""LLaMA (Touvron et al. 2023) and its relatives.

These are Mistral (Jiang et al. 2023), Qwen2, Qwen2.5 and Qwen3 (Yang et al.
2024, 2025), and Phi-3 and Phi-4 (Abdin et al. 2024). They differ in switches.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.models import rope as rotary
from jaxalign.models.causal import CausalLM
from jaxalign.models.layers import ACTIVATIONS, Linear, RMSNorm, adapter


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and switches of LLaMA or one of its relatives.

  Attributes:
    kv_heads: key and value heads; each serves heads / kv_heads query heads.
    head_dim: features of a head; heads * head_dim may differ from hidden_size.
    model_type: Hugging Face's name, which folders are written under.
    rotary_fraction: share of each head's features that is rotated.
    rotary_scaling: stretches the context, see `rope.Scaling`.
    windows: for each layer how many positions it sees, the token's own
      included, 0 = all; None = every layer sees all.
    attention_bias: queries, keys and values have a bias.
    output_bias: attention's output projection has one.
    mlp_bias: all projections of the MLP have one.
    qk_norm: each head's queries and keys are normalised before the rotation.
    fused: one projection makes queries, keys and values, one gate and up.
    attention_cap: attention's logits stay below it; 0 = no cap.
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
  kv_heads: int
  head_dim: int
  intermediate_size: int
  model_type: str = "llama"
  max_positions: int = 2048
  rotary_fraction: float = 1.0
  rotary_base: float = 10000.0
  rotary_scaling: rotary.Scaling | None = None
  eps: float = 1e-6
  activation: str = "silu"
  windows: tuple[int, ...] | None = None
  attention_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  fused: bool = False
  attention_cap: float = 0.0
  tied: bool = False
  head: str = "lm"
  groups: tuple[str, ...] = ()
  eos_id: int = 2
  pad_id: int = dataclasses.field(default=-1, repr=False)
  dtype: str = "float32"
  remat: str = "none"
  attention: str = dataclasses.field(default="dense", repr=False)

  @property
  def scale(self) -> float:
    """What attention's products are multiplied by."""
    return self.head_dim**-0.5

  @property
  def context_switch(self) -> int:
    """The longest text that longrope rotates as a short one; 0 = no other."""
    return self.rotary_scaling.switch if self.rotary_scaling else 0

  @property
  def lora_targets(self) -> tuple[str, ...]:
    """The layers that get adapters where a run names none, as in peft."""
    return ("qkv_proj",) if self.fused else ("q_proj", "v_proj")

  @property
  def module(self) -> type[nnx.Module]:
    """The module that these sizes describe."""
    return Llama

  def norm(self, width: int = 0) -> nnx.Module:
    """A new normalisation layer, of the hidden states or of a head."""
    return RMSNorm(width or self.hidden_size, eps=self.eps)


class LlamaBlock(nnx.Module):
  """RMSNorm, grouped-query attention, and a gated MLP."""

  def __init__(self, config: LlamaConfig, *, lora=None, rngs: nnx.Rngs):
    self.config = config

    def linear(name, din, dout, bias):
      return Linear(din, dout, bias=bias, lora=adapter(lora, name), rngs=rngs)

    width, inner = config.hidden_size, config.intermediate_size
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    self.input_layernorm = config.norm()
    self.post_attention_layernorm = config.norm()
    # Attention. Phi-3's files, and adapters to it, have the fused layers, so
    # they stay fused here.
    bias = config.attention_bias
    if config.fused:
      self.qkv_proj = linear("qkv_proj", width, queries + 2 * keys, bias)
    else:
      self.q_proj = linear("q_proj", width, queries, bias)
      self.k_proj = linear("k_proj", width, keys, bias)
      self.v_proj = linear("v_proj", width, keys, bias)
    if config.qk_norm:
      self.q_norm = config.norm(config.head_dim)
      self.k_norm = config.norm(config.head_dim)
    self.o_proj = linear("o_proj", queries, width, config.output_bias)
    # The MLP.
    bias = config.mlp_bias
    if config.fused:
      self.gate_up_proj = linear("gate_up_proj", width, 2 * inner, bias)
    else:
      self.gate_proj = linear("gate_proj", width, inner, bias)
      self.up_proj = linear("up_proj", width, inner, bias)
    self.down_proj = linear("down_proj", inner, width, bias)

  def __call__(self, x: Float[Array, "B T D"], attend, rope, key):
    """One layer; `attend(q, k, v, scale=, cap=)` knows masks and caches."""
    x = x + self._attention(self.input_layernorm(x), attend, rope, key)
    return x + self._mlp(self.post_attention_layernorm(x), key)

  def _attention(self, x, attend, rope, key):
    config = self.config
    # Queries and keys differ in their number of heads.
    if config.fused:
      qkv = self.qkv_proj(x, key).reshape(*x.shape[:2], -1, config.head_dim)
      ends = [config.heads, config.heads + config.kv_heads]
      q, k, v = jnp.split(qkv, ends, axis=2)
    else:
      q, k, v = (
        proj(x, key).reshape(*x.shape[:2], -1, config.head_dim)
        for proj in (self.q_proj, self.k_proj, self.v_proj)
      )
    if config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotary.rotate(q, rope), rotary.rotate(k, rope)
    # Fewer key heads than query heads: `attend` shares them in runs.
    out = attend(q, k, v, scale=config.scale, cap=config.attention_cap)
    return self.o_proj(out.reshape(*x.shape[:2], -1), key)

  def _mlp(self, x, key):
    # A gated linear unit, with silu the SwiGLU of Shazeer (2020).
    act = ACTIVATIONS[self.config.activation]
    if self.config.fused:
      gate, up = jnp.split(self.gate_up_proj(x, key), 2, axis=-1)
    else:
      gate, up = self.gate_proj(x, key), self.up_proj(x, key)
    return self.down_proj(act(gate) * up, key)


class Llama(CausalLM[LlamaConfig]):
  """A language model or score model of LLaMA's kind."""

  block = LlamaBlock

  def rope(self, positions, lengths):
    """Rotary angles of these positions."""
    config = self.config
    # Rounded down as in transformers.
    width = int(config.head_dim * config.rotary_fraction)
    return rotary.angles(
      positions,
      lengths,
      width,
      config.rotary_base,
      scaling=config.rotary_scaling,
      max_positions=config.max_positions,
    )
