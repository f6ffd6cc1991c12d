"""PPO: the policy writes, is rewarded, and improves within a clip.

Ziegler 2019, Stiennon 2020, Ouyang 2022 (RLHF); Schulman 2017 (the clip) and
2016 (GAE). One step: complete P prompts S times each, score the completions,
then

  rₜ = −β KLₜ + [t is the last token] score            (experience.py)
  Aₜ = GAE(r, V), or Σr against the prompt's others (rloo, grpo)
  epochs over minibatches of  L_policy + c_v L_value − c_e entropy  (loss.py)

Differs from TRL 0.4.1 and SuperHF's RLHF run, because it is broken there:
 (1) the completion alone is trained, not the prompt again with it;
 (2) the text that is rewarded is the text that is trained on, token for token;
 (3) advantages are whitened once over the step, not within a minibatch, and a
     loss is divided once by its minibatch's tokens, however that is cut;
 (4) empty completions are left out instead of scored;
 (5) no dropout, so the ratio is exactly 1 before the first update;
 (6) where sampling is reshaped (top-p and the like), tokens are corrected by
     π/μ or the config is refused; KL and ratio are of the policy itself;
 (7) whitened rewards stay 0 after a completion, and so reach no other token.
With rloo, tokens are clipped one by one, as with grpo; TRL's RLOOTrainer clips
the ratio of a whole completion.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxalign.algorithms.ppo.config import PPOConfig
from jaxalign.algorithms.ppo.data import (
  Experience,
  PPOBatch,
  encode_rollout,
)
from jaxalign.algorithms.ppo.experience import make_experience
from jaxalign.algorithms.ppo.loss import Loss, make_loss
from jaxalign.core import gradients, keys, memory
from jaxalign.core.types import Metrics, Params, TrainState
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.training.rollout import RolloutSource, collect
from jaxalign.training.run import Run, Update

_log = logging.getLogger(__name__)


def train(
  run: Run[PPOConfig], source: RolloutSource, value_model: Model | None
) -> TrainState:
  """Samples, scores, improves; repeats.

  Args:
    run: its parameters hold those of the value model under `value`.
    source: of rollouts, whole tokens only.
    value_model: a separate value model with a score head; None = a head on
      the policy's states, or none at all.
  """
  config, state = run.config, run.state
  pad_id = source.generator.tokenizer.pad_id
  learn = run.jit(make_learn(run, value_model))
  for step in run.steps():
    metrics, rows = {}, ()
    rollout = collect(run, source, state, step)
    if rollout is not None:
      kept, batch = encode_rollout(config, pad_id, rollout)
      with run.stage("learn"):
        state, found = learn(state, batch, run.update_key(step))
        # The host's work on the texts, while the device learns.
        metrics, rows = rollout.metrics(kept), rollout.rows(step, kept)
        run.write_pending()
        # The stage lasts until the device has its results.
        found = jax.device_get(found)
      kl, gap = found["kl/mean"], found["sampling/logp_diff_max"]
      check_kl(step, float(kl), float(gap))
      metrics |= found
    state = run.end_step(step, state, metrics, rows)
  return state


def make_learn(run: Run[PPOConfig], value_model: Model | None) -> Update:
  """All of a step but its sampling, on a `PPOBatch` `[C, B, T]`.

  Reference and value passes, rewards, advantages, epochs: one program, so
  that only the metrics leave the device.
  """

  def learn(
    state: TrainState,
    frozen: Params,
    reference: Params,
    batch: PPOBatch,
    key: Array,
  ) -> tuple[TrainState, Metrics]:
    # What is known before the first update.
    experience, extra_state, metrics = make_experience(
      run, value_model, state, frozen, reference, batch
    )
    state = dataclasses.replace(state, extra_state=extra_state)
    # This step's coefficient; the state has the next one already.
    coefficient = metrics["objective/kl_coef"]
    loss = make_loss(run, value_model, frozen, reference, coefficient)
    # Fetched once for all epochs.
    state = dataclasses.replace(
      state, opt_state=memory.fetch(state.opt_state, after=coefficient)
    )
    state, found = ppo_epochs(run, loss, state, experience, key)
    return state, metrics | found

  return learn


def ppo_epochs(
  run: Run[PPOConfig],
  loss: Loss,
  state: TrainState,
  experience: Experience,
  key: Array,
) -> tuple[TrainState, Metrics]:
  """The epochs over minibatches, each cut into passes of `micro_rows`.

  The key shuffles the rows, but not in the first epoch.
  """
  config = run.config
  rows = config.rollout.rows
  # [C, B, ...] -> [rows, ...]: a minibatch may take any of the rows.
  flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), experience)

  def update(state: TrainState, batch: Experience):
    # Of the whole minibatch, so that cutting it into passes changes nothing.
    tokens = jnp.maximum(batch.text.target_mask.sum(), 1)

    def micro_loss(params: Params, micro: Experience, key: Array):
      del key  # no dropout, so the first ratio is exactly 1
      return loss(params, micro, tokens)

    total, found, grads = gradients.accumulate(
      micro_loss, state.params, batch, key
    )
    # Measured before this update, which is dropped if the policy is too far.
    moved = found["policy/policykl"] > 1.5 * config.target_kl
    if config.ratio_threshold:
      far = found["val/ratio"] > config.ratio_threshold
      total = jnp.where(far, jnp.nan, total)  # skipped and counted
    new, update_metrics = run.apply_gradients(state, grads, total)
    if config.target_kl:
      new = jax.tree.map(lambda a, b: jnp.where(moved, a, b), state, new)
    found["grad_norm"] = update_metrics["grad_norm"]
    return new, moved, found | {"updates": jnp.int32(1)}

  def minibatch(carry, picked: Int[Array, " B"]):
    state, stopped = carry
    batch = jax.tree.map(
      lambda x: x[picked].reshape(-1, config.micro_rows, *x.shape[1:]), flat
    )
    batch = meshes.constrain_rows(batch, 1)
    # Without a bound every update runs, so no branch is compiled.
    if not config.target_kl:
      state, _, found = update(state, batch)
      return (state, stopped), found
    # Once stopped, no pass is computed, and zeros stand for its metrics.
    shapes = jax.eval_shape(update, state, batch)[2]
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    state, stopped, found = jax.lax.cond(
      stopped,
      lambda state: (state, stopped, nothing),
      lambda state: update(state, batch),
      state,
    )
    return (state, stopped), found

  start = (state, jnp.zeros((), bool))
  order = minibatch_order(config, rows, key)
  rate = run.schedule(state.step)
  (state, _), found = jax.lax.scan(minibatch, start, order)
  # Means over the updates that ran: the others have added zeros.
  updates = found.pop("updates").sum()
  return state, {name: x.sum() / updates for name, x in found.items()} | {
    "lr": rate,
    "updates": updates,
    "skipped_updates": state.skipped,
  }


def minibatch_order(
  config: PPOConfig, rows: int, key: Array
) -> Int[Array, "U B"]:
  """The rows of each update; the first epoch takes them in order."""
  shuffled = [
    jax.random.permutation(keys.fold(key, epoch), rows)
    for epoch in range(1, config.epochs)
  ]
  epochs = jnp.stack([jnp.arange(rows), *shuffled])
  # No update spans two epochs, because batch_size divides the rows.
  return epochs.reshape(-1, config.batch_size)


def check_kl(step: int, kl: float, gap: float) -> None:
  """Warns of an estimated KL far below 0, which is a fault.

  Args:
    step: counted from 0.
    kl: estimated, nats a token.
    gap: largest difference of sampler and trainer, nats.
  """
  if kl < -0.05:
    _log.warning(
      "step %d: the estimated KL to the reference is %.3f nats a token, though "
      "a KL is never negative. Either tokens are not drawn from the policy "
      "(see sampling and sampling_correction), or sampler and trainer disagree "
      "(sampling/logp_diff_max is %.2g; above 0.1 is a fault), or the policy "
      "goes where only the reference is likely: raise kl.coefficient or lower "
      "optimizer.learning_rate",
      step + 1,
      kl,
      gap,
    )
