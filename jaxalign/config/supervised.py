"""The configs that learn from a data set: fine-tuning and reward models."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, divides, field
from jaxalign.config.sections import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(TrainingConfig):
  """What learning from a data set needs, whatever the loss."""

  steps: int = field(
    0, "optimizer updates; 0 = as many as `epochs` takes", rule=">= 0"
  )
  epochs: float = field(
    1.0,
    "passes over the data where steps is 0",
    rule="> 0",
    also=("num_train_epochs",),
  )
  data: str = field(
    "lab",
    "training rows: lab, a hub id, a file or a glob; several with commas",
    also=("dataset", "dataset_name", "train_data"),
  )
  validation_data: str = field(
    "", "held-out rows, written like data; empty = none", also=("eval_dataset",)
  )
  validation_rows: int = field(
    0, "held-out rows to use; 0 = all of validation_data", rule=">= 0"
  )
  validation_interval: int = field(
    0,
    "updates between validations; 0 = only at the end",
    rule=">= 0",
    also=("eval_steps",),
  )
  max_example_chars: int = field(
    0, "longer rows are left out, in characters; 0 = no limit", rule=">= 0"
  )
  max_bad_share: float = field(
    0.01, "share of unusable data rows that is tolerated", rule="[0, 1]"
  )
  batch_size: int = field(
    8,
    "rows in one optimizer update, over all devices",
    rule=">= 1",
    also=("train_batch_size", "per_device_train_batch_size"),
  )
  micro_batch: int = field(
    0,
    "rows in one forward and backward pass; 0 = batch_size",
    rule=">= 0",
    also=("gradient_accumulation_steps",),
  )

  def rules(self) -> Iterator[Rule]:
    """What holds for learning from a data set."""
    yield from super().rules()
    yield divides(
      "micro_batch", self.micro_batch, "batch_size", self.batch_size
    )
    yield Rule(
      "data", bool(self.data), "must name a source", "lab is the smallest"
    )
    yield Rule(
      "validation_interval",
      self.validation_interval == 0 or bool(self.validation_data),
      "must be 0 while validation_data is empty",
      "name validation_data or set the interval to 0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
  """Supervised fine-tuning, next-token loss."""

  algorithm: str = field("sft", "what to run", choices=("sft",))
  packing: bool = field(
    False, "put several texts in one row; none attends to another"
  )
  loss_on: str = field(
    "completion",
    "tokens that count: completion = the answer, all = the whole text",
    choices=("completion", "all"),
    also=("completion_only_loss",),
  )
  train_eos: bool = field(True, "put the end of text behind every row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig(SupervisedConfig):
  """A reward model, from preferences or from another model's scores."""

  algorithm: str = field(
    "reward_model", "what to run", choices=("reward_model",)
  )
  loss: str = field(
    "pairwise",
    "pairwise = chosen against rejected rows, distill = rows with a reward",
    choices=("pairwise", "distill", "both"),
  )
  distill_weight: float = field(
    1.0, "weight of the squared error to the given reward", rule=">= 0"
  )
  soft_labels: bool = field(
    False,
    "pairs of scored answers are learned with sigmoid(reward - reward) as "
    "label, not as certain",
  )
  reward_column: str = field(
    "reward", "column of the given reward in rows to distill from"
  )
  group_column: str = field(
    "",
    "column that says who judged a row; each group gets a score head of its "
    "own on the shared trunk; empty = one head",
    also=("annotator", "annotator_column", "group"),
  )
  groups: tuple[str, ...] = field(
    (),
    "names of the heads in their order; empty = the policy's, or else all that "
    "the data hold",
  )
  answers_per_prompt: int = field(
    2,
    "scored answers of one prompt that stand in one batch (distill, both)",
    rule=">= 1",
  )
  margin: bool = field(
    False, "ask for the margin in the column `margin` (Touvron 2023)"
  )
  centring: float = field(
    0.0,
    "weight of (chosen + rejected)^2, which keeps scores around 0",
    rule=">= 0",
    source="TRL suggests 0.01",
    also=("center_rewards_coefficient",),
  )
  encoding: str = field(
    "concat",
    "concat = one text (SuperHF's way), pair = prompt and answer as segments",
    choices=("concat", "pair"),
  )
  head: str = field(
    "auto",
    "where the score is read; auto = as the model folder says",
    choices=("auto", "score_last", "score_eos", "score_mean", "score_context"),
  )
  dropout: float = field(
    0.0,
    "probability of dropping a hidden feature in training; DeBERTa only",
    rule="[0, 1)",
    source="DeBERTa itself: 0.1",
  )
  half: str = field(
    "all",
    "half of each data set by row, so that two models share no row",
    choices=("all", "first", "second"),
    source="SuperHF's train and test reward models",
  )

  @property
  def derived(self) -> tuple[str, ...]:
    """The names of the groups, too."""
    is_open = bool(self.group_column) and not self.groups
    return (*super().derived, *(("groups",) if is_open else ()))

  def rules(self) -> Iterator[Rule]:
    """What the losses and heads ask for."""
    yield from super().rules()
    yield Rule(
      "groups",
      not self.groups or bool(self.group_column),
      "must be empty while group_column is empty",
      "name the column that says who judged a row",
    )
    yield Rule(
      "groups",
      not self.groups or len(self.groups) == len(set(self.groups)) > 1,
      "must be empty or two names or more, none twice",
      "write alice,bob",
    )
    rows = self.micro_batch or self.batch_size
    yield Rule(
      "answers_per_prompt",
      self.loss == "pairwise" or rows % self.answers_per_prompt == 0,
      f"must divide the {rows} rows of a pass while loss={self.loss!r}",
      "answers of one prompt are compared in one pass",
    )
    yield Rule(
      "micro_batch" if self.micro_batch else "batch_size",
      self.loss != "pairwise" or rows % 2 == 0,
      "must be even while loss='pairwise'",
      "a comparison is two rows of one pass",
    )
    yield Rule(
      "head",
      self.policy != "init" or self.head != "auto",
      "must be named while policy='init'",
      "score_context for deberta-v2, score_last or score_mean for others",
    )
    yield Rule(
      "soft_labels",
      not self.soft_labels or self.loss == "both",
      "needs loss='both'",
      "chosen and rejected rows have no scores to go by",
    )
    yield Rule(
      "reward_column",
      self.loss == "pairwise" or bool(self.reward_column),
      f"must name a column while loss={self.loss!r}",
      "reward is the usual name",
    )
