"""Phi-3 and Phi-4 folders: fused projections, a part of each head rotated."""

import dataclasses
from typing import Unpack

from jaxalign.models.hf import llama, mistral, rotary
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "phi3"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Phi3")
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
DEFAULTS: JsonObject = {
  "max_position_embeddings": 4096,
  "original_max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
  "eos_token_id": 32000,
}
names = llama.names


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  kinds = ("default", "longrope")
  config = llama.read(fields, partial=True, kinds=kinds, **switches)
  windows = mistral.read_window(fields, config.layers)
  return dataclasses.replace(config, windows=windows, fused=True)


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  values = mistral.to_hf(config)
  scaling = config.rotary_scaling
  if scaling is not None:
    # transformers 4 wants these three alone, and computes the attention factor.
    factor = config.max_positions / scaling.original
    default = rotary.longrope_attention(factor, scaling.original)
    if scaling.attention == default:
      values["rope_scaling"] = {
        "type": scaling.kind,
        "short_factor": list(scaling.short),
        "long_factor": list(scaling.long),
      }
  # transformers 4 looks for it here.
  return values | {"partial_rotary_factor": config.rotary_fraction}
