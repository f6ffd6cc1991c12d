"""A model outside of traces: its config, its graph and its shapes.

Parameters are plain nested dicts of arrays with layers stacked on a leading
axis. They are passed along with the `Model`, never stored in it.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxalign.core.types import Params
from jaxalign.models.config import ModelConfig
from jaxalign.models.layers import LoraConfig


@dataclasses.dataclass(frozen=True)
class Model:
  """An architecture ready to be bound to parameters inside a trace."""

  config: ModelConfig
  graph: nnx.GraphDef
  shapes: Params  # jax.ShapeDtypeStruct leaves, float32
  lora: LoraConfig | None = None

  @staticmethod
  def build(config: ModelConfig, lora: LoraConfig | None = None) -> "Model":
    """Describes the model of `config`; allocates nothing."""

    def make():
      return config.module(config, lora=lora, rngs=nnx.Rngs(0))

    # Shapes alone: a model of any size is described in no memory.
    graph, state = nnx.split(nnx.eval_shape(make))
    # Without `Variable` wrappers a leaf is a bare ShapeDtypeStruct.
    return Model(config, graph, nnx.to_pure_dict(state), lora)

  def bind(self, params: Params) -> Any:  # of the class `config.module`
    """The module with these parameters; call it inside a trace."""
    return nnx.merge(self.graph, params)

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters (normal 0.02, norms 1, biases 0)."""
    return _init(self.config, self.lora, key)

  def replace(self, **changes: object) -> "Model":
    """The same parameters under another dtype, head or remat setting."""
    config = dataclasses.replace(self.config, **changes)
    return Model.build(config, self.lora)

  def without_lora(self) -> "Model":
    """The model whose parameters have no adapters: the reference policy."""
    return Model.build(self.config)


# One program, so that only the result is ever in memory; compiled once.
@jax.jit(static_argnums=(0, 1))
def _init(
  config: ModelConfig, lora: LoraConfig | None, key: jax.Array
) -> Params:
  module = config.module(config, lora=lora, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(module))
