"""Qwen2 and Qwen2.5 folders: biases, and windows in the upper layers."""

import dataclasses
from typing import Unpack

from jaxalign.models.hf import llama
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig

MODEL_TYPE = "qwen2"
BASE, HEADS = llama.BASE, llama.HEADS
CLASSES = llama.classes("Qwen2")
ALIASES, IGNORED = llama.ALIASES, llama.IGNORED
DEFAULTS: JsonObject = {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
names = llama.names


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  fields = fields.over(DEFAULTS)
  config = llama.read(fields, **switches)
  return dataclasses.replace(
    config,
    # Queries, keys and values have a bias in every Qwen2, and no other layer.
    attention_bias=True,
    windows=read_windows(fields, config.layers),
  )


def read_windows(fields: Fields, layers: int) -> tuple[int, ...] | None:
  """Each layer's window; without `layer_types` the upper layers have one."""
  # Null means none. It is there, and means nothing, in most files.
  window = fields.get(int, "sliding_window", default=0)
  if not fields.get(bool, "use_sliding_window", default=False):
    window = 0
  full = fields.get(int, "max_window_layers")
  full = full if window else layers
  kinds = [llama.FULL] * min(full, layers)
  kinds += [llama.SLIDING] * (layers - len(kinds))
  return llama.windows(fields, kinds, window)


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  windows = config.windows or (0,) * config.layers
  # Older readers know only models whose upper layers have the window.
  full = windows.index(max(windows)) if config.windows else config.layers
  return llama.write(config) | {
    "use_sliding_window": config.windows is not None,
    "sliding_window": max(windows) or None,
    "max_window_layers": full,
    "layer_types": [llama.SLIDING if w else llama.FULL for w in windows],
  }
