"""The configs that learn from preferences without a reward model."""

import dataclasses
import re
from collections.abc import Iterator

from jaxalign.config.fields import Rule, divides, field
from jaxalign.config.online import OnlineConfig
from jaxalign.config.supervised import SupervisedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
  """What learning against a reference needs, whatever the loss."""

  beta: float = field(
    0.1,
    "how strongly the reference holds the policy",
    rule="> 0",
    source="Rafailov 2023; TRL",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(ReferenceConfig, SupervisedConfig):
  """The same with a data set."""

  train_eos: bool = field(True, "put the end of text behind every answer")
  reference: str = field(
    "auto",
    "auto = the policy before training stays in memory, as a copy or as the "
    "base under adapters; stored = it is run once over all texts, and what it "
    "found is kept in the run's folder",
    choices=("auto", "stored"),
    also=("precompute_ref_log_probs", "ref_model"),
  )
  reference_logps: str = field(
    "",
    "reference.npz of an earlier run of the same policy and data, read instead "
    "of running the reference; empty = run it",
  )

  def rules(self) -> Iterator[Rule]:
    """What a stored reference asks for."""
    yield from super().rules()
    yield Rule(
      "reference_logps",
      not self.reference_logps or self.reference == "stored",
      f"must be empty while reference={self.reference!r}",
      "set reference='stored' to use it",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLossConfig(ReferenceConfig):
  """DPO's losses of a pair of answers."""

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

  def pair_rules(self) -> Iterator[Rule]:
    """What the losses ask for."""
    yield Rule(
      "label_smoothing",
      self.label_smoothing == 0 or self.loss in ("sigmoid", "robust"),
      f"must be 0 while loss={self.loss!r}",
      "sigmoid and robust have it",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(PairLossConfig, PreferenceConfig):
  """Direct preference optimisation on stored comparisons."""

  algorithm: str = field("dpo", "what to run", choices=("dpo",))

  def rules(self) -> Iterator[Rule]:
    """What the data and the losses ask for."""
    yield from super().rules()
    yield from self.pair_rules()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(PairLossConfig, OnlineConfig):
  """DPO on two answers of the policy itself, compared as they come."""

  algorithm: str = field("online_dpo", "what to run", choices=("online_dpo",))
  pairs: int = field(
    32,
    "prompts in a step, each answered twice",
    rule=">= 1",
    also=("batch_size",),
  )
  micro_batch: int = field(
    0,
    "pairs in one forward and backward pass; 0 = pairs",
    rule=">= 0",
    also=("gradient_accumulation_steps",),
  )
  judge: str = field(
    "reward_model",
    "who says which answer is better: reward_model; people, by a queue file in "
    "the run's folder; or FILE.py:FUNCTION of (prompts, first, second)",
  )
  missing_eos_penalty: float = field(
    0.0,
    "taken off the score of an answer that was cut (reward_model)",
    rule=">= 0",
  )
  train_eos: bool = field(True, "put the end of text behind answers that ended")

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step."""
    return self.pairs

  @property
  def samples_per_prompt(self) -> int:
    """Answers to each of them: the two that are compared."""
    return 2

  def rules(self) -> Iterator[Rule]:
    """What the answers and the losses ask for."""
    yield from super().rules()
    yield from self.pair_rules()
    yield divides("micro_batch", self.micro_batch, "pairs", self.pairs)
    yield Rule(
      "judge",
      self.judge in ("reward_model", "people")
      or re.fullmatch(r".+\.py:\w+", self.judge) is not None,
      "must be reward_model, people or FILE.py:FUNCTION",
      "write my_judge.py:prefer for the function prefer in my_judge.py",
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
