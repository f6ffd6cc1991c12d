"""Gemma 2 and the text part of Gemma 3 (Gemma Team 2024, 2025).

LLaMA's layers with norms on both sides, logits that a tanh caps (Gemma 2), and
windows in most layers, which Gemma 3 rotates by another base.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxalign.models import rope as rotary
from jaxalign.models.causal import CausalLM
from jaxalign.models.layers import RMSNorm
from jaxalign.models.llama import LlamaBlock, LlamaConfig


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
  """Sizes and switches of a Gemma 2 or 3 model, besides those of LLaMA.

  Attributes:
    query_scalar: attention divides by its square root, instead of the head's
      width.
    logit_cap: the logits over the vocabulary stay below it; 0 = no cap.
    local_base: base of the rotation in layers with a window; 0 = as in others.
  """

  query_scalar: int = 256
  logit_cap: float = 0.0
  local_base: float = 0.0

  @property
  def scale(self) -> float:
    """What attention's products are multiplied by."""
    return self.query_scalar**-0.5

  @property
  def module(self) -> type[nnx.Module]:
    """The module that these sizes describe."""
    return Gemma

  def norm(self, width: int = 0) -> nnx.Module:
    """A new normalisation layer."""
    return GemmaNorm(width or self.hidden_size, eps=self.eps)


class GemmaNorm(RMSNorm):
  """`RMSNorm` whose scale is kept as its distance from 1."""

  def __init__(self, width: int, *, eps: float):
    super().__init__(width, eps=eps)
    self.scale = nnx.Param(jnp.zeros(width))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises and scales in float32, returns x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
    return (y * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class GemmaBlock(LlamaBlock):
  """LLaMA's block, with a norm after attention and MLP as well as before."""

  def __init__(self, config: GemmaConfig, *, lora=None, rngs: nnx.Rngs):
    super().__init__(config, lora=lora, rngs=rngs)
    self.pre_feedforward_layernorm = config.norm()
    self.post_feedforward_layernorm = config.norm()

  def __call__(self, x: Float[Array, "B T D"], attend, rope, key):
    """One layer; `attend(q, k, v, scale=, cap=)` knows masks and caches."""
    y = self._attention(self.input_layernorm(x), attend, rope, key)
    x = x + self.post_attention_layernorm(y)
    y = self._mlp(self.pre_feedforward_layernorm(x), key)
    return x + self.post_feedforward_layernorm(y)


class Gemma(CausalLM[GemmaConfig]):
  """A Gemma language model or score model."""

  block = GemmaBlock

  def embed(self, tokens, positions):
    """Token embeddings times the square root of their width."""
    x = super().embed(tokens, positions)
    # Rounded to the compute dtype, as in the released code.
    return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

  def rope(self, positions, lengths):
    """Rotary angles; of Gemma 3 those without and with a window, `[2, ...]`."""
    config = self.config
    width = config.head_dim
    angles = rotary.angles(
      positions,
      lengths,
      width,
      config.rotary_base,
      scaling=config.rotary_scaling,
      max_positions=config.max_positions,
    )
    if not config.local_base:
      return angles
    local = rotary.angles(positions, lengths, width, config.local_base)
    cos, sin = (jnp.stack(kinds) for kinds in zip(angles, local, strict=True))
    return cos, sin

  def layer_rope(self, rope, window):
    """The angles of a layer with this window."""
    if not self.config.local_base:
      return rope
    return tuple(jnp.where(window == 0, x[0], x[1]) for x in rope)

  def unembed(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
    """Float32 logits over the vocabulary, of a call's hidden states."""
    logits = super().unembed(hidden)
    cap = self.config.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits
