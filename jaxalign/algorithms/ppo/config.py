"""The config of PPO and of its group-baseline relatives."""

import dataclasses
from collections.abc import Iterator

from jaxalign.config.names import weighs_groups
from jaxalign.config.online import OnlineConfig
from jaxalign.config.rules import Rule, Section, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
  """What is sampled before the policy changes."""

  prompts: int = field(32, "distinct prompts in a step", ">= 1")
  samples_per_prompt: int = field(
    1,
    "completions of each; rloo and grpo compare them",
    ">= 1",
    also=("num_generations", "rloo_k"),
  )

  @property
  def rows(self) -> int:
    """Completions in a step."""
    return self.prompts * self.samples_per_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig(Section):
  """How the policy is held near its reference."""

  # Ziegler 2019: reward - coefficient x (log policy - log reference).
  coefficient: float = field(
    0.2,
    "weight of the KL, nats; its start where target is set (TRL 0.4.1)",
    ">= 0",
    also=("init_kl_coef", "kl_coef", "beta"),
  )
  estimator: str = field(
    "k1",
    "of KL(policy || reference) a token; full = exact over the vocabulary",
    choices=("k1", "k2", "k3", "abs", "full"),
    also=("kl_penalty", "kl_estimator"),
  )
  place: str = field("reward", "where the KL goes", choices=("reward", "loss"))
  clip: bool = field(False, "count a token's KL < 0 as 0", also=("clip_kl",))
  # The adaptive coefficient of Ziegler 2019.
  target: float = field(
    0.0,
    "KL a completion, nats, that an adaptive coefficient aims at; 0 = fixed",
    ">= 0",
    also=("adap_kl_ctrl",),
  )
  horizon: int = field(
    10_000, "completions over which the coefficient adapts (TRL 0.4.1)", ">= 1"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingConfig(Section):
  """From a reward model's score to the reward that is learned from."""

  missing_eos_penalty: float = field(
    0.0, "taken off the score of a completion that was cut", ">= 0"
  )
  scaling: str = field(
    "none",
    "deviation that scores are divided by: running = of all so far, reference "
    "= of the first step's; none = none",
    choices=("none", "running", "reference"),
    also=("scale_reward", "scale_rewards", "use_score_scaling"),
  )
  centre: bool = field(
    False,
    "take off the scores' mean, by the same rule as scaling: values start at 0",
    also=("use_score_norm", "normalize_reward"),
  )
  clip: float = field(
    0.0,
    "largest absolute score, after scaling; 0 = none",
    ">= 0",
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
  rollout: RolloutConfig = RolloutConfig()  # prompts and completions
  kl: KLConfig = KLConfig()  # to the reference
  shaping: ShapingConfig = ShapingConfig()  # score -> reward

  # Advantages.
  advantage: str = field(
    "gae",
    "gae = with a value model (PPO); rloo, grpo = against the prompt's other "
    "completions",
    choices=("gae", "rloo", "grpo"),
  )
  whiten_advantages: bool = field(
    True, "mean 0, variance 1 over all tokens of a step (gae)"
  )
  # gamma, lam, vf_coef, epochs and the clips of 0.2 are as in TRL 0.4.1.
  gamma: float = field(1.0, "discount a token", "[0, 1]")
  lam: float = field(0.95, "lambda of GAE", "[0, 1]")

  # The value model of `gae`.
  value_model: str = field(
    "shared",
    "shared = a head on the policy, separate = a copy of it, or the hub id or "
    "folder of a causal reward model with the policy's tokens, written as in "
    "reward_model",
  )
  value_lr_ratio: float = field(
    1.0, "its learning rate, as a share of the policy's", "> 0"
  )
  vf_coef: float = field(0.1, "weight of the value loss", ">= 0")
  value_clip: float = field(
    0.2, "largest change in a step; 0 = off", ">= 0", also=("cliprange_value",)
  )

  # The updates of a step.
  epochs: int = field(
    4,
    "passes over a rollout",
    ">= 1",
    also=("ppo_epochs", "num_ppo_epochs", "num_iterations"),
  )
  batch_size: int = field(
    8,
    "completions in one optimizer update, over all devices",
    ">= 1",
    also=("mini_batch_size", "num_mini_batches"),
    alias=("minibatch",),
  )
  clip_low: float = field(
    0.2,
    "how far below 1 the ratio to the old policy counts",
    "(0, 1)",
    also=("cliprange", "epsilon"),
  )
  clip_high: float = field(
    0.2, "how far above 1", "> 0", also=("epsilon_high",)
  )
  dual_clip: float = field(
    0.0, "bound of a bad action's loss; 3 is usual, 0 = off", ">= 0"
  )
  entropy_coef: float = field(
    0.0, "weight of the entropy, which keeps completions varied", ">= 0"
  )

  # What ends a step's updates, leaves one out, or weighs its tokens.
  target_kl: float = field(
    0.0,
    "a step's updates end once the policy has moved by 1.5 times this, nats a "
    "token; 0 = never",
    ">= 0",
    also=("early_stopping",),
  )
  ratio_threshold: float = field(
    10.0, "largest mean ratio of an update that counts; 0 = none", ">= 0"
  )
  sampling_correction: float = field(
    0.0,
    "largest weight by which tokens are corrected that truncated sampling "
    "drew; 0 = refuse such sampling",
    ">= 0",
  )

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step."""
    return self.rollout.prompts

  @property
  def samples_per_prompt(self) -> int:
    """Completions of each of them."""
    return self.rollout.samples_per_prompt

  @property
  def learning_rate_ratios(self) -> dict[str, float]:
    """The value model's; see `value_lr_ratio`."""
    return {"value": self.value_lr_ratio}

  @property
  def reshaped_sampling(self) -> tuple[str, ...]:
    """Sampling settings that draw from another distribution than the policy."""
    # max_new_tokens is not among them: it cuts, but draws from the policy.
    s = self.sampling
    changes = {
      "temperature": s.temperature != 1,
      "top_p": s.top_p < 1,
      "top_k": s.top_k > 0,
      "repetition_penalty": s.repetition_penalty != 1,
      "no_repeat_ngram": s.no_repeat_ngram > 0,
      "min_new_tokens": s.min_new_tokens > 0,
    }
    return tuple(name for name, is_on in changes.items() if is_on)

  def rules(self) -> Iterator[Rule]:
    """What holds between sections."""
    yield from super().rules()
    yield Rule(
      self.rollout.rows % self.batch_size == 0,
      f"batch_size must divide the {self.rollout.rows} completions of a step",
      "every update of an epoch has as many",
    )
    yield weighs_groups("value_model", self.value_model)
    # RLOO and GRPO have no value model: the others are the baseline.
    baseline = self.advantage
    yield Rule(
      baseline == "gae" or self.samples_per_prompt > 1,
      f"rollout.samples_per_prompt must be >= 2 while advantage={baseline!r}",
      "a completion is compared with the others of its prompt",
    )
    yield Rule(
      self.kl.target == 0 or self.kl.coefficient > 0,
      "kl.target must be 0 while kl.coefficient=0",
      "a coefficient of 0 stays 0 whatever it is multiplied by",
    )
    # E[∇ log π] = 0: such a KL pulls in no direction, it only adds noise.
    yield Rule(
      self.kl.place == "reward" or self.kl.estimator != "k1",
      "kl.estimator must not be k1 while kl.place='loss'",
      "the gradient of k1 is 0 on average; k3 is usual (GRPO), full is exact",
    )
    # A bound of 1 or less would act even where the policy has not moved.
    bound = self.dual_clip
    yield Rule(
      bound == 0 or bound > 1, "dual_clip must be 0 or above 1", "3 is usual"
    )
    reshaped = self.reshaped_sampling
    yield Rule(
      not reshaped or self.sampling_correction > 0,
      f"sampling_correction must be above 0 while sampling."
      f"{', sampling.'.join(reshaped)} changes what is drawn from",
      "the ratio and the KL would be of tokens that the policy did not draw, "
      "and the KL turns negative; 2 is usual",
    )


CONFIG = PPOConfig
