"""DPO's config, and the losses that online DPO shares."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.rules import Rule, field
from jaxalign.config.supervised import PreferenceConfig, ReferenceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLossConfig(ReferenceConfig):
  """DPO's losses of a chosen and a rejected completion."""

  loss: str = field(
    "sigmoid",
    "of the two completions' log-ratios to the reference",
    choices=("sigmoid", "robust", "hinge", "ipo"),
    also=("loss_type",),
  )
  # cDPO (Mitchell 2023) with sigmoid, robust DPO (Chowdhury 2024) with robust.
  label_smoothing: float = field(
    0.0, "share of labels taken to be wrong (sigmoid, robust)", "[0, 0.5)"
  )
  length_normalised: bool = field(
    False, "log-ratios are means over tokens, as in TRL's ipo"
  )
  sft_coefficient: float = field(
    0.0,
    "weight of the chosen completions' -log p a token, which keeps them likely",
    ">= 0",
    also=("rpo_alpha",),
  )

  def rules(self) -> Iterator[Rule]:
    """What the losses require."""
    yield from super().rules()
    yield Rule(
      self.label_smoothing == 0 or self.loss in ("sigmoid", "robust"),
      f"label_smoothing must be 0 while loss={self.loss!r}",
      "sigmoid and robust have it",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(PairLossConfig, PreferenceConfig):
  """Direct preference optimisation on stored comparisons."""

  algorithm: str = field("dpo", "what to run", choices=("dpo",))


CONFIG = DPOConfig
