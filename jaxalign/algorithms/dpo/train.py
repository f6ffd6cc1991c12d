"""Direct preference optimisation: comparisons without a reward model.

Rafailov 2023: the policy itself is the reward model, r(y) = β log π(y)/π₀(y),
and is trained on comparisons by the loss of one (`losses.dpo_loss`, called in
`loss.py`). The reference π₀ is the policy before training: a frozen copy, the
base under LoRA adapters, or its log-probs of every text, computed before the
first step.

This file learns from stored comparisons; `online/train.py` from comparisons of
the policy's own completions, by the same loss.

Differs from TRL's DPOTrainer: (1) losses are divided once by the pairs of the
whole batch, so micro-batches and sharding change no gradient; (2) `ipo` takes
sums over tokens, as its paper does, unless `length_normalised` is set; (3) the
SFT term is a mean over pairs, not one over all their tokens.
"""

from collections.abc import Sequence

import jax

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.loss import is_pair, make_update, pair_losses
from jaxalign.core.types import Metrics, PairBatch, Params, TrainState
from jaxalign.training.run import Dataset, Run, fit


def train(run: Run[DPOConfig], data: Dataset) -> TrainState:
  """Trains for the config's steps."""
  return fit(run, data, make_update(run, run.config))


class PairMetrics:
  """An evaluator: the means of all metrics over held-out pairs."""

  name = "pairs"

  def __init__(self, run: Run[DPOConfig], batches: Sequence[PairBatch]):
    """Compiles nothing yet.

    Args:
      run: its policy, reference and devices.
      batches: numpy rows `[1, B, T]`.
    """
    self.every = run.config.validation_interval
    self._run, self._batches = run, batches

    # Sums of each batch, divided once: the last one may hold filler.
    @jax.jit
    def sums(params: Params, reference: Params, batch: PairBatch):
      pairs = jax.tree.map(lambda x: x[0], batch)
      live = run.live_reference(reference)
      found = pair_losses(run.config, run.model, params, live, pairs)
      return {k: v.sum() for k, v in found.items()}, is_pair(pairs).sum()

    @jax.jit
    def means(parts):
      count = sum(n for _, n in parts)
      total = jax.tree.map(lambda *x: sum(x), *[found for found, _ in parts])
      return {f"eval_{k}": v / count for k, v in total.items()}

    self._sums, self._means = sums, means

  def __call__(self, params: Params, step: int) -> Metrics:
    """`eval_loss/total` and the like, as in training."""
    del step
    reference = self._run.reference_params
    parts = [
      self._sums(params, reference, self._run.put(batch))
      for batch in self._batches
    ]
    return self._means(parts)
