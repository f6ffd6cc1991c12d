"""Online DPO: DPO on pairs of the policy's own completions.

Guo 2024 (OAIF): every prompt is completed twice with the policy as it is, a
judge says which completion is better (a reward model, a function, people), and
the policy learns from that by DPO's loss (`dpo/train.py`).
"""

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxalign.algorithms.dpo.online.config import OnlineDPOConfig
from jaxalign.algorithms.dpo.online.data import sampled_pairs
from jaxalign.algorithms.dpo.train import make_update
from jaxalign.core.types import Metrics, TrainState
from jaxalign.feedback.judges import Judge
from jaxalign.training.rollout import RolloutSource, collect
from jaxalign.training.run import Run


def train(
  run: Run[OnlineDPOConfig], source: RolloutSource, judge: Judge
) -> TrainState:
  """Completes twice, asks which is better, learns; repeats."""
  config, state = run.config, run.state
  update = run.jit(make_update(run, config))
  for step in run.steps():
    # Sampling: two completions of each prompt.
    metrics, rows, pairs = {}, (), None
    rollout = collect(run, source, state, step)
    if rollout is not None:
      # Judging; a step without a single preference counts as failed.
      allowed = config.max_exception_count
      with run.tolerate_failure(step, allowed), run.stage("judge"):
        choice = judge(step, rollout, run.stopping)
        if choice is None:  # people were still to answer
          run.recorder.abandon(step, state)
          return state
        pairs = order_pairs(choice)
    if rollout is not None and pairs is not None:
      # Learning from the pairs.
      better, worse = pairs
      batch = sampled_pairs(
        config,
        source.generator.tokenizer,
        run.model.config.max_positions,
        run.model.config.hidden_size,
        rollout.completions,
        better,
        worse,
      )
      with run.stage("update"):
        state, found = update(state, batch, run.update_key(step))
        # The host's work on the texts, while the device updates.
        metrics, rows = rollout.metrics(better), rollout.rows(step, better)
        run.write_pending()
        metrics |= jax.block_until_ready(found)
      scores = rollout.scores.reshape(-1)
      metrics |= {
        "objective/kl": _kl(config.beta, found),
        "objective/scores_margin": (scores[better] - scores[worse]).mean(),
        "num_pairs": len(better),
      }
    state = run.end_step(step, state, metrics, rows)
  return state


def order_pairs(
  choice: Int[np.ndarray, " P"],
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
  """Flat indices of the better and of the worse completions.

  Args:
    choice: of each prompt the index of its better completion; -1 = neither,
      which is left out.

  Raises:
    ValueError: all prompts are undecided.
  """
  prompts = np.flatnonzero(choice >= 0)
  if not len(prompts):
    raise ValueError("no prompt has a completion better than the other")
  picked = choice[prompts]
  return 2 * prompts + picked, 2 * prompts + 1 - picked


@jax.jit(static_argnames="beta")
def _kl(beta: float, metrics: Metrics) -> Array:
  """Mean log π/π₀ of the policy's own completions: its KL, nats each."""
  rewards = metrics["rewards/chosen"] + metrics["rewards/rejected"]
  return rewards / (2 * beta)
