"""The configs that learn from completions which the policy itself samples."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.names import (
  names_function,
  parse_models,
  weighs_groups,
)
from jaxalign.config.rules import Rule, Section, field
from jaxalign.config.sections import TrainingConfig, buckets_increase


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketConfig(Section):
  """Texts of many lengths through few compiled programs."""

  length_buckets: tuple[int, ...] = field(
    (64, 128, 256, 512, 1024),
    "lengths in tokens, of prompts to sample from or of texts to score, that "
    "get a compiled program each",
    ">= 1",
  )

  def rules(self) -> Iterator[Rule]:
    """A text takes the first bucket that holds it."""
    yield buckets_increase(self.length_buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(BucketConfig):
  """How completions are sampled."""

  # What reshapes the distribution; PPO corrects for these, or refuses them.
  temperature: float = field(1.0, "divides the logits (SuperHF Table 2)", "> 0")
  top_p: float = field(1.0, "sampled probability mass; 1 = all", "(0, 1]")
  top_k: int = field(0, "most probable tokens to sample from; 0 = all", ">= 0")
  repetition_penalty: float = field(
    1.0, "divides the logits of tokens that were used; 1 = off", "> 0"
  )
  no_repeat_ngram: int = field(
    0,
    "length of token runs that may not come twice; 0 = off",
    ">= 0",
    also=("no_repeat_ngram_size",),
  )
  # Where a completion ends.
  max_new_tokens: int = field(
    64,
    "longest completion in tokens (SuperHF Table 2)",
    ">= 1",
    also=("max_completion_length", "response_length"),
  )
  min_new_tokens: int = field(0, "tokens before the text may end", ">= 0")
  truncation: str = field(
    "delimiters",
    "where the text of a completion is cut",
    choices=("none", "delimiters", "simple", "medium", "complex"),
    also=("extra_turns",),
  )
  # Memory and speed; neither changes a token.
  batch_prompts: int = field(
    0,
    "prompts in one sampler call; 0 = all of a step",
    ">= 0",
    also=("minibatch_size_generating",),
  )
  compact: bool = field(
    False,
    "completions that have ended leave the batch: faster where lengths differ "
    "much, for more programs; on one device",
  )

  def rules(self) -> Iterator[Rule]:
    """Bounds that depend on other fields."""
    yield from super().rules()
    yield Rule(
      self.min_new_tokens <= self.max_new_tokens,
      f"min_new_tokens must be in [0, max_new_tokens={self.max_new_tokens}]",
      "lower it or raise max_new_tokens",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig(BucketConfig):
  """How rewards are taken: what reward models read, how long functions take."""

  # Closer than those of prompts: every padded token of a text is computed.
  length_buckets: tuple[int, ...] = field(
    (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024),
    "lengths in tokens of texts to score that get a compiled program each",
    ">= 1",
  )
  encoding: str = field(
    "auto",
    "concat = one text (SuperHF's way), pair = prompt and completion as "
    "segments, auto = as the model was trained, or by its architecture where "
    "its folder does not say",
    choices=("auto", "concat", "pair"),
  )
  max_length: int = field(
    1024,
    "longest text in tokens, cut on the right (SuperHF code)",
    ">= 2",
    also=("max_length_rm",),
  )
  batch_size: int = field(
    64,
    "texts in one scorer call, for each device that has rows of its own "
    "(SuperHF code)",
    ">= 1",
    also=("minibatch_size_scoring",),
  )
  dtype: str = field(
    "auto",
    "number format of reward models; auto = bfloat16 on accelerators",
    choices=("auto", "float32", "bfloat16"),
  )
  offload: bool = field(
    False,
    "keep reward models in the host's memory and copy each to the devices for "
    "a call; slower, and no saving on a CPU",
  )
  function_timeout: float = field(
    0.0,
    "seconds that a reward function may take for the completions of a step; "
    "0 = no limit",
    ">= 0",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
  """Best-of-N on prompts that training leaves out, by both reward models."""

  interval: int = field(
    0,
    "steps between evaluations, also on the last; 0 = off",
    ">= 0",
    also=("eval_steps", "eval_strategy"),
  )
  best_of_n: int = field(
    16, "N, completions of each prompt of which the best counts", ">= 1"
  )
  num_prompts: int = field(64, "prompts kept out of training", ">= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainingConfig):
  """Prompts, how they are completed, and what scores the completions.

  Each method has its own fields for `prompts_per_step` and
  `samples_per_prompt`.
  """

  # Prompts.
  prompts: str = field(
    "lab",
    "prompt source: lab, a hub id, a file or a glob; several with commas",
    also=(
      "data",
      "prompt_dataset_names",
      "dataset",
      "datasets",
      "dataset_name",
      "train_dataset",
    ),
  )
  max_prompt_chars: int = field(
    1024,
    "longest prompt in characters, without system_prompt; longer ones are left "
    "out (SuperHF, later runs)",
    ">= 1",
    also=("max_prompt_char_length", "max_prompt_length"),
  )
  # Kor (2023) used every row, repeated ones too.
  deduplicate: bool = field(True, "use every distinct prompt once")
  holdout: int = field(
    -1,
    "last rows of each set that are kept out of training; -1 = 2300 of "
    "SuperHF's sets without a test split, 0 of others (SuperHF, later runs)",
    ">= -1",
  )
  num_prompts_per_set: int = field(
    0,
    "first prompts of each set to use, before shuffling; 0 = all",
    ">= 0",
    also=("num_prompts_per_dataset",),
  )
  num_prompts: int = field(
    0, "shuffled prompts to use; 0 = all", ">= 0", also=("debug_max_prompts",)
  )
  system_prompt: str = field(
    "", "text directly before every prompt", also=("conversation_prompt",)
  )

  # Completions and their rewards.
  sampling: SamplingConfig = SamplingConfig()  # by the policy
  scoring: ScoringConfig = ScoringConfig()  # by both rewards
  reward_model: str = field(
    "lab",
    "train reward: a model, or a function as FILE.py:FUNCTION; several with "
    "commas, each with a weight as in a*0.5; groups' heads are weighed as in "
    "a[alice=0.7,bob=0.3]",
    also=(
      "reward_model_name",
      "train_reward_model",
      "group_weights",
      "reward_funcs",
      "reward_weights",
      "reward_model_path",
    ),
  )
  length_penalty: float = field(
    0.0, "score -= length_penalty x ln(characters of the completion)", ">= 0"
  )
  max_exception_count: int = field(0, "steps that may fail in a run", ">= 0")

  # Rewards that training never sees.
  test_reward_model: str = field(
    "",
    "held-out reward, written like reward_model; empty = none",
    also=("reward_model_val",),
  )
  validation_interval: int = field(
    0, "steps between scorings with test_reward_model; 0 = off", ">= 0"
  )
  evaluation: EvaluationConfig = EvaluationConfig()  # best-of-N

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step; 0 = all."""
    return 0

  @property
  def samples_per_prompt(self) -> int:
    """Completions of each of them."""
    return 1

  @property
  def held_out_metric(self) -> str:
    """A mean of five: a single validation is noise (docs/checkpoints.md)."""
    return "test_score/recent" if self.validation_interval else ""

  @property
  def reward_models(self) -> tuple[tuple[str, float], ...]:
    """Name and weight of each model in the train reward."""
    return parse_models(self.reward_model)

  @property
  def test_reward_models(self) -> tuple[tuple[str, float], ...]:
    """Name and weight of each model in the held-out reward; may be empty."""
    return parse_models(self.test_reward_model)

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    yield from super().rules()
    yield Rule(
      bool(self.reward_models),
      "reward_model must name a model",
      "give a hub id, a folder or lab",
    )
    yield Rule(
      self.validation_interval == 0 or bool(self.test_reward_models),
      "validation_interval must be 0 while test_reward_model is empty",
      "name a test_reward_model or set the interval to 0",
    )
    for name in ("reward_model", "test_reward_model"):
      models = parse_models(getattr(self, name))
      yield weighs_groups(name, *[model for model, _ in models])
      yield names_function(name, *[model for model, _ in models])
    # Every sampler call has the same number of prompts: one compiled program.
    group, prompts = self.sampling.batch_prompts, self.prompts_per_step
    must = f"sampling.batch_prompts must be 0 or divide the {prompts} prompts"
    yield Rule(
      group == 0 or prompts % group == 0,
      f"{must} of a step",
      "it is the number of prompts that are sampled at once",
    )
    yield Rule(
      bool(self.prompts), "prompts must name a source", "lab is the smallest"
    )
