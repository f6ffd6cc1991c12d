"""Optimizers and schedules, all from optax, and the guarded update.

The learning rate is not part of the optimizer: a step computes it from the
schedule and hands it over, because SuperHF holds it through a superbatch
that may take several optimizer updates.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxalign.core.types import Metrics, Params, TrainState


def make_optimizer(
  name: str,
  *,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  ratios: Mapping[str, float] | None = None,
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
    ratios: top-level parts of the parameters whose learning rate is another,
      as a share of it: `{"value": 10}`.
  """
  rules: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(beta1, beta2, eps),
    "lion": lambda: optax.scale_by_lion(beta1, beta2),
    "adafactor": lambda: optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
  }
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else None
  decay = optax.add_decayed_weights(weight_decay) if weight_decay else None
  others = [_scaled(part, x) for part, x in (ratios or {}).items() if x != 1]
  parts = [clip, rules[name](), decay, *others]
  return optax.chain(*[p for p in parts if p is not None])


def _scaled(part: str, ratio: float) -> optax.GradientTransformation:
  where = lambda params: {
    name: jax.tree.map(lambda _, here=name == part: here, leaves)
    for name, leaves in params.items()
  }
  return optax.masked(optax.scale(ratio), where)


def learning_rate(
  step: Int[Array, ""] | int,
  *,
  peak: float,
  schedule: str,
  warmup_steps: int,
  steps: int,
  end_ratio: float = 0.0,
) -> Float[Array, ""]:
  """Linear warm-up from 0, then constant, linear or half-cosine decay.

  The first step has index 0, so a warm-up starts with a rate of 0, as
  Hugging Face's `get_scheduler` does.

  Args:
    step: index of the step, from 0.
    peak: rate after the warm-up.
    schedule: "constant", "linear" or "cosine".
    warmup_steps: steps of warm-up; 0 = none.
    steps: length of the run; the decay ends there.
    end_ratio: the last rate as a share of the peak, in [0, 1].
  """
  step = jnp.asarray(step, jnp.float32)
  span = max(1, steps - warmup_steps)
  progress = jnp.clip((step - warmup_steps) / span, 0.0, 1.0)
  shapes = {
    "constant": jnp.ones(()),
    "linear": 1.0 - progress,
    "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
  }
  decayed = end_ratio + (1.0 - end_ratio) * shapes[schedule]
  if schedule == "constant":
    decayed = shapes[schedule]
  warm = jnp.minimum(step / max(1, warmup_steps), 1.0) if warmup_steps else 1.0
  return peak * warm * decayed


def apply_gradients(
  state: TrainState,
  gradients: Params,
  loss: Float[Array, ""],
  rate: Float[Array, ""],
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
) -> tuple[TrainState, Float[Array, ""]]:
  """One update, left out and counted if loss or gradients are not finite.

  Returns:
    The new state (its `step` unchanged) and the gradients' global norm
    before clipping.
  """
  norm = optax.tree.norm(gradients)
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  # What is bfloat16 stays so: the next update is the same program.
  params = jax.tree.map(
    lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates
  )
  ema = state.ema
  if ema is not None:
    mean = lambda e, p: (ema_decay * e + (1 - ema_decay) * p).astype(e.dtype)
    ema = jax.tree.map(mean, ema, params)
  pick = lambda new, old: jax.tree.map(
    lambda a, b: jnp.where(good, a, b), new, old
  )
  return TrainState(
    params=pick(params, state.params),
    opt_state=pick(opt_state, state.opt_state),
    step=state.step,
    skipped=state.skipped + ~good,
    ema=pick(ema, state.ema),
    carried=state.carried,
  ), norm


def train_step(
  state: TrainState,
  gradients: Params,
  loss: Float[Array, ""],
  rate: Callable[[Array], Array],
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
  """`apply_gradients` at the schedule's rate, and one more step done.

  Returns:
    The new state, and the metrics that every training step has.
  """
  lr = rate(state.step)
  state, norm = apply_gradients(
    state, gradients, loss, lr, optimizer, ema_decay
  )
  state = dataclasses.replace(state, step=state.step + 1)
  return state, {
    "grad_norm": norm,
    "lr": lr,
    "skipped_updates": state.skipped,
  }


@jax.jit
def _next(step: Int[Array, ""]) -> Int[Array, ""]:
  return step + 1


def advance(state: TrainState) -> TrainState:
  """The state with one more step done, for what no update counts."""
  return dataclasses.replace(state, step=_next(state.step))


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0,
  carried: Any = None,
) -> TrainState:
  """A state before the first step."""
  return TrainState(
    params=params,
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
    carried=carried,
  )
