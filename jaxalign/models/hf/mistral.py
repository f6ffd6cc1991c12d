"""Mistral folders: LLaMA's, with a window for all layers."""

import dataclasses
from typing import Unpack

from jaxalign.models.hf import llama
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "mistral"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Mistral")
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
DEFAULTS: JsonObject = {
  "num_key_value_heads": 8,
  "max_position_embeddings": 4096 * 32,
  "sliding_window": 4096,
  "eos_token_id": 2,
}
names = llama.names


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  config = llama.read(fields, **switches)
  return dataclasses.replace(config, windows=read_window(fields, config.layers))


def read_window(fields: Fields, layers: int) -> tuple[int, ...] | None:
  """`sliding_window` for all layers; null = none."""
  if fields.raw("sliding_window") is None:
    return None
  return (fields.size("sliding_window"),) * layers


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  # Null has to be written: without the field there would be a window.
  window = config.windows[0] if config.windows else None
  return llama.write(config) | {"sliding_window": window}
