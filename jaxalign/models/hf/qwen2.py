"""Qwen2 and Qwen2.5 folders: biases, and windows in the upper layers."""

import dataclasses
from typing import Unpack

from jaxalign.errors import UserError
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

_FULL, _SLIDING = "full_attention", "sliding_attention"


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
  """Each layer's window, from `layer_types` or `max_window_layers`.

  Raises:
    UserError: `layer_types` does not fit the model.
  """
  window = 0
  if fields.get(bool, "use_sliding_window", default=False):
    # Null means none here, too.
    window = fields.get(int, "sliding_window", default=0)
  kinds = fields.values.get("layer_types")
  if kinds is None:  # as in files that are older than the field
    full = fields.get(int, "max_window_layers")
    kinds = [_FULL if i < full else _SLIDING for i in range(layers)]
    kinds = kinds if window else [_FULL] * layers
  if len(kinds) != layers or not set(kinds) <= {_FULL, _SLIDING}:
    raise UserError(
      f"{fields.where}: layer_types names {len(kinds)} layers, "
      f"num_hidden_layers is {layers}; each is to be {_FULL!r} or {_SLIDING!r}"
    )
  if _SLIDING not in kinds:
    return None
  if window < 1:
    raise UserError(
      f"{fields.where}: layer_types has {_SLIDING!r}, which needs "
      "use_sliding_window=true and a sliding_window of at least 1"
    )
  return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  windows = config.windows or (0,) * config.layers
  # Older readers know only models whose upper layers have the window.
  full = windows.index(max(windows)) if config.windows else config.layers
  return llama.write(config) | {
    "use_sliding_window": config.windows is not None,
    "sliding_window": max(windows) or None,
    "max_window_layers": full,
    "layer_types": [_SLIDING if window else _FULL for window in windows],
  }
