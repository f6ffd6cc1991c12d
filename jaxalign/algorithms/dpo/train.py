"""Direct preference optimisation: comparisons without a reward model.

Rafailov 2023: the policy itself is the reward model, r(y) = β log π(y)/π₀(y),
and is trained on comparisons by the loss of one (`losses.dpo_loss`). The
reference π₀ is the policy before training: a frozen copy, the base under LoRA
adapters, or its log-probs of every text, computed before the first step.

Comparisons are stored ones; in `online/train.py` they are of the policy's own
completions, and the update is the same.

Differs from TRL's DPOTrainer: (1) losses are divided once by the pairs of the
whole batch, so micro-batches and sharding change no gradient; (2) `ipo` takes
sums over tokens, as its paper does, unless `length_normalised` is set; (3) the
SFT term is a mean over pairs, not one over all their tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.algorithms.dpo.config import DPOConfig, PairLossConfig
from jaxalign.algorithms.dpo.data import blank_pairs
from jaxalign.core import gradients, losses
from jaxalign.core.types import Metrics, PairBatch, Params, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program, largest
from jaxalign.training.forward import completion_logps, reference_logps
from jaxalign.training.reference_cache import ReferenceCache
from jaxalign.training.run import Run, Step, Update


def make_update(run: Run, config: PairLossConfig) -> Update:
  """The update on a `PairBatch` `[M, B, T]`; `config` is the run's own."""

  def update(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: PairBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    # Counted over all micro-batches: their losses add up to one mean.
    pairs = jnp.maximum(is_pair(batch).sum(), 1)
    live = run.live_reference(reference)

    def loss(params: Params, micro: PairBatch, key: Array):
      del key  # no dropout: a ratio of two noisy values is no reward
      whole = lora.join(params, frozen)
      found = pair_losses(config, run.model, whole, live, micro)
      total = {name: value.sum() / pairs for name, value in found.items()}
      return total["loss/total"], total

    value, metrics, grads = gradients.accumulate(loss, state.params, batch, key)
    state, update_metrics = run.apply_gradients(state, grads, value)
    tokens = {"num_tokens": batch.loss_mask.sum()}
    return state, update_metrics | metrics | tokens

  return update


def pair_programs(
  update: Step,
  shape: tuple[int, int, int],
  reference: ReferenceCache | None = None,
) -> list[Program]:
  """An update on pairs in rows of their own, and in shared rows.

  Which of the two a batch has goes by its texts, see `pack_pairs`; the first
  takes the most memory.

  Args:
    update: on a `PairBatch`.
    shape: M, N, T of N texts in rows of their own.
    reference: adds its log-probs to the texts.
  """
  apart, shared = blank_pairs(shape), blank_pairs(shape, shared=True)
  if reference is not None:
    apart, shared = map(reference.attach, (apart, shared))
  return [
    update.program(apart),
    update.program(shared, calls=0.0, name="update, shared prompts"),
  ]


def pair_losses(
  config: PairLossConfig,
  model: Model,
  params: Params,
  reference: tuple[Model, Params] | None,
  batch: PairBatch,
) -> dict[str, Float[Array, " B"]]:
  """Loss and metrics of each pair of a micro-batch; 0 for filler pairs."""
  logps = completion_logps(model, params, batch)
  ratio = logps - reference_logps(reference, batch)
  lengths = jnp.maximum(batch.completion_mask.sum(axis=1), 1)
  # Normalising changes what is compared, not the rewards below.
  scaled = ratio / lengths if config.length_normalised else ratio
  better, worse = jnp.split(scaled, 2)
  loss = losses.dpo_loss(
    config.loss, better - worse, config.beta, config.label_smoothing
  )
  # Implicit rewards β log π/π₀ (eq. 5), and the NLL of the SFT term.
  chosen, rejected = jnp.split(config.beta * ratio, 2)
  chosen_logp, rejected_logp = jnp.split(logps, 2)
  nll = -jnp.split(logps / lengths, 2)[0]
  found = {
    "loss/total": loss + config.sft_coefficient * nll,
    "loss/preference": loss,
    "loss/nll": nll,
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    "logps/chosen": chosen_logp,
    "logps/rejected": rejected_logp,
  }
  real = is_pair(batch)
  return {name: jnp.where(real, value, 0) for name, value in found.items()}


def is_pair(batch: PairBatch) -> Bool[Array, "*M B"]:
  """Pairs that are no filler: something of the chosen text counts."""
  real = batch.completion_mask.any(axis=-1)
  return jnp.split(real, 2, axis=-1)[0]


class PairMetrics:
  """An evaluator: mean metrics over held-out numpy pairs `[1, B, T]`."""

  name = "pairs"

  def __init__(self, run: Run[DPOConfig], batches: Sequence[PairBatch]):
    self.every = run.config.validation_interval
    self._run, self._batches = run, batches

    # Sums of each batch, divided once: the last one may hold filler.
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

    self._sums, self._means = meshes.jit(sums, run.mesh), means

  def programs(self, params: Params) -> list[Program]:
    """The loss of the largest batch."""
    run, count = self._run, len(self._batches)
    batch = meshes.row_shapes(largest(self._batches), run.mesh)
    arguments = params, run.reference_params, batch
    return [Program("loss", self._sums, arguments, count)]

  def __call__(self, params: Params, step: int) -> Metrics:
    """`eval_loss/total` and the like, as in training."""
    del step
    reference = self._run.reference_params
    parts = [
      self._sums(params, reference, self._run.put(batch))
      for batch in self._batches
    ]
    return self._means(parts)
