"""KTO's metrics over held-out rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.algorithms.kto.train import (
  kl_baseline,
  mean_metrics,
  mismatched_logratios,
  sum_metrics,
)
from jaxalign.core.types import Metrics, Params, TextBatch
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program, largest
from jaxalign.training.run import Run


class LabelledMetrics:
  """An evaluator: metrics and `agreement` over held-out numpy rows `[1, B, T]`.

  z₀ is that of all held-out rows.
  """

  name = "labelled"

  def __init__(self, run: Run[KTOConfig], batches: Sequence[LabelledBatch]):
    self.every = run.config.validation_interval
    self._run, self._batches = run, batches

    # Separate programs: z₀ of all batches comes before any row's loss.
    def mismatched(params: Params, reference: Params, text: TextBatch):
      live = run.live_reference(reference)
      text = jax.tree.map(lambda x: x[0], text)
      return mismatched_logratios(run.model, params, live, text)

    @jax.jit
    def baseline(parts):
      totals, counts = zip(*parts, strict=True)
      return kl_baseline(jnp.stack(totals), jnp.stack(counts))

    def sums(params: Params, reference: Params, batch: LabelledBatch, kl):
      live = run.live_reference(reference)
      micro = batch.text, batch.desirable
      text, desirable = jax.tree.map(lambda x: x[0], micro)
      return sum_metrics(run, params, live, kl, text, desirable)

    @jax.jit
    def means(parts):
      total = jax.tree.map(lambda *x: jnp.stack(x).sum(0), *parts)
      found = mean_metrics(total)
      found.pop("num_tokens")
      return {f"eval_{name}": value for name, value in found.items()}

    self._mismatched = meshes.jit(mismatched, run.mesh)
    self._baseline = baseline
    # Replicated, so that every host can read each row's reward.
    whole = meshes.replicated(run.mesh)
    self._sums = meshes.jit(sums, run.mesh, out_shardings=whole)
    self._means = means

  def programs(self, params: Params) -> list[Program]:
    """z₀ and the loss of the largest batch."""
    run, count = self._run, len(self._batches)
    batch = meshes.row_shapes(largest(self._batches), run.mesh)
    given = params, run.reference_params
    kl = meshes.row_shapes(np.float32(0), run.mesh)
    found = [Program("loss", self._sums, (*given, batch, kl), count)]
    if batch.mismatched is not None:
      arguments = *given, batch.mismatched
      found.append(Program("kl", self._mismatched, arguments, count))
    return found

  def __call__(self, params: Params, step: int) -> Metrics:
    """`eval_loss/total` and the like, and `eval_kl`, z₀ in nats."""
    del step
    run, batches = self._run, self._batches
    reference = run.reference_params
    put = [run.put(batch) for batch in batches]
    # z₀ first: over the mismatched pairs of all batches, 0 if there are none.
    metrics, kl = {}, run.put(np.float32(0))
    if batches[0].mismatched is not None:
      kl = self._baseline(
        [self._mismatched(params, reference, b.mismatched) for b in put]
      )
      metrics["eval_kl"] = kl
    parts = [self._sums(params, reference, b, kl) for b in put]
    # The completions of one prompt may be spread over batches.
    rewards = jax.device_get([rewards for _, rewards in parts])
    return (
      metrics
      | agreement(
        np.concatenate(rewards),
        np.concatenate([b.desirable[0] for b in batches]),
        np.concatenate([b.group[0] for b in batches]),
      )
      | self._means([found for found, _ in parts])
    )


def agreement(
  reward: Float[np.ndarray, " B"],
  desirable: Bool[np.ndarray, " B"],
  group: Int[np.ndarray, " B"],
) -> Metrics:
  """How often a prompt's desirable completion has the larger reward.

  All pairs of a desirable and an undesirable completion of a prompt count;
  every prompt weighs the same.

  Args:
    reward: of each row.
    desirable: its label.
    group: completions of one prompt carry one number; -1 = filler.

  Returns:
    `eval_rewards/accuracies`, and `eval_prompts`, how many prompts have
    completions of both labels; nothing where none has.
  """
  # Sorting rows by prompt, then cutting where the prompt changes.
  order = np.argsort(group, kind="stable")
  ends = np.flatnonzero(np.diff(group[order])) + 1
  right = []
  for rows in np.split(order, ends):
    good = reward[rows[desirable[rows]]]
    bad = reward[rows[~desirable[rows]]]
    if group[rows[0]] >= 0 and len(good) and len(bad):
      right.append(float((good[:, None] > bad[None, :]).mean()))
  if not right:
    return {}
  return {
    "eval_rewards/accuracies": float(np.mean(right)),
    "eval_prompts": len(right),
  }
