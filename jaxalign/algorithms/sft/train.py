"""Supervised fine-tuning: next-token loss on demonstrations.

Ouyang 2022 (§3.1) and the first stage of every pipeline here. The loss is the
sum of −log p over the counted tokens, divided once by their number in the
whole batch, so packing, micro-batches and sharding do not change a gradient.

Differs from TRL's SFTTrainer: (1) tokens that count are chosen by position,
never by token id, so the end token is trained although it may also pad;
(2) packed texts do not attend to each other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.core import gradients
from jaxalign.core.logprobs import weighted_nll
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program, largest
from jaxalign.training.forward import forward
from jaxalign.training.run import Run, Update


def sum_nll(
  model: Model,
  params: Params,
  text: TextBatch,
  key: Array | None = None,
  tokens: Array | int = 1,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Σ −log p / `tokens`, and how many tokens count in a batch `[B, T]`."""
  p = forward(model, params, text, key)
  # As weights that are known beforehand, so no logits need to be kept.
  loss, _ = weighted_nll(p.hidden, p.targets, p.mask / tokens, p.unembed)
  return loss, p.mask.sum()


def make_update(run: Run[SFTConfig]) -> Update:
  """The update on a `TextBatch` `[M, B, T]`."""

  def update(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: TextBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    del reference
    # Of all micro-batches, so that their losses add up to the mean.
    tokens = jnp.maximum(batch.target_mask.sum(), 1)

    def loss(params: Params, micro: TextBatch, key: Array):
      whole = lora.join(params, frozen)
      return sum_nll(run.model, whole, micro, key, tokens)[0], {}

    value, _, grads = gradients.accumulate(loss, state.params, batch, key)
    state, metrics = run.apply_gradients(state, grads, value)
    return state, metrics | {"loss/nll": value, "num_tokens": tokens}

  return update


class Perplexity:
  """Mean −log p a token over held-out rows, and its exponential."""

  name = "perplexity"

  def __init__(self, run: Run[SFTConfig], batches: list[TextBatch]):
    """Compiles nothing yet.

    Args:
      run: its model and devices.
      batches: numpy rows `[1, B, T]`.
    """
    self.every = run.config.validation_interval
    self._run, self._batches = run, batches

    # Sums of each batch, divided once: batches hold unlike numbers of tokens.
    def sums(params: Params, batch: TextBatch):
      return sum_nll(run.model, params, jax.tree.map(lambda x: x[0], batch))

    @jax.jit
    def means(parts):
      mean = sum(s for s, _ in parts) / sum(n for _, n in parts)
      return {"eval_loss/nll": mean, "eval_perplexity": jnp.exp(mean)}

    self._sums, self._means = meshes.jit(sums, run.mesh), means

  def programs(self, params: Params) -> list[Program]:
    """The loss of the largest batch."""
    batch = meshes.row_shapes(largest(self._batches), self._run.mesh)
    return [Program("loss", self._sums, (params, batch), len(self._batches))]

  def __call__(self, params: Params, step: int) -> Metrics:
    """`eval_loss/nll` in nats, and `eval_perplexity`."""
    del step
    put = self._run.put
    return self._means([self._sums(params, put(b)) for b in self._batches])
