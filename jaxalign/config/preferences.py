"""The configs that learn from preferences without a reward model."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, field
from jaxalign.config.supervised import SupervisedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(SupervisedConfig):
  """What learning against a reference needs, whatever the loss."""

  beta: float = field(
    0.1,
    "how strongly the reference holds the policy",
    rule="> 0",
    source="Rafailov 2023; TRL",
  )
  train_eos: bool = field(True, "put the end of text behind every answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
  """Direct preference optimisation on stored comparisons."""

  algorithm: str = field("dpo", "what to run", choices=("dpo",))
  loss: str = field(
    "sigmoid",
    "of the two answers' log-ratios to the reference",
    choices=("sigmoid", "robust", "hinge", "ipo"),
    also=("loss_type",),
  )
  label_smoothing: float = field(
    0.0,
    "share of labels taken to be wrong (sigmoid, robust)",
    rule="[0, 0.5)",
  )
  length_normalised: bool = field(
    False, "log-ratios are means a token; TRL's ipo"
  )
  sft_coefficient: float = field(
    0.0,
    "weight of the chosen answers' -log p a token, which keeps them likely",
    rule=">= 0",
    also=("rpo_alpha",),
  )

  def rules(self) -> Iterator[Rule]:
    """What the losses ask for."""
    yield from super().rules()
    yield Rule(
      "label_smoothing",
      self.label_smoothing == 0 or self.loss in ("sigmoid", "robust"),
      f"must be 0 while loss={self.loss!r}",
      "sigmoid and robust have it",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOConfig(PreferenceConfig):
  """Kahneman-Tversky optimisation on labelled answers or comparisons."""

  algorithm: str = field("kto", "what to run", choices=("kto",))
  loss: str = field(
    "kto",
    "kto = against how far the policy has moved on mismatched pairs, "
    "apo_zero_unpaired = against 0",
    choices=("kto", "apo_zero_unpaired"),
    also=("loss_type",),
  )
  desirable_weight: float = field(
    1.0,
    "weight of desirable answers' loss",
    rule="> 0",
    source="Ethayarajh 2024: weight x rows of the two sides within 1 to 4/3",
  )
  undesirable_weight: float = field(
    1.0, "weight of undesirable answers' loss", rule="> 0"
  )

  def rules(self) -> Iterator[Rule]:
    """What the estimate of the KL asks for."""
    yield from super().rules()
    yield Rule(
      "batch_size",
      self.batch_size > 1 or self.loss != "kto",
      "must be at least 2 while loss='kto'",
      "the KL is estimated on prompts with the answers of other rows; raise "
      "it (micro_batch may stay 1) or use loss='apo_zero_unpaired'",
    )
