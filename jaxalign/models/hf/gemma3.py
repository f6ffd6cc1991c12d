"""Gemma 3 text folders: two rotary bases, normalised queries and keys."""

import dataclasses
from typing import Unpack

from jaxalign.errors import UserError
from jaxalign.models.gemma import GemmaConfig
from jaxalign.models.hf import gemma2, llama, rotary
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches

MODEL_TYPE = "gemma3_text"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Gemma3") | dict.fromkeys(
  ("score_last", "score_eos", "score_mean"),
  "Gemma3TextForSequenceClassification",
)
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
DEFAULTS: JsonObject = gemma2.DEFAULTS | {
  "max_position_embeddings": 131072,
  "final_logit_softcapping": None,
  "attn_logit_softcapping": None,
  "rope_theta": 1e6,
  "rope_local_base_freq": 1e4,
  "sliding_window_pattern": 6,
}
names = gemma2.names


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> GemmaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  local = fields.get(float, "rope_local_base_freq")
  # transformers 5 has an object for the layers of either kind.
  both = fields.raw("rope_parameters") or {}
  if llama.FULL in both:
    sliding = both.get(llama.SLIDING) or {}
    inner = {"rope_parameters": sliding, "rope_theta": local}
    local, _, scaling = rotary.read(Fields(inner, fields.where))
    if scaling is not None:
      raise UserError(
        f"{fields.where}: rope_type {scaling.kind!r} is not supported for "
        f"{llama.SLIDING}"
      )
    values = fields.values | {"rope_parameters": both[llama.FULL]}
    fields = dataclasses.replace(fields, values=values)
  every = fields.size("sliding_window_pattern")
  config = gemma2.gemma(fields, llama.read(fields, **switches), every=every)
  return dataclasses.replace(
    config,
    local_base=local,
    windows=config.windows or (0,) * config.layers,
    qk_norm=True,
  )


def to_hf(config: GemmaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  values = gemma2.to_hf(config)
  windows = config.windows or (0,)
  local = {"rope_type": "default", "rope_theta": config.local_base}
  return values | {
    # transformers 4 reads these two.
    "rope_local_base_freq": config.local_base,
    "sliding_window_pattern": (*windows, 0).index(0) + 1,
    "rope_parameters": {
      llama.FULL: values["rope_parameters"],
      llama.SLIDING: local,
    },
  }
