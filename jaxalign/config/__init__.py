"""A run's config: frozen dataclasses, their rules, one place that validates.

A config file gives a mapping (an `ml_collections.ConfigDict`);
`algorithms.read_config` turns it into the dataclass of its method or says in
one line what is wrong.
"""

import dataclasses
from typing import Any

from jaxalign.config.hints import choose_preset, nearest
from jaxalign.config.names import (
  names_function,
  parse_groups,
  parse_models,
  weighs_groups,
)
from jaxalign.config.online import OnlineConfig
from jaxalign.config.read import read, rename_aliases
from jaxalign.config.rules import Row, describe
from jaxalign.config.sections import InitConfig, TrainingConfig
from jaxalign.config.supervised import PreferenceConfig, SupervisedConfig

__all__ = [
  "InitConfig",
  "OnlineConfig",
  "PreferenceConfig",
  "Row",
  "SupervisedConfig",
  "TrainingConfig",
  "choose_preset",
  "describe",
  "names_function",
  "nearest",
  "parse_groups",
  "parse_models",
  "read",
  "rename_aliases",
  "to_mapping",
  "weighs_groups",
]


def to_mapping(config: TrainingConfig) -> dict[str, Any]:  # values: JSON
  """Every field as nested dicts: `read_config` gives the config back."""
  return dataclasses.asdict(config)
