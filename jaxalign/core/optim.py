"""Optimizers and schedules of optax, and the guarded update.

The learning rate is not part of the optimizer. A step reads it from the
schedule and passes it in, because SuperHF keeps one rate for a superbatch,
which may take several optimizer updates.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxalign.core import memory
from jaxalign.core.types import Params, TrainState


def make_optimizer(
  name: str,
  *,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  ratios: Mapping[str, float] | None = None,
  mu_dtype: str = "float32",
) -> optax.GradientTransformation:
  """The direction of an update; `apply_gradients` multiplies it by −lr.

  Args:
    name: "adamw", "adafactor" or "lion".
    beta1: momentum, in [0, 1).
    beta2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment.
    weight_decay: decoupled, multiplied by the learning rate, on all leaves
      as torch's AdamW does.
    clip_norm: largest global gradient norm; 0 = no clipping.
    ratios: factors on the learning rate of top-level parts of the parameters:
      `{"value": 10}`.
    mu_dtype: in which the mean of the gradients is kept, by AdamW and Lion.
  """
  # Clipping comes first: it bounds the raw gradient, as torch's does.
  parts = []
  if clip_norm:
    parts.append(optax.clip_by_global_norm(clip_norm))
  if name == "adamw":
    parts.append(optax.scale_by_adam(beta1, beta2, eps, mu_dtype=mu_dtype))
  elif name == "lion":
    parts.append(optax.scale_by_lion(beta1, beta2, mu_dtype=mu_dtype))
  else:
    assert name == "adafactor", name
    # Adafactor's update clipping (Shazeer 2018, section 6) at d = 1.
    factored = optax.scale_by_factored_rms()
    parts.append(optax.chain(factored, optax.clip_by_block_rms(1.0)))
  # Decay is added after the moments, so Adam does not rescale it (decoupled).
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay))
  # Last: a part's learning rate multiplies its decay too.
  for part, ratio in (ratios or {}).items():
    if ratio != 1:
      parts.append(_scale_part(part, ratio))
  return optax.chain(*parts)


def _scale_part(part: str, ratio: float) -> optax.GradientTransformation:
  """Scales the updates of one top-level part of the parameters."""

  def mask(params: Params) -> Params:
    return {
      name: jax.tree.map(lambda _, here=name == part: here, leaves)
      for name, leaves in params.items()
    }

  # Updates of other parts pass through a mask unchanged.
  return optax.masked(optax.scale(ratio), mask)


def make_schedule(
  shape: str,
  *,
  peak: float,
  warmup_steps: int,
  steps: int,
  end_ratio: float = 0.0,
) -> optax.Schedule:
  """Linear warm-up from 0, then constant, linear or half-cosine decay.

  The first step has index 0, so a warm-up starts with a rate of 0, as
  Hugging Face's `get_scheduler` does.

  Args:
    shape: "constant", "linear" or "cosine".
    peak: rate after the warm-up.
    warmup_steps: steps of warm-up; 0 = none.
    steps: length of the run; the decay ends there.
    end_ratio: the last rate as a share of the peak, in [0, 1].
  """
  # Hugging Face counts the decay from the end of the warm-up.
  span = max(1, steps - warmup_steps)
  if shape == "constant":
    decay = optax.constant_schedule(peak)
  elif shape == "linear":
    decay = optax.linear_schedule(peak, peak * end_ratio, span)
  else:
    assert shape == "cosine", shape
    decay = optax.cosine_decay_schedule(peak, span, alpha=end_ratio)
  if not warmup_steps:
    return decay
  warm_up = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([warm_up, decay], [warmup_steps])


def apply_gradients(
  state: TrainState,
  gradients: Params,
  loss: Float[Array, ""],
  rate: Float[Array, ""],
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
) -> tuple[TrainState, Float[Array, ""]]:
  """One update, skipped and counted if loss or gradients are not finite.

  Returns:
    The new state (its `step` unchanged) and the gradients' global norm
    before clipping.
  """
  # Computing the update.
  norm = optax.tree.norm(gradients)
  # The norm sums over all leaves, so it shows a NaN in any of them.
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  # What waits in the host's memory comes when the activations are gone.
  before = memory.fetch(state.opt_state, after=norm)
  updates, opt_state = optimizer.update(gradients, before, state.params)
  # bfloat16 leaves stay bfloat16: another dtype would compile a new program.
  params = jax.tree.map(
    lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates
  )
  ema = state.ema
  if ema is not None:

    def average(e, p):
      return (ema_decay * e + (1 - ema_decay) * p).astype(e.dtype)

    ema = jax.tree.map(average, ema, params)

  # Choosing inside the program: a host-side check would wait for the device.
  def pick(new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

  return TrainState(
    params=pick(params, state.params),
    opt_state=pick(opt_state, before),
    step=state.step,
    skipped=state.skipped + ~good,
    ema=pick(ema, state.ema),
    extra_state=state.extra_state,
  ), norm


@jax.jit
def _next(step: Int[Array, ""]) -> Int[Array, ""]:
  # Jitted, because adding 1 outside would be an implicit transfer.
  return step + 1


def advance(state: TrainState) -> TrainState:
  """The state with one more step done."""
  return dataclasses.replace(state, step=_next(state.step))


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0,
  extra_state: PyTree = None,  # a method's own
) -> TrainState:
  """A state before the first step."""
  # `ema` is a copy, because a step cannot donate one buffer twice.
  return TrainState(
    params=params,
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
    extra_state=extra_state,
  )
