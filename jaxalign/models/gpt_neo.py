"""GPT-Neo (Black et al. 2021), backbone of SuperHF's later reward models."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from jaxalign.models.causal import CausalLM
from jaxalign.models.layers import (
  ACTIVATIONS,
  Embedding,
  LayerNorm,
  Linear,
  adapter,
)


@dataclasses.dataclass(frozen=True)
class GPTNeoConfig:
  """Sizes and switches of a GPT-Neo model.

  Attributes:
    max_positions: rows of the position table, so no text can be longer.
    windows: for each layer how many positions it sees, the token's own
      included; 0 = all.
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
  windows: tuple[int, ...]
  max_positions: int = 2048
  eps: float = 1e-5
  activation: str = "gelu_new"
  tied: bool = True
  head: str = "lm"
  groups: tuple[str, ...] = ()
  eos_id: int = 50256
  pad_id: int = dataclasses.field(default=-1, repr=False)
  dtype: str = "float32"
  remat: str = "none"
  attention: str = dataclasses.field(default="dense", repr=False)

  model_type = "gpt_neo"
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
    return ("q_proj", "v_proj")

  @property
  def module(self) -> type[nnx.Module]:
    """The module that these sizes describe."""
    return GPTNeo

  def norm(self) -> nnx.Module:
    """A new normalisation layer."""
    return LayerNorm(self.hidden_size, eps=self.eps)


class GPTNeoBlock(nnx.Module):
  """LayerNorm, global or windowed attention, and MLP, in sequence."""

  def __init__(self, config: GPTNeoConfig, *, lora=None, rngs: nnx.Rngs):
    self.config = config

    def linear(name, din, dout, bias=True):
      return Linear(din, dout, bias=bias, lora=adapter(lora, name), rngs=rngs)

    width, inner = config.hidden_size, config.intermediate_size
    self.ln_1 = config.norm()
    self.ln_2 = config.norm()
    # As released: q, k and v have no bias.
    self.q_proj = linear("q_proj", width, width, bias=False)
    self.k_proj = linear("k_proj", width, width, bias=False)
    self.v_proj = linear("v_proj", width, width, bias=False)
    self.out_proj = linear("out_proj", width, width)
    self.c_fc = linear("c_fc", width, inner)
    self.c_proj = linear("c_proj", inner, width)

  def __call__(self, x: Float[Array, "B T D"], attend, rope, key):
    """One layer; `attend(q, k, v, scale=...)` knows masks and caches."""
    del rope  # positions are learned and already in x
    x = x + self._attention(self.ln_1(x), attend, key)
    act = ACTIVATIONS[self.config.activation]
    return x + self.c_proj(act(self.c_fc(self.ln_2(x), key)), key)

  def _attention(self, x, attend, key):
    shape = (*x.shape[:2], self.config.heads, self.config.head_dim)
    q, k, v = (
      proj(x, key).reshape(shape)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    # GPT-Neo was trained without the usual 1 / sqrt(H).
    return self.out_proj(attend(q, k, v, scale=1.0).reshape(x.shape), key)


class GPTNeo(CausalLM[GPTNeoConfig]):
  """A GPT-Neo language model or score model."""

  block = GPTNeoBlock

  def __init__(self, config: GPTNeoConfig, *, lora=None, rngs: nnx.Rngs):
    super().__init__(config, lora=lora, rngs=rngs)
    self.position_embedding = Embedding(
      config.max_positions, config.hidden_size, rngs=rngs
    )

  def embed(self, tokens, positions):
    """Token and position embeddings, summed."""
    # Positions are learned, hence the limit on the length of a text.
    x = self.embedding(tokens) + self.position_embedding(positions)
    return x.astype(self.config.dtype)
