"""LLaMA folders: `config.json` and tensor names."""

from typing import Unpack

from jaxalign.models.hf import rotary
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "llama"
CONFIG = LlamaConfig
BASE = "model."
CLASSES = {
  "lm": "LlamaForCausalLM",
  "score_last": "LlamaForSequenceClassification",
  "score_eos": "LlamaForSequenceClassification",
  "score_mean": "LlamaForSequenceClassification",
}
HEADS = ("score_head",)
ALIASES = (("score.", "v_head."),)
# Buffers of older files, and the head that another task would use.
IGNORED = (r"rotary_emb\.inv_freq$", r"^(lm_head|score|v_head)\.")


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  base, _, scaling = rotary.read(fields)
  heads = fields.size("num_attention_heads")
  width = fields.size("hidden_size")
  return LlamaConfig(
    vocab_size=fields.size("vocab_size"),
    hidden_size=width,
    layers=fields.size("num_hidden_layers"),
    heads=heads,
    # Absent in LLaMA 1's files: each query head has keys of its own.
    kv_heads=fields.size("num_key_value_heads", default=heads),
    # Absent in older files, whose heads share the width evenly.
    head_dim=fields.size("head_dim", default=width // heads),
    intermediate_size=fields.size("intermediate_size"),
    max_positions=fields.size("max_position_embeddings", default=2048),
    rotary_base=base,
    rotary_scaling=scaling,
    eps=fields.get(float, "rms_norm_eps", default=1e-6),
    activation=fields.get(str, "hidden_act", default="silu"),
    attention_bias=fields.get(bool, "attention_bias", default=False),
    mlp_bias=fields.get(bool, "mlp_bias", default=False),
    tied=fields.get(bool, "tie_word_embeddings", default=False),
    eos_id=fields.token_id("eos_token_id", default=2),
    **switches,
  )


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_positions,
    # transformers 4 reads this; `write` adds what version 5 reads.
    "rope_theta": config.rotary_base,
    **rotary.write(config.rotary_base, None, config.rotary_scaling),
    "rms_norm_eps": config.eps,
    "hidden_act": config.activation,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    "tie_word_embeddings": config.tied,
    "eos_token_id": config.eos_id,
  }


def names(config: LlamaConfig) -> dict[str, str]:
  """Our modules -> theirs."""
  del config
  layer = "model.layers.{i}"
  return {
    "embedding": "model.embed_tokens",
    "blocks.input_layernorm": f"{layer}.input_layernorm",
    "blocks.post_attention_layernorm": f"{layer}.post_attention_layernorm",
    "blocks.q_proj": f"{layer}.self_attn.q_proj",
    "blocks.k_proj": f"{layer}.self_attn.k_proj",
    "blocks.v_proj": f"{layer}.self_attn.v_proj",
    "blocks.o_proj": f"{layer}.self_attn.o_proj",
    "blocks.gate_proj": f"{layer}.mlp.gate_proj",
    "blocks.up_proj": f"{layer}.mlp.up_proj",
    "blocks.down_proj": f"{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "score_head": "score",
  }
