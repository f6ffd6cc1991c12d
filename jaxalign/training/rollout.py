"""A step's completions: drawn, scored, and what is reported about them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxalign.config.online import OnlineConfig
from jaxalign.core.types import Completions, Metrics, TrainState
from jaxalign.data.batches import rows_of_step
from jaxalign.data.rows import PromptRow
from jaxalign.errors import StepError
from jaxalign.sampling.generator import Generator
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.scoring.scorer import Started
from jaxalign.text import similarity
from jaxalign.training.recorder import Rows, due
from jaxalign.training.run import Run

C = TypeVar("C", bound=OnlineConfig)


@dataclasses.dataclass(frozen=True)
class Heldout:
  """Held-out rewards, which the devices may still be at.

  Nothing is trained on them, so the host reads them when it reports.
  """

  reward: RewardModel
  prompts: Sequence[PromptRow]  # of each completion
  texts: Sequence[str]
  started: Sequence[Started | None]  # see `RewardModel.start`

  @functools.cached_property
  def scores(self) -> Float[np.ndarray, " B"]:
    """Waits for them; `UserError` as `RewardModel` says."""
    return self.reward(self.prompts, self.texts, self.started)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A step's completions with their scores."""

  completions: Completions
  scores: Float[np.ndarray, "P S"]  # less the length penalty; -inf = unusable
  heldout: Heldout | None  # None = not measured
  # Of each of several train rewards, not weighed; {} where there is one.
  rewards: Mapping[str, Float[np.ndarray, " B"]] = dataclasses.field(
    default_factory=dict
  )

  def metrics(self, kept: Int[np.ndarray, " K"]) -> Metrics:
    """Rewards of usable completions; lengths and diversity of all.

    Args:
      kept: flat indices of the completions that are trained on.
    """
    texts, samples = self.completions.texts, self.completions.samples
    flat = self.scores.reshape(-1)
    usable = np.isfinite(flat)
    chars = np.array([len(text) for text in texts])
    found = {
      "score/mean": flat[usable].mean(),
      "score/std": flat[usable].std(),
      "score/kept_mean": flat[kept].mean(),
      "completion/chars_mean": chars.mean(),
      "completion/tokens_mean": np.mean(samples.lengths),
      "completion/empty_fraction": np.mean(chars == 0),
      "completion/ended_fraction": np.mean(self.completions.ended),
      "num_prompts": len(self.completions.prompts),
      "num_kept": len(kept),
      "num_sampled_tokens": int(np.sum(samples.lengths)),
      "diversity/repetition": float(
        np.mean([similarity.repetition(text) for text in texts])
      ),
    }
    for name, reward in self.rewards.items():
      # A reward function that says None of a completion does not count it.
      counted = reward[np.isfinite(reward)]
      if len(counted):
        found[f"rewards/{name}/mean"] = counted.mean()
        found[f"rewards/{name}/std"] = counted.std()
    # None where there are too few texts to compare.
    overlap = similarity.mean_overlap(self.completions.prompt_of_each, texts)
    if overlap is not None:
      found["diversity/overlap"] = overlap
    meteor = similarity.mean_meteor([texts[i] for i in kept], max_pairs=200)
    if meteor is not None:
      found["diversity/meteor"] = meteor
    # Last, as the devices may still be at them.
    if self.heldout is not None:
      heldout = np.where(usable, self.heldout.scores, np.nan)
      heldout[np.isinf(heldout)] = np.nan
      found["test_score/mean"] = np.nanmean(heldout)
      found["test_score/kept_mean"] = np.nanmean(heldout[kept])
    return found

  def rows(self, step: int, kept: Int[np.ndarray, " K"]) -> Rows:
    """Every completion as a line of samples.jsonl; `kept` as for `metrics`."""
    flat, chosen = self.scores.reshape(-1), set(kept.tolist())
    heldout = None if self.heldout is None else self.heldout.scores
    return [
      {
        "step": step + 1,
        "prompt": prompt,
        "completion": text,
        "score": _shown(flat[i]),
        "test_score": None if heldout is None else _shown(heldout[i]),
        "kept": i in chosen,
      }
      for i, (prompt, text) in enumerate(
        zip(
          self.completions.prompt_of_each, self.completions.texts, strict=True
        )
      )
    ]


def _shown(score: np.floating) -> float | None:
  """A score in JSON, which has neither NaN nor infinity: null instead."""
  return float(score) if np.isfinite(score) else None


@dataclasses.dataclass(frozen=True)
class RolloutSource:
  """Where the rollouts of a run come from.

  Attributes:
    prompts: to train on, system text included.
    generator: writes completions with the policy's parameters.
    train_reward: scores what is trained on.
    heldout_reward: a reward model that is never trained against, or None.
  """

  prompts: tuple[PromptRow, ...]
  generator: Generator
  train_reward: RewardModel
  heldout_reward: RewardModel | None = None


def collect(
  run: Run[C], source: RolloutSource, state: TrainState, step: int
) -> Rollout | None:
  """Samples completions of a step's prompts and scores them.

  Returns:
    None if the step failed, which `run` has counted; see `max_exception_count`.
  """
  config, count = run.config, len(source.prompts)
  # The prompts of a step are a pure function of the seed and the step.
  size = config.prompts_per_step or count
  order = rows_of_step(config.seed, step, size, count)
  asked = [source.prompts[i] for i in order]
  with run.tolerate_failure(step, config.max_exception_count):
    with run.stage("sample"):
      completions = source.generator(
        run.policy_params(state),
        [row.prompt for row in asked],
        config.samples_per_prompt,
        run.step_key(step),
      )
    texts = completions.texts
    prompts = [row for row in asked for _ in range(config.samples_per_prompt)]
    with run.stage("score"):
      reward, watching, heldout = source.train_reward, None, None
      if due(step, config.validation_interval, config.steps):
        watching = source.heldout_reward
      # The devices begin with one model's texts while the other's are encoded,
      # and are at the other's while what is trained on is chosen.
      started = reward.start(prompts, texts)
      if watching:
        begun = watching.start(prompts, texts)
        heldout = Heldout(watching, prompts, texts, begun)
      rewards = reward.scores(prompts, texts, started)
      scores = reward.total(rewards, prompts).astype(np.float64)
    # The length penalty, then what must not be trained on.
    chars = np.array([len(text) for text in texts])
    # The released code's help says λ · length, its code takes the logarithm.
    scores -= config.length_penalty * np.log(np.maximum(chars, 1))
    scores[(chars == 0) | ~np.isfinite(scores)] = -np.inf
    if not np.isfinite(scores).any():
      raise StepError(
        f"step {step + 1}: every completion was empty or had no finite score; "
        "look at them in samples.jsonl and at the reward model, or let some "
        "steps fail with config.max_exception_count"
      )
    shape = len(completions.prompts), config.samples_per_prompt
    each = {}
    if len(rewards) > 1:
      each = dict(zip(source.train_reward.names, rewards, strict=True))
    return Rollout(completions, scores.reshape(shape), heldout, each)
  return None
