"""The architectures that folders may hold.

To add one: a file like `neox.py` and a line in `_MODULES`. A `config` of type
`Any` is one whose `model_type` is the file's `MODEL_TYPE`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Unpack, runtime_checkable

from jaxalign.models.config import ModelConfig
from jaxalign.models.hf import (
  deberta,
  gemma2,
  gemma3,
  gpt_neo,
  llama,
  mistral,
  neox,
  phi3,
  qwen2,
  qwen3,
)
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.hf.table import Entry
from jaxalign.models.model import Model


@runtime_checkable  # the tests check annotations at run time
class Architecture(Protocol):
  """What the file of an architecture holds."""

  @property
  def MODEL_TYPE(self) -> str:
    """The architecture's name in `config.json`."""

  @property
  def BASE(self) -> str:
    """Prefix of the backbone's tensors, absent in some files."""

  @property
  def CLASSES(self) -> Mapping[str, str]:
    """Head -> the class that transformers loads it with."""

  @property
  def HEADS(self) -> tuple[str, ...]:
    """Modules that may be drawn at random where the files lack them."""

  @property
  def ALIASES(self) -> tuple[tuple[str, str], ...]:
    """(start of a tensor's name, what stands there in other files)."""

  @property
  def IGNORED(self) -> tuple[str, ...]:
    """Patterns of tensors that files carry and the model does not need."""

  def from_hf(
    self, fields: Fields, **switches: Unpack[Switches]
  ) -> ModelConfig:
    """The config of a `config.json`."""

  def to_hf(self, config: Any) -> JsonObject:
    """The architecture's part of `config.json`."""

  def names(self, config: Any) -> Mapping[str, str | Entry]:
    """Our modules -> theirs, see `table.entries`."""


_MODULES: tuple[Architecture, ...] = (
  deberta,
  gemma2,
  gemma3,
  gpt_neo,
  llama,
  mistral,
  neox,
  phi3,
  qwen2,
  qwen3,
)
ARCHITECTURES = {module.MODEL_TYPE: module for module in _MODULES}


def architecture(model: Model) -> Architecture:
  """The module that knows this model's files."""
  return ARCHITECTURES[model.config.model_type]
