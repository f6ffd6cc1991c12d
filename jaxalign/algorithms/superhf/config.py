"""SuperHF's config: Algorithm 1 and all that its runs varied."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.online import OnlineConfig
from jaxalign.config.rules import Rule, Section, field

MODES = ("prompt_accumulation", "mixed_prompts", "single_prompt", "single_pass")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperbatchConfig(Section):
  """What is sampled and what is kept before the policy changes.

  The modes (SuperHF's final method is `single_prompt`):
    single_prompt: one prompt, S samples, the best K.
    prompt_accumulation: A prompts, S samples each, the best K of each.
    mixed_prompts: A prompts, one sample each, the best K of all.
    single_pass: every prompt once, S samples each, the best K of each.
  With `percentile`, those at or above a percentile instead of the best K.
  """

  mode: str = field(
    "prompt_accumulation",
    "how samples are grouped",
    choices=MODES,
    also=("same_prompt_per_superbatch",),
  )
  # A, S and K of Algorithm 1.
  prompts: int = field(
    1,
    "A, distinct prompts in a superbatch; 0 = all (single_pass)",
    ">= 0",
    also=("prompt_accumulation_steps",),
  )
  samples_per_prompt: int = field(
    32,
    "S, completions of each prompt (SuperHF Table 2)",
    ">= 1",
    also=("superbatch_size", "num_generations"),
  )
  keep: int = field(
    1,
    "K, completions that are trained on, per prompt or per superbatch (SuperHF "
    "Table 2)",
    ">= 1",
    also=("completion_filter_top_k",),
  )
  percentile: tuple[float, ...] = field(
    (),
    "keep what scores at or above this percentile of its prompt, or of the "
    "superbatch where prompts are mixed; 0.7,0.95 grows over the run; empty = "
    "the best K",
    "[0, 1]",
    also=("threshold", "start_percentile", "end_percentile"),
  )

  @property
  def rows(self) -> int:
    """Completions in a superbatch, A x S; 0 where A is not known here."""
    return self.prompts * self.samples_per_prompt

  @property
  def filters_per_prompt(self) -> bool:
    """Whether completions compete within a prompt, or within a superbatch."""
    return self.mode != "mixed_prompts"

  @property
  def kept_rows(self) -> int:
    """Texts trained on in a superbatch at most; 0 where A is not known here."""
    if self.percentile:  # equal scores stay together, at worst all of them
      return self.rows
    return self.keep * (self.prompts if self.filters_per_prompt else 1)

  def rules(self) -> Iterator[Rule]:
    """What each mode requires of A, S and K."""
    single_pass = self.mode == "single_pass"
    yield Rule(
      self.prompts == 0 or not single_pass,
      "prompts must be 0 (all prompts) in mode 'single_pass'",
      "set prompts=0",
    )
    yield Rule(
      self.prompts > 0 or single_pass,
      f"prompts must be >= 1 in mode {self.mode!r}",
      "0 belongs to mode 'single_pass'",
    )
    yield Rule(
      self.mode != "single_prompt" or self.prompts == 1,
      "prompts must be 1 in mode 'single_prompt'",
      "use mode 'prompt_accumulation' for more",
    )
    yield Rule(
      self.mode != "mixed_prompts" or self.samples_per_prompt == 1,
      "samples_per_prompt must be 1 in mode 'mixed_prompts'",
      "prompts is the size of a mixed superbatch",
    )
    # The best K are chosen among the prompt's samples, or among all of them.
    most, name = self.samples_per_prompt, "samples_per_prompt"
    if not self.filters_per_prompt:
      most, name = self.prompts, "prompts"
    yield Rule(
      self.keep <= most,
      f"keep must be in [1, {name}={most}]",
      f"lower keep or raise {name}",
    )
    yield Rule(
      self.keep == 1 or not self.percentile,
      "keep must be left at 1 while percentile says what is kept",
      "leave out keep, or percentile",
    )
    yield Rule(
      len(self.percentile) <= 2,
      "percentile must be empty, one number, or two: at the start and at the "
      "end",
      "write 0.7,0.95",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperHFConfig(OnlineConfig):
  """Sample, score, keep the best, fine-tune, repeat."""

  superbatch: SuperbatchConfig = SuperbatchConfig()
  # What the loss has besides the NLL; 0 turns each term off.
  kl_coefficient: float = field(
    0.0,
    "weight of KL(reference || policy), nats, summed over an update's texts; 0 "
    "= only log it, -1 = do not compute it (SuperHF code; off in the CS224N "
    "paper, 0.35 later)",
    also=("kl_coef", "beta", "init_kl_coef"),
  )
  inverse_loss_penalty: float = field(
    0.0, "C of the added term C / loss; 0 = off", ">= 0"
  )
  # The texts of an update.
  train_eos: bool = field(
    True, "train the end of text after completions that were not cut"
  )
  batch_size: int = field(
    8,
    "texts in one optimizer update, over all devices (SuperHF Table 2)",
    ">= 1",
    also=("minibatch_size_finetuning",),
    alias=("finetune_batch",),
  )

  @property
  def prompts_per_step(self) -> int:
    """A, distinct prompts in a superbatch; 0 = all."""
    return self.superbatch.prompts

  @property
  def samples_per_prompt(self) -> int:
    """S, completions of each of them."""
    return self.superbatch.samples_per_prompt

  @property
  def uses_reference(self) -> bool:
    """Whether the KL to the reference is computed, in the loss or to log it."""
    return self.kl_coefficient >= 0

  @property
  def kl_weight(self) -> float:
    """Weight of the KL in the loss, >= 0."""
    return max(self.kl_coefficient, 0.0)  # -1 = there is no KL to weigh

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    single_pass = self.superbatch.mode == "single_pass"
    yield Rule(
      self.steps == 1 or not single_pass,
      "steps must be 1 in superbatch.mode 'single_pass'",
      "all prompts are one superbatch",
    )
    # How many prompts that is, is known only once they are read.
    yield Rule(
      self.sampling.batch_prompts > 0 or not single_pass,
      "sampling.batch_prompts must be >= 1 in superbatch.mode 'single_pass'",
      "it is the number of prompts that are sampled at once",
    )
    yield Rule(
      self.kl_coefficient >= 0 or self.kl_coefficient == -1,
      "kl_coefficient must be >= 0, or -1 for no KL at all",
      "0 computes and logs it without adding it to the loss",
    )
    warmup = self.optimizer.warmup_steps
    yield Rule(
      warmup == 0 or not single_pass,
      "optimizer.warmup_steps must be 0 in superbatch.mode 'single_pass'",
      "a warm-up begins with a rate of 0, so the only step would do nothing",
    )
    yield Rule(
      self.inverse_loss_penalty == 0 or self.micro_rows == self.batch_size,
      "micro_batch must be 0 while inverse_loss_penalty is on",
      "C / loss is a function of the whole update's loss",
    )
    yield from super().rules()


CONFIG = SuperHFConfig
