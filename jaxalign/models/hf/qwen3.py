"""Qwen3 folders: Qwen2's, with normalised queries and keys."""

import dataclasses
from typing import Unpack

from jaxalign.models.hf import llama, qwen2
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "qwen3"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Qwen3")
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
# The head's width does not follow from the model's.
DEFAULTS: JsonObject = qwen2.DEFAULTS | {"head_dim": 128}
names = llama.names


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  config = llama.read(fields, **switches)
  bias = fields.get(bool, "attention_bias", default=False)
  return dataclasses.replace(
    config,
    attention_bias=bias,
    output_bias=bias,
    qk_norm=True,
    windows=qwen2.read_windows(fields, config.layers),
  )


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  return qwen2.to_hf(config) | {"attention_bias": config.attention_bias}
