"""A run's config: frozen dataclasses, their rules, one place that validates.

A config file gives a mapping (an `ml_collections.ConfigDict`); `from_mapping`
turns it into the dataclass of its algorithm or says in one line what is wrong.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxalign.config.fields import Row, describe
from jaxalign.config.names import parse_groups, weighs_groups
from jaxalign.config.online import OnlineConfig
from jaxalign.config.ppo import (
  KLConfig,
  PPOConfig,
  RolloutConfig,
  ShapingConfig,
)
from jaxalign.config.preferences import (
  DPOConfig,
  KTOConfig,
  OnlineDPOConfig,
  PreferenceConfig,
)
from jaxalign.config.read import override, read
from jaxalign.config.sections import (
  CheckpointConfig,
  InitConfig,
  LoraConfig,
  MeshConfig,
  MetricsConfig,
  OptimizerConfig,
  PrecisionConfig,
  TrainingConfig,
)
from jaxalign.config.stages import (
  EvaluationConfig,
  SamplingConfig,
  ScoringConfig,
  SuperbatchConfig,
)
from jaxalign.config.superhf import SuperHFConfig
from jaxalign.config.supervised import (
  RewardModelConfig,
  SFTConfig,
  SupervisedConfig,
)
from jaxalign.errors import UserError

__all__ = [
  "CONFIGS",
  "CheckpointConfig",
  "DPOConfig",
  "EvaluationConfig",
  "InitConfig",
  "KLConfig",
  "KTOConfig",
  "LoraConfig",
  "MeshConfig",
  "MetricsConfig",
  "OnlineConfig",
  "OnlineDPOConfig",
  "OptimizerConfig",
  "PPOConfig",
  "PrecisionConfig",
  "PreferenceConfig",
  "RewardModelConfig",
  "RolloutConfig",
  "Row",
  "SFTConfig",
  "SamplingConfig",
  "ScoringConfig",
  "ShapingConfig",
  "SuperHFConfig",
  "SuperbatchConfig",
  "SupervisedConfig",
  "TrainingConfig",
  "choose_preset",
  "describe",
  "from_mapping",
  "parse_groups",
  "to_mapping",
  "weighs_groups",
]

CONFIGS: dict[str, type[TrainingConfig]] = {
  "superhf": SuperHFConfig,
  "ppo": PPOConfig,
  "online_dpo": OnlineDPOConfig,
  "sft": SFTConfig,
  "reward_model": RewardModelConfig,
  "dpo": DPOConfig,
  "kto": KTOConfig,
}


def from_mapping(
  mapping: Any, flags: Sequence[tuple[str, str]] = ()
) -> TrainingConfig:
  """The validated config of a run.

  Args:
    mapping: a dict or ConfigDict; `algorithm` chooses the dataclass, a field
      that is left out has its default.
    flags: (path below `config`, text) pairs of the command line, which go over
      the mapping, later ones over earlier ones.

  Raises:
    UserError: one line with the full path, the rule, the value, the remedy.
  """
  if not hasattr(mapping, "items"):
    raise UserError(
      f"config must be a mapping, got {type(mapping).__name__}; "
      "let get_config() return an ml_collections.ConfigDict"
    )
  name = dict(flags).get("algorithm", dict(mapping.items()).get("algorithm"))
  if not isinstance(name, str) or name not in CONFIGS:
    near = nearest(str(name), CONFIGS)
    raise UserError(
      f"config.algorithm must be one of {', '.join(CONFIGS)}, got {name!r}; "
      f"did you mean {near[0] if near else 'superhf'!r}?"
    )
  cls = CONFIGS[name]
  return read(cls, override(cls, mapping, flags))


def to_mapping(config: TrainingConfig) -> dict[str, Any]:
  """Every field as nested dicts: `from_mapping` gives the config back."""
  return dataclasses.asdict(config)


def choose_preset(presets: Mapping[str, Any], name: str, file: str) -> Any:
  """The preset of a config file, or a UserError with the nearest name.

  Args:
    presets: name -> preset.
    name: the one that was asked for.
    file: the config file's name, for the message.
  """
  if name in presets:
    return presets[name]
  near = nearest(name, presets)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  raise UserError(
    f"{file} has no preset {name!r}; {hint}it has {', '.join(presets)}"
  )


def nearest(name: str, names: Iterable[str]) -> list[str]:
  """Up to two names that a mistyped one may have meant."""
  return difflib.get_close_matches(name, list(names), 2, 0.6)
