"""Reward against N: the best of 1, 2, 4 ... N completions of each prompt."""

import dataclasses

import jax
import numpy as np

from jaxalign.core import best_of
from jaxalign.core.types import Metrics, Params
from jaxalign.data.rows import PromptRow
from jaxalign.parallel.program import Program
from jaxalign.sampling.generator import Generator
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.text import similarity


@dataclasses.dataclass(frozen=True)
class BestOfN:
  """An evaluator; the train reward picks, both rewards are measured.

  Attributes:
    every: steps between evaluations.
    n: N, completions of each prompt.
    generator: writes them.
    train_reward: picks the best.
    heldout_reward: measures it as well, or None.
    prompts: never trained on.
    key: the same at every evaluation, so that only the policy changes.
  """

  every: int
  n: int
  generator: Generator
  train_reward: RewardModel
  heldout_reward: RewardModel | None
  prompts: tuple[PromptRow, ...]
  key: jax.Array
  name: str = "best_of_n"

  def programs(self, params: Params) -> list[Program]:
    """What a call runs on the devices; `params` are shapes with shardings."""
    texts = [row.prompt for row in self.prompts]
    ids = self.generator.tokenizer.encode_prompts(texts)
    count, tokens = len(ids), max(map(len, ids))
    found = self.generator.programs(params, count, tokens, self.n)
    count *= self.n
    tokens += int(self.generator.settings.max_new_tokens)
    found += self.train_reward.programs("score reward_model", count, tokens)
    if self.heldout_reward is not None:
      name = "score test_reward_model"
      found += self.heldout_reward.programs(name, count, tokens)
    return found

  def __call__(self, params: Params, step: int) -> Metrics:
    """Mean rewards of the best of 1, 2, 4 ... N, and word overlap.

    A prompt with a completion that has no finite reward is left out of all
    means; `eval_score/unscored` counts these prompts.
    """
    del step
    texts = [row.prompt for row in self.prompts]
    found = self.generator(params, texts, self.n, self.key)
    asked = [row for row in self.prompts for _ in range(self.n)]
    scores = np.reshape(self.train_reward(asked, found.texts), (-1, self.n))
    values = {"eval_score": scores}
    if self.heldout_reward is not None:
      heldout = self.heldout_reward(asked, found.texts)
      values["eval_test_score"] = np.reshape(heldout, (-1, self.n))
    usable = np.all([np.isfinite(x).all(axis=1) for x in values.values()], 0)
    metrics: Metrics = {"eval_score/unscored": int((~usable).sum())}
    scores = scores[usable]
    for name, worth in values.items() if len(scores) else ():
      worth = worth[usable]
      metrics[f"{name}/mean"] = float(worth.mean())
      for size in best_of.sizes(self.n):
        mean = best_of.expected(scores, worth, size)
        metrics[f"{name}/best_of_{size}"] = mean
    overlap = similarity.mean_overlap(found.prompt_of_each, found.texts)
    if overlap is not None:  # None where there is only one prompt
      metrics["eval_diversity/overlap"] = overlap
    return metrics
