"""SuperHF's config: Algorithm 1 and all that its runs varied."""

import dataclasses
import re
from collections.abc import Iterator

from jaxalign.config.fields import Rule, divides, field
from jaxalign.config.sections import TrainingConfig
from jaxalign.config.stages import (
  EvaluationConfig,
  SamplingConfig,
  ScoringConfig,
  SuperbatchConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperHFConfig(TrainingConfig):
  """Sample, score, keep the best, fine-tune, repeat."""

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
  superbatch: SuperbatchConfig = field(SuperbatchConfig(), "see the class")
  reward_model: str = field(
    "lab",
    "model that chooses; several with commas, each with a weight as in a*0.5",
    also=("reward_model_name", "train_reward_model"),
  )
  test_reward_model: str = field(
    "", "model that only watches, never chooses", also=("reward_model_val",)
  )
  scoring: ScoringConfig = field(ScoringConfig(), "see the class")
  kl_coefficient: float = field(
    0.0,
    "weight of KL(prior || policy), nats, summed over a minibatch's texts; "
    "0 = only log it, -1 = do not compute it",
    source="SuperHF code; off in the CS224N paper, 0.35 later",
    also=("kl_coef", "beta", "init_kl_coef"),
  )
  inverse_loss_penalty: float = field(
    0.0, "C of the added term C / loss; 0 = off", rule=">= 0"
  )
  length_penalty: float = field(
    0.0,
    "score -= length_penalty x ln(characters of the completion)",
    rule=">= 0",
  )
  train_eos: bool = field(
    True, "train the end of text behind completions that were not cut"
  )
  finetune_batch: int = field(
    8,
    "texts in one optimizer update",
    rule=">= 1",
    source="SuperHF Table 2",
    also=("minibatch_size_finetuning", "batch_size"),
  )
  micro_batch: int = field(
    0,
    "texts in one forward and backward pass; 0 = finetune_batch",
    rule=">= 0",
    also=("gradient_accumulation_steps",),
  )
  validation_interval: int = field(
    0, "steps between scorings with test_reward_model; 0 = off", rule=">= 0"
  )
  evaluation: EvaluationConfig = field(EvaluationConfig(), "see the class")
  max_exception_count: int = field(
    0, "superbatches that may fail before the run stops", rule=">= 0"
  )

  @property
  def reference(self) -> str:
    """Where the KL's prior comes from: none, lora_off or frozen_copy."""
    if self.kl_coefficient < 0:
      return "none"
    return "lora_off" if self.lora.rank else "frozen_copy"

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
    batch, micro = self.superbatch, self.micro_batch
    single_pass = batch.mode == "single_pass"
    yield Rule(
      "steps",
      self.steps == 1 or not single_pass,
      "must be 1 in superbatch.mode 'single_pass'",
      "all prompts are one superbatch",
    )
    yield Rule(
      "kl_coefficient",
      self.kl_coefficient >= 0 or self.kl_coefficient == -1,
      "must be >= 0, or -1 for no KL at all",
      "0 computes and logs it without adding it to the loss",
    )
    warmup = self.optimizer.warmup_steps
    yield Rule(
      "optimizer.warmup_steps",
      warmup == 0 or not single_pass,
      "must be 0 in superbatch.mode 'single_pass'",
      "a warm-up begins with a rate of 0, so the only step would do nothing",
    )
    group = self.sampling.batch_prompts
    yield Rule(
      "sampling.batch_prompts",
      group > 0 if single_pass else group == 0 or batch.prompts % group == 0,
      "must be >= 1 in superbatch.mode 'single_pass'"
      if single_pass
      else f"must be 0 or divide superbatch.prompts={batch.prompts}",
      "it is the number of prompts that are sampled at once",
    )
    yield divides("micro_batch", micro, "finetune_batch", self.finetune_batch)
    yield Rule(
      "micro_batch",
      self.inverse_loss_penalty == 0 or micro in (0, self.finetune_batch),
      "must be 0 while inverse_loss_penalty is on",
      "C / loss is a function of the whole update's loss",
    )
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
    yield Rule(
      "prompts", bool(self.prompts), "must name a source", "lab is the smallest"
    )


def parse_models(text: str) -> tuple[tuple[str, float], ...]:
  """`a*0.5, b` -> (("a", 0.5), ("b", 1.0)); a `*` in a path stays in it."""
  models = []
  for part in text.split(","):
    name, weight = part.strip(), 1.0
    found = re.fullmatch(r"(.+?)\s*\*\s*(-?\d+(?:\.\d*)?)", name)
    if found:
      name, weight = found[1], float(found[2])
    if name:
      models.append((name, weight))
  return tuple(models)
