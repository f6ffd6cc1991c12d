"""The optimizer, its learning rate and its first state, as the config says."""

import functools
from collections.abc import Callable

import optax
from jaxtyping import PyTree

from jaxalign.config.sections import TrainingConfig
from jaxalign.core import optim
from jaxalign.core.types import Params, TrainState


def schedule_of(config: TrainingConfig) -> optax.Schedule:
  """Step, counted from 0 -> learning rate."""
  o = config.optimizer
  return optim.make_schedule(
    o.schedule,
    peak=o.learning_rate,
    warmup_steps=o.warmup_steps,
    steps=config.steps,
    end_ratio=o.end_value_ratio,
  )


def optimizer_of(config: TrainingConfig) -> optax.GradientTransformation:
  """The optimizer, without its learning rate; see `schedule_of`."""
  o = config.optimizer
  return optim.make_optimizer(
    o.name,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
    ratios=config.learning_rate_ratios,
    mu_dtype=o.mu_dtype,
  )


def initializer(
  config: TrainingConfig,
  optimizer: optax.GradientTransformation,
  extra_state: PyTree,  # a method's own
) -> Callable[[Params], TrainState]:
  """Trained parameters -> the state before the first step."""
  return functools.partial(
    optim.init_state,
    optimizer=optimizer,
    ema_decay=config.optimizer.ema,
    extra_state=extra_state,
  )
