"""The config of PPO and of its group-baseline relatives."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.fields import Rule, divides, field
from jaxalign.config.names import weighs_groups
from jaxalign.config.online import OnlineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
  """What is sampled before the policy changes."""

  prompts: int = field(
    32, "distinct prompts in a step", rule=">= 1", also=("batch_size",)
  )
  samples_per_prompt: int = field(
    1,
    "answers to each; rloo and grpo compare them",
    rule=">= 1",
    also=("num_generations", "rloo_k"),
  )

  @property
  def rows(self) -> int:
    """Answers in a step."""
    return self.prompts * self.samples_per_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
  """How the policy is held near its reference."""

  coefficient: float = field(
    0.2,
    "weight of the KL, nats; the start of it where target is set",
    rule=">= 0",
    source="TRL 0.4.1",
    also=("init_kl_coef", "kl_coef", "beta"),
  )
  estimator: str = field(
    "k1",
    "of KL(policy || reference) a token; full = exact over the vocabulary",
    choices=("k1", "k2", "k3", "abs", "full"),
    also=("kl_penalty", "kl_estimator"),
  )
  place: str = field(
    "reward", "where the KL is put", choices=("reward", "loss")
  )
  clip: bool = field(
    False, "count a token's KL below 0 as 0", also=("clip_kl",)
  )
  target: float = field(
    0.0,
    "KL an answer, nats, that an adaptive coefficient aims at; 0 = fixed",
    rule=">= 0",
    also=("adap_kl_ctrl",),
  )
  horizon: int = field(
    10_000,
    "answers over which an adaptive coefficient changes",
    rule=">= 1",
    source="TRL 0.4.1",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingConfig:
  """From a reward model's score to the reward that is learned from."""

  missing_eos_penalty: float = field(
    0.0, "taken off the score of an answer that was cut", rule=">= 0"
  )
  scaling: str = field(
    "none",
    "deviation that scores are divided by: running = of all so far, reference "
    "= of the first step's; none = none",
    choices=("none", "running", "reference"),
    also=("scale_reward", "use_score_scaling"),
  )
  centre: bool = field(
    False,
    "take off the scores' mean, by the same rule as scaling: values start at 0",
    also=("use_score_norm", "normalize_reward"),
  )
  clip: float = field(
    0.0,
    "bound of a score's size, after scaling; 0 = none",
    rule=">= 0",
    also=("score_clip", "cliprange_reward"),
  )
  whiten: bool = field(
    False,
    "divide rewards by their deviation over a step's tokens; the mean stays",
    also=("whiten_rewards",),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
  """Roll out, reward, estimate advantages, improve within a clip, repeat."""

  algorithm: str = field("ppo", "what to run", choices=("ppo",))
  rollout: RolloutConfig = field(RolloutConfig(), "see the class")
  kl: KLConfig = field(KLConfig(), "see the class")
  shaping: ShapingConfig = field(ShapingConfig(), "see the class")
  advantage: str = field(
    "gae",
    "gae = with a value model (PPO), rloo and grpo = against the other answers",
    choices=("gae", "rloo", "grpo"),
  )
  whiten_advantages: bool = field(
    True, "mean 0, variance 1 over all tokens of a step (gae)"
  )
  value_model: str = field(
    "shared",
    "shared = a head on the policy, separate = a copy of it, or the hub id or "
    "folder of a causal reward model with the policy's tokens, written as in "
    "reward_model",
  )
  value_lr_ratio: float = field(
    1.0,
    "learning rate of the value model, as a share of the policy's",
    rule="> 0",
  )
  gamma: float = field(1.0, "discount a token", rule="[0, 1]")
  lam: float = field(0.95, "lambda of GAE", rule="[0, 1]")
  epochs: int = field(
    4,
    "passes over a step's answers",
    rule=">= 1",
    also=("ppo_epochs", "num_ppo_epochs"),
  )
  minibatch: int = field(
    8,
    "answers in one optimizer update",
    rule=">= 1",
    also=("mini_batch_size", "num_mini_batches"),
  )
  micro_batch: int = field(
    0,
    "answers in one forward and backward pass; 0 = minibatch",
    rule=">= 0",
    also=("gradient_accumulation_steps",),
  )
  clip_low: float = field(
    0.2,
    "how far below 1 the ratio to the old policy counts",
    rule="(0, 1)",
    also=("cliprange", "epsilon"),
  )
  clip_high: float = field(
    0.2, "how far above 1", rule="> 0", also=("epsilon_high",)
  )
  dual_clip: float = field(
    0.0, "bound of a bad action's loss; 3 is usual, 0 = off", rule=">= 0"
  )
  value_clip: float = field(
    0.2,
    "how far a value may move in a step; 0 = off",
    rule=">= 0",
    also=("cliprange_value",),
  )
  vf_coef: float = field(0.1, "weight of the value loss", rule=">= 0")
  entropy_coef: float = field(
    0.0, "weight of the entropy, which keeps answers varied", rule=">= 0"
  )
  target_kl: float = field(
    0.0,
    "a step's updates end once the policy has moved by 1.5 times this, nats a "
    "token; 0 = never",
    rule=">= 0",
    also=("early_stopping",),
  )
  ratio_threshold: float = field(
    10.0,
    "an update is left out where the mean ratio exceeds this; 0 = never",
    rule=">= 0",
  )
  sampling_correction: float = field(
    0.0,
    "largest weight by which tokens are corrected that truncated sampling "
    "drew; 0 = refuse such sampling",
    rule=">= 0",
  )

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step."""
    return self.rollout.prompts

  @property
  def samples_per_prompt(self) -> int:
    """Answers to each of them."""
    return self.rollout.samples_per_prompt

  @property
  def learning_rate_ratios(self) -> dict[str, float]:
    """The value model's; see `value_lr_ratio`."""
    return {"value": self.value_lr_ratio}

  @property
  def micro_rows(self) -> int:
    """Answers in one pass."""
    return self.micro_batch or self.minibatch

  @property
  def reshaped_sampling(self) -> tuple[str, ...]:
    """Sampling settings under which the policy is not what is drawn from."""
    s = self.sampling
    found = {
      "temperature": s.temperature != 1,
      "top_p": s.top_p < 1,
      "top_k": s.top_k > 0,
      "repetition_penalty": s.repetition_penalty != 1,
      "no_repeat_ngram": s.no_repeat_ngram > 0,
      "min_new_tokens": s.min_new_tokens > 0,
    }
    return tuple(name for name, is_on in found.items() if is_on)

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    yield from super().rules()
    rows, each = self.rollout.rows, self.samples_per_prompt
    yield divides("minibatch", self.minibatch, "the rollout's answers", rows)
    yield divides("micro_batch", self.micro_batch, "minibatch", self.minibatch)
    yield weighs_groups("value_model", self.value_model)
    grouped = self.advantage != "gae"
    yield Rule(
      "rollout.samples_per_prompt",
      not grouped or each > 1,
      f"must be >= 2 while advantage={self.advantage!r}",
      "an answer is compared with the others to its prompt",
    )
    yield Rule(
      "kl.target",
      self.kl.target == 0 or self.kl.coefficient > 0,
      "must be 0 while kl.coefficient=0",
      "a coefficient of 0 stays 0 whatever it is multiplied by",
    )
    yield Rule(
      "dual_clip",
      self.dual_clip == 0 or self.dual_clip > 1,
      "must be 0 or above 1",
      "3 is usual",
    )
    reshaped = self.reshaped_sampling
    yield Rule(
      "sampling_correction",
      not reshaped or self.sampling_correction > 0,
      f"must be above 0 while sampling.{', sampling.'.join(reshaped)} "
      "changes what is drawn from",
      "the ratio and the KL would be of tokens that the policy did not draw, "
      "and the KL turns negative; 2 is usual",
    )
