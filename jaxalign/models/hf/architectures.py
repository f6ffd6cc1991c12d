"""The architectures that folders may hold.

To add one: a file like `neox.py` and a line here.
"""

from types import ModuleType

from jaxalign.models.hf import deberta, gpt_neo, llama, neox
from jaxalign.models.model import Model

ARCHITECTURES: dict[str, ModuleType] = {
  module.MODEL_TYPE: module for module in (deberta, gpt_neo, llama, neox)
}


def architecture(model: Model) -> ModuleType:
  """The module that knows this model's files."""
  for module in ARCHITECTURES.values():
    if module.CONFIG is type(model.config):
      return module
  raise AssertionError(type(model.config))
