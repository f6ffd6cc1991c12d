"""GPT-NeoX folders: `config.json` and tensor names."""

from typing import Unpack

from jaxalign.models.hf import rotary
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.neox import NeoXConfig

MODEL_TYPE = "gpt_neox"
BASE = "gpt_neox."
CLASSES = {
  "lm": "GPTNeoXForCausalLM",
  "score_last": "GPTNeoXForSequenceClassification",
  "score_eos": "GPTNeoXForSequenceClassification",
  "score_mean": "GPTNeoXForSequenceClassification",
}
HEADS = ("score_head",)
ALIASES = (
  ("embed_out.", "lm_head."),
  ("lm_head.", "embed_out."),  # adapters of older transformers
  # SuperHF's reward models call their score head `v_head`.
  ("score.", "v_head."),
)
IGNORED = (
  # Buffers that older files carry and nobody needs.
  r"attention\.(bias|masked_bias)$",
  r"rotary_emb\.inv_freq$",
  # The head that another task would use.
  r"^(embed_out|lm_head|score|v_head)\.",
)


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> NeoXConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  # 0.25 is transformers' default for GPT-NeoX.
  kinds = ("default", "linear", "dynamic", "llama3", "yarn")
  base, share, scaling = rotary.read(fields, fraction=0.25, kinds=kinds)
  return NeoXConfig(
    vocab_size=fields.size("vocab_size"),
    hidden_size=fields.size("hidden_size"),
    layers=fields.size("num_hidden_layers"),
    heads=fields.size("num_attention_heads"),
    intermediate_size=fields.size("intermediate_size"),
    max_positions=fields.size("max_position_embeddings", default=2048),
    rotary_fraction=share,
    rotary_base=base,
    rotary_scaling=scaling,
    eps=fields.get(float, "layer_norm_eps", default=1e-5),
    activation=fields.get(str, "hidden_act", default="gelu"),
    parallel=fields.get(bool, "use_parallel_residual", default=True),
    attention_bias=fields.get(bool, "attention_bias", default=True),
    tied=fields.get(bool, "tie_word_embeddings", default=False),
    eos_id=fields.token_id("eos_token_id", default=0),
    pad_id=fields.token_id("pad_token_id", default=-1),
    **switches,
  )


def to_hf(config: NeoXConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_positions,
    # transformers 4 reads these two; `write` adds what version 5 reads.
    "rotary_pct": config.rotary_fraction,
    "rotary_emb_base": config.rotary_base,
    **rotary.write(
      config.rotary_base, config.rotary_fraction, config.rotary_scaling
    ),
    "layer_norm_eps": config.eps,
    "hidden_act": config.activation,
    "use_parallel_residual": config.parallel,
    "attention_bias": config.attention_bias,
    "tie_word_embeddings": config.tied,
    "eos_token_id": config.eos_id,
  }


def names(config: NeoXConfig) -> dict[str, str]:
  """Our modules -> theirs."""
  del config
  layer = "gpt_neox.layers.{i}"
  return {
    "embedding": "gpt_neox.embed_in",
    "blocks.input_layernorm": f"{layer}.input_layernorm",
    "blocks.post_attention_layernorm": f"{layer}.post_attention_layernorm",
    "blocks.query_key_value": f"{layer}.attention.query_key_value",
    "blocks.dense": f"{layer}.attention.dense",
    "blocks.dense_h_to_4h": f"{layer}.mlp.dense_h_to_4h",
    "blocks.dense_4h_to_h": f"{layer}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "score_head": "score",
  }
