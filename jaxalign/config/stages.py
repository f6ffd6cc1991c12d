"""The sections of a superbatch's stages: sample, group, score, evaluate."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, field


def increasing(name: str, buckets: tuple[int, ...]) -> Rule:
  """The rule for length buckets: at least one, and they grow."""
  return Rule(
    name,
    bool(buckets) and list(buckets) == sorted(set(buckets)),
    "must hold at least one length and grow",
    "write 64,128,256",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How completions are drawn."""

  temperature: float = field(
    1.0, "divides the logits", rule="> 0", source="SuperHF Table 2"
  )
  top_p: float = field(
    1.0, "probability mass that is sampled from; 1 = all", rule="(0, 1]"
  )
  top_k: int = field(
    0, "most probable tokens that are sampled from; 0 = all", rule=">= 0"
  )
  repetition_penalty: float = field(
    1.0, "divides the logits of tokens that were used; 1 = off", rule="> 0"
  )
  no_repeat_ngram: int = field(
    0,
    "length of token runs that may not come twice; 0 = off",
    rule=">= 0",
    also=("no_repeat_ngram_size",),
  )
  max_new_tokens: int = field(
    64, "longest completion in tokens", rule=">= 1", source="SuperHF Table 2"
  )
  min_new_tokens: int = field(
    0, "tokens before the end of text may come", rule=">= 0"
  )
  truncation: str = field(
    "delimiters",
    "where the text of a completion is cut",
    choices=("none", "delimiters", "simple", "medium", "complex"),
    also=("extra_turns",),
  )
  length_buckets: tuple[int, ...] = field(
    (64, 128, 256, 512, 1024),
    "prompt lengths in tokens that get a compiled program each",
    rule=">= 1",
  )
  batch_prompts: int = field(
    0,
    "prompts in one sampler call; 0 = all of the superbatch",
    rule=">= 0",
    also=("minibatch_size_generating",),
  )

  def rules(self) -> Iterator[Rule]:
    """Bounds that depend on other fields."""
    yield Rule(
      "min_new_tokens",
      self.min_new_tokens <= self.max_new_tokens,
      f"must be in [0, max_new_tokens={self.max_new_tokens}]",
      "lower it or raise max_new_tokens",
    )
    yield increasing("length_buckets", self.length_buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperbatchConfig:
  """What is sampled and what is kept before the policy changes.

  The modes (SuperHF's final method is `single_prompt`):
    single_prompt: one prompt, S samples, the best K.
    prompt_accumulation: A prompts, S samples each, the best K of each.
    mixed_prompts: A prompts, one sample each, the best K of all.
    single_pass: every prompt once, S samples each, the best K of each.
  With `percentile`, those from a percentile on instead of the best K.
  """

  mode: str = field(
    "prompt_accumulation",
    "how samples are grouped",
    choices=(
      "prompt_accumulation",
      "mixed_prompts",
      "single_prompt",
      "single_pass",
    ),
    also=("same_prompt_per_superbatch",),
  )
  prompts: int = field(
    1,
    "A, distinct prompts in a superbatch; 0 = all (single_pass)",
    rule=">= 0",
    also=("prompt_accumulation_steps",),
  )
  samples_per_prompt: int = field(
    32,
    "S, completions of each prompt",
    rule=">= 1",
    source="SuperHF Table 2",
    also=("superbatch_size", "num_generations"),
  )
  keep: int = field(
    1,
    "K, completions that are trained on, per prompt or per superbatch",
    rule=">= 1",
    source="SuperHF Table 2",
    also=("completion_filter_top_k",),
  )
  percentile: tuple[float, ...] = field(
    (),
    "keep what scores at or above this percentile of its prompt, or of the "
    "superbatch where prompts are mixed; 0.7,0.95 grows over the run; "
    "empty = the best K",
    rule="[0, 1]",
    also=("threshold", "start_percentile", "end_percentile"),
  )

  @property
  def rows(self) -> int:
    """Completions in a superbatch, A x S; 0 where A is not known here."""
    return self.prompts * self.samples_per_prompt

  @property
  def filters_per_prompt(self) -> bool:
    """Whether answers are compared within a prompt or a superbatch."""
    return self.mode != "mixed_prompts"

  @property
  def kept_rows(self) -> int:
    """Texts trained on in a superbatch at most; 0 where A is not known here."""
    if self.percentile:  # equal scores stay together, at worst all of them
      return self.rows
    return self.keep * (self.prompts if self.filters_per_prompt else 1)

  def rules(self) -> Iterator[Rule]:
    """What each mode asks of A, S and K."""
    single_pass = self.mode == "single_pass"
    yield Rule(
      "prompts",
      (self.prompts == 0) == single_pass,
      "must be 0 (all prompts) in mode 'single_pass'"
      if single_pass
      else f"must be >= 1 in mode {self.mode!r}",
      "set prompts=0" if single_pass else "0 belongs to mode 'single_pass'",
    )
    yield Rule(
      "prompts",
      self.mode != "single_prompt" or self.prompts == 1,
      "must be 1 in mode 'single_prompt'",
      "use mode 'prompt_accumulation' for more",
    )
    yield Rule(
      "samples_per_prompt",
      self.mode != "mixed_prompts" or self.samples_per_prompt == 1,
      "must be 1 in mode 'mixed_prompts'",
      "prompts is the size of a mixed superbatch",
    )
    most, name = self.samples_per_prompt, "samples_per_prompt"
    if not self.filters_per_prompt:
      most, name = self.prompts, "prompts"
    yield Rule(
      "keep",
      self.keep <= most,
      f"must be in [1, {name}={most}]",
      f"lower keep or raise {name}",
    )
    yield Rule(
      "keep",
      self.keep == 1 or not self.percentile,
      "must be left at 1 while percentile says what is kept",
      "leave out keep, or percentile",
    )
    yield Rule(
      "percentile",
      len(self.percentile) <= 2,
      "must be empty, one number, or two: at the start and at the end",
      "write 0.7,0.95",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
  """How reward models read a completion."""

  encoding: str = field(
    "concat",
    "concat = one text (SuperHF's way), pair = prompt and answer as segments",
    choices=("concat", "pair"),
  )
  max_length: int = field(
    1024,
    "longest text in tokens, cut on the right",
    rule=">= 2",
    source="SuperHF code",
    also=("max_length_rm",),
  )
  length_buckets: tuple[int, ...] = field(
    (64, 128, 256, 512, 1024),
    "text lengths in tokens that get a compiled program each",
    rule=">= 1",
  )
  batch_size: int = field(
    64,
    "texts in one scorer call",
    rule=">= 1",
    source="SuperHF code",
    also=("minibatch_size_scoring",),
  )
  dtype: str = field(
    "auto",
    "number format of reward models; auto = bfloat16 on accelerators",
    choices=("auto", "float32", "bfloat16"),
  )

  def rules(self) -> Iterator[Rule]:
    """Buckets grow."""
    yield increasing("length_buckets", self.length_buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Best-of-N on prompts that training leaves out, by both reward models."""

  interval: int = field(
    0,
    "steps between evaluations, also on the last; 0 = off",
    rule=">= 0",
    also=("eval_steps",),
  )
  best_of_n: int = field(
    16, "N, completions of each prompt of which the best counts", rule=">= 1"
  )
  num_prompts: int = field(64, "prompts that are kept aside", rule=">= 1")
