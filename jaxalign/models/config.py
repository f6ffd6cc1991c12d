"""What the configs of all architectures have in common."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from flax import nnx


@runtime_checkable  # the test run checks annotations
class ModelConfig(Protocol):
  """Sizes and switches of a model: a frozen dataclass with these fields."""

  # What makes a class a dataclass for `dataclasses.replace`.
  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

  @property
  def model_type(self) -> str:
    """Hugging Face's name of the architecture, as in `config.json`."""
    ...

  @property
  def vocab_size(self) -> int:
    """V, rows of the embedding."""
    ...

  @property
  def hidden_size(self) -> int:
    """D, width of the hidden states."""
    ...

  @property
  def layers(self) -> int:
    """L, the number of blocks."""
    ...

  @property
  def heads(self) -> int:
    """N, query heads."""
    ...

  @property
  def head_dim(self) -> int:
    """H, features of a head."""
    ...

  @property
  def max_positions(self) -> int:
    """The context in tokens."""
    ...

  @property
  def activation(self) -> str:
    """The nonlinearity of the MLP, a key of `layers.ACTIVATIONS`."""
    ...

  @property
  def head(self) -> str:
    """`lm`, or where a score is read from: see `heads.pool`."""
    ...

  @property
  def groups(self) -> tuple[str, ...]:
    """Whose score each column of the score head is; () = one column."""
    ...

  @property
  def dtype(self) -> str:
    """The compute dtype; parameters may have another."""
    ...

  @property
  def remat(self) -> str:
    """What the backward pass computes again, see `models.remat`."""
    ...

  @property
  def lora_targets(self) -> tuple[str, ...]:
    """The layers that get adapters where a run names none, as in peft."""
    ...

  @property
  def module(self) -> type[Any]:  # a CausalLM or Deberta: both import this
    """The class of the module that these sizes describe."""
    ...

  def norm(self) -> nnx.Module:
    """A new normalisation layer."""
    ...


@runtime_checkable
class CausalConfig(ModelConfig, Protocol):
  """The config of a causal language model."""

  @property
  def kv_heads(self) -> int:
    """K, heads of keys and values; each serves N / K query heads."""
    ...

  @property
  def windows(self) -> tuple[int, ...] | None:
    """Positions each layer sees, its own too; 0 = all, None = all always."""
    ...

  @property
  def attention(self) -> str:
    """How whole texts are attended to: one of `attention.KINDS`."""
    ...

  @property
  def context_switch(self) -> int:
    """Texts of up to so many tokens rotate otherwise than longer; 0 = alike."""
    ...

  @property
  def tied(self) -> bool:
    """Whether the output matrix is the embedding."""
    ...

  @property
  def eos_id(self) -> int:
    """End-of-text id, read by the `score_eos` head."""
    ...

  @property
  def pad_id(self) -> int:
    """The id that the `score_last` head passes over at the end; -1 = none."""
    ...
