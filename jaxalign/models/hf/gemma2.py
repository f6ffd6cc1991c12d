"""Gemma 2 folders: capped logits, and a window in every other layer."""

import dataclasses
from typing import Unpack

from jaxalign.models.gemma import GemmaConfig
from jaxalign.models.hf import llama
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "gemma2"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Gemma2")
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
DEFAULTS: JsonObject = {
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 8192,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "final_logit_softcapping": 30.0,
  "attn_logit_softcapping": 50.0,
  "hidden_activation": "gelu_pytorch_tanh",
  "tie_word_embeddings": True,
  "eos_token_id": 1,
  "pad_token_id": 0,
}


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> GemmaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  return gemma(fields, llama.read(fields, **switches), every=2)


def gemma(fields: Fields, read: LlamaConfig, *, every: int) -> GemmaConfig:
  """Adds what both Gemmas have to what LLaMA's relatives have.

  Args:
    fields: of the file, with the architecture's values for absent ones.
    read: `llama.read` of them.
    every: without `layer_types` each such layer has no window.
  """
  bias = fields.get(bool, "attention_bias", default=False)
  kinds = [
    llama.FULL if i % every == 0 else llama.SLIDING
    for i in range(1, read.layers + 1)
  ]
  window = fields.get(int, "sliding_window", default=0)
  base = {f.name: getattr(read, f.name) for f in dataclasses.fields(read)}
  return dataclasses.replace(
    GemmaConfig(**base),
    # Not `hidden_act`, which some files have too and transformers ignores.
    activation=fields.get(str, "hidden_activation"),
    windows=llama.windows(fields, kinds, window),
    attention_bias=bias,
    output_bias=bias,
    query_scalar=fields.size("query_pre_attn_scalar"),
    # Null is no cap.
    attention_cap=fields.get(float, "attn_logit_softcapping", default=0.0),
    logit_cap=fields.get(float, "final_logit_softcapping", default=0.0),
  )


def to_hf(config: GemmaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  windows = config.windows or (0,) * config.layers
  return llama.write(config) | {
    "hidden_activation": config.activation,
    "attention_bias": config.attention_bias,
    "query_pre_attn_scalar": config.query_scalar,
    "attn_logit_softcapping": config.attention_cap or None,
    "final_logit_softcapping": config.logit_cap or None,
    "sliding_window": max(windows) or None,
    "layer_types": [llama.SLIDING if w else llama.FULL for w in windows],
  }


def names(config: GemmaConfig) -> dict[str, str]:
  """Our modules -> theirs."""
  layer = "model.layers.{i}"
  return llama.names(config) | {
    f"blocks.{name}": f"{layer}.{name}"
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
  }
