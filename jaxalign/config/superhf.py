"""SuperHF's config: Algorithm 1 and all that its runs varied."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, divides, field
from jaxalign.config.online import OnlineConfig
from jaxalign.config.stages import SuperbatchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperHFConfig(OnlineConfig):
  """Sample, score, keep the best, fine-tune, repeat."""

  superbatch: SuperbatchConfig = field(SuperbatchConfig(), "see the class")
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

  @property
  def prompts_per_step(self) -> int:
    """A, distinct prompts in a superbatch; 0 = all."""
    return self.superbatch.prompts

  @property
  def samples_per_prompt(self) -> int:
    """S, answers to each of them."""
    return self.superbatch.samples_per_prompt

  @property
  def reference(self) -> str:
    """Where the KL's prior comes from: none, lora_off or frozen_copy."""
    if self.kl_coefficient < 0:
      return "none"
    return "lora_off" if self.lora.rank else "frozen_copy"

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    micro = self.micro_batch
    single_pass = self.superbatch.mode == "single_pass"
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
    yield divides("micro_batch", micro, "finetune_batch", self.finetune_batch)
    yield Rule(
      "micro_batch",
      self.inverse_loss_penalty == 0 or micro in (0, self.finetune_batch),
      "must be 0 while inverse_loss_penalty is on",
      "C / loss is a function of the whole update's loss",
    )
    yield from super().rules()
