"""What all runs share that learn from answers of the policy itself."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, field
from jaxalign.config.names import parse_models, weighs_groups
from jaxalign.config.sections import TrainingConfig
from jaxalign.config.stages import (
  EvaluationConfig,
  SamplingConfig,
  ScoringConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainingConfig):
  """Prompts, how they are answered, and who judges the answers.

  A method says how many prompts a step has and how often each is answered:
  `prompts_per_step`, `samples_per_prompt`.
  """

  prompts: str = field(
    "lab",
    "prompt source: lab, a hub id, a file or a glob; several with commas",
    also=("data", "prompt_dataset_names"),
  )
  max_prompt_chars: int = field(
    1024,
    "longest prompt in characters, without system_prompt; longer ones are left "
    "out",
    rule=">= 1",
    source="SuperHF, later runs",
    also=("max_prompt_char_length",),
  )
  deduplicate: bool = field(True, "use every distinct prompt once")
  holdout: int = field(
    -1,
    "last rows of each set that are kept out of training; -1 = 2300 of "
    "SuperHF's sets without a test split, 0 of others",
    rule=">= -1",
    source="SuperHF, later runs",
  )
  num_prompts_per_set: int = field(
    0,
    "first prompts of each set to use, before shuffling; 0 = all",
    rule=">= 0",
    also=("num_prompts_per_dataset",),
  )
  num_prompts: int = field(
    0,
    "prompts to use, after shuffling; 0 = all",
    rule=">= 0",
    also=("debug_max_prompts",),
  )
  system_prompt: str = field(
    "", "text directly in front of every prompt", also=("conversation_prompt",)
  )
  max_bad_share: float = field(
    0.01, "share of unusable data rows that is tolerated", rule="[0, 1]"
  )
  sampling: SamplingConfig = field(SamplingConfig(), "see the class")
  reward_model: str = field(
    "lab",
    "model that chooses; several with commas, each with a weight as in a*0.5; "
    "groups' heads are weighed as in a[alice=0.7,bob=0.3]",
    also=("reward_model_name", "train_reward_model", "group_weights"),
  )
  test_reward_model: str = field(
    "", "model that only watches, never chooses", also=("reward_model_val",)
  )
  scoring: ScoringConfig = field(ScoringConfig(), "see the class")
  length_penalty: float = field(
    0.0,
    "score -= length_penalty x ln(characters of the completion)",
    rule=">= 0",
  )
  validation_interval: int = field(
    0, "steps between scorings with test_reward_model; 0 = off", rule=">= 0"
  )
  evaluation: EvaluationConfig = field(EvaluationConfig(), "see the class")
  max_exception_count: int = field(
    0, "superbatches that may fail before the run stops", rule=">= 0"
  )

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step; 0 = all."""
    return 0

  @property
  def samples_per_prompt(self) -> int:
    """Answers to each of them."""
    return 1

  @property
  def held_out_metric(self) -> str:
    """A single validation is noise; see docs/checkpoints.md."""
    return "test_score/recent" if self.validation_interval else ""

  @property
  def reward_models(self) -> tuple[tuple[str, float], ...]:
    """Name and weight of each model that chooses."""
    return parse_models(self.reward_model)

  @property
  def test_reward_models(self) -> tuple[tuple[str, float], ...]:
    """Name and weight of each model that watches; may be empty."""
    return parse_models(self.test_reward_model)

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    yield from super().rules()
    yield Rule(
      "reward_model",
      bool(self.reward_models),
      "must name a model",
      "give a hub id, a folder or lab",
    )
    yield Rule(
      "validation_interval",
      self.validation_interval == 0 or bool(self.test_reward_models),
      "must be 0 while test_reward_model is empty",
      "name a test_reward_model or set the interval to 0",
    )
    for name in ("reward_model", "test_reward_model"):
      models = parse_models(getattr(self, name))
      yield weighs_groups(name, *(model for model, _ in models))
    group, prompts = self.sampling.batch_prompts, self.prompts_per_step
    yield Rule(
      "sampling.batch_prompts",
      prompts % group == 0 if group else prompts > 0,
      f"must be 0 or divide the {prompts} prompts of a step"
      if prompts
      else "must be >= 1 in superbatch.mode 'single_pass'",
      "it is the number of prompts that are sampled at once",
    )
    yield Rule(
      "prompts", bool(self.prompts), "must name a source", "lab is the smallest"
    )
