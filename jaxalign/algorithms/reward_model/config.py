"""The config of a reward model's training."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.rules import Rule, field
from jaxalign.config.supervised import SupervisedConfig


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
    1.0, "weight of the squared error to the given reward", ">= 0"
  )
  soft_labels: bool = field(
    False, "scored pairs get the label sigmoid(reward - reward), not 1"
  )
  reward_column: str = field(
    "reward", "column of the given reward in rows to distill from"
  )
  group_column: str = field(
    "",
    "column that names the annotator of a row; each group gets its own score "
    "head on the shared trunk; empty = one head",
    also=("annotator", "annotator_column", "group"),
  )
  groups: tuple[str, ...] = field(
    (), "names of the heads in order; empty = the policy's, or the data's"
  )
  answers_per_prompt: int = field(
    2, "scored completions of one prompt in a batch (distill, both)", ">= 1"
  )
  margin: bool = field(
    False, "require the margin in the column `margin` (Touvron 2023)"
  )
  center_rewards_coefficient: float = field(
    0.0,
    "weight of (chosen + rejected)^2, which keeps scores around 0 (TRL "
    "suggests 0.01)",
    ">= 0",
    alias=("centring",),
  )
  system_prompt: str = field(
    "",
    "text directly before every prompt, or the system turn of dialogues that "
    "have none; the model is then always read with it",
    also=("conversation_prompt",),
  )
  encoding: str = field(
    "auto",
    "concat = one text (SuperHF's way), pair = prompt and completion as "
    "segments (DeBERTa), auto = pair where the model tells segments apart",
    choices=("auto", "concat", "pair"),
  )
  head: str = field(
    "auto",
    "where the score is read; auto = as the model's folder says, score_last "
    "for a language model",
    choices=("auto", "score_last", "score_eos", "score_mean", "score_context"),
  )
  dropout: float = field(
    0.0,
    "probability of dropping a hidden feature in training; DeBERTa only "
    "(DeBERTa itself: 0.1)",
    "[0, 1)",
  )
  half: str = field(
    "all",
    "half of each data set by row, so that two models share no row (SuperHF's "
    "train and test reward models)",
    choices=("all", "first", "second"),
  )

  @property
  def derived(self) -> tuple[str, ...]:
    """The encoding and the names of the groups too, where they are open."""
    is_open = {
      "groups": bool(self.group_column) and not self.groups,
      "encoding": self.encoding == "auto",
    }
    open_here = (name for name, value in is_open.items() if value)
    return (*super().derived, *open_here)

  def rules(self) -> Iterator[Rule]:
    """What the losses and heads require."""
    yield from super().rules()
    yield Rule(
      not self.groups or bool(self.group_column),
      "groups must be empty while group_column is empty",
      "name the column of the annotators",
    )
    yield Rule(
      not self.groups or len(self.groups) == len(set(self.groups)) > 1,
      "groups must be empty or two names or more, none twice",
      "write alice,bob",
    )
    rows = self.micro_rows  # compared within one pass, never across two
    yield Rule(
      self.loss == "pairwise" or rows % self.answers_per_prompt == 0,
      f"answers_per_prompt must divide the {rows} rows of a pass while "
      f"loss={self.loss!r}",
      "completions of one prompt are compared in one pass",
    )
    name = "micro_batch" if self.micro_batch else "batch_size"
    yield Rule(
      self.loss != "pairwise" or rows % 2 == 0,
      f"{name} must be even while loss='pairwise'",
      "a comparison is two rows of one pass",
    )
    # A new model has no folder that says where its score is read.
    yield Rule(
      self.policy != "init" or self.head != "auto",
      "head must be named while policy='init'",
      "score_context for deberta-v2, score_last or score_mean for others",
    )
    yield Rule(
      not self.soft_labels or self.loss == "both",
      "soft_labels needs loss='both'",
      "chosen and rejected rows have no scores to go by",
    )
    yield Rule(
      self.loss == "pairwise" or bool(self.reward_column),
      f"reward_column must name a column while loss={self.loss!r}",
      "reward is the usual name",
    )


CONFIG = RewardModelConfig
