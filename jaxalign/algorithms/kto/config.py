"""KTO's config."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.rules import Rule, field
from jaxalign.config.supervised import PreferenceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOConfig(PreferenceConfig):
  """Kahneman-Tversky optimisation on labelled completions or comparisons."""

  algorithm: str = field("kto", "what to run", choices=("kto",))
  loss: str = field(
    "kto",
    "what log-ratios are compared with: kto = the KL estimated on mismatched "
    "pairs, apo_zero_unpaired = 0",
    choices=("kto", "apo_zero_unpaired"),
    also=("loss_type",),
  )
  desirable_weight: float = field(
    1.0,
    "weight of desirable completions' loss (Ethayarajh 2024: weight x rows of "
    "the two sides within 1 to 4/3)",
    "> 0",
  )
  undesirable_weight: float = field(
    1.0, "weight of undesirable completions' loss", "> 0"
  )

  def rules(self) -> Iterator[Rule]:
    """What the estimate of the KL requires."""
    yield from super().rules()
    yield Rule(
      self.batch_size > 1 or self.loss != "kto",
      "batch_size must be at least 2 while loss='kto'",
      "the KL is estimated on prompts with completions of other rows; raise "
      "it (micro_batch may stay 1) or use loss='apo_zero_unpaired'",
    )


CONFIG = KTOConfig
