"""PPO: the policy answers, is rewarded, and improves within a clip.

Ziegler 2019, Stiennon 2020, Ouyang 2022 (RLHF); Schulman 2017 (the clip) and
2016 (GAE). One step: answer P prompts S times each, score the answers, then

  rₜ = −β KLₜ + [t is the last token] score
  Aₜ = GAE(r, V), or Σr against the prompt's other answers (rloo, grpo)
  epochs over minibatches of  L_policy + c_v L_value − c_e entropy

Differs from TRL 0.4.1 and SuperHF's RLHF run, because it is broken there:
 (1) the answer alone is trained, not the prompt again with it;
 (2) the text that is rewarded is the text that is trained on, token for token;
 (3) advantages are whitened once over the step, not within a minibatch, and a
     loss is divided once by its minibatch's tokens, however that is cut;
 (4) empty answers are left out instead of scored;
 (5) no dropout, so the ratio is exactly 1 before the first update;
 (6) where sampling is reshaped (top-p and the like), tokens are corrected by
     π/μ or the config is refused; KL and ratio are of the policy itself;
 (7) whitened rewards stay 0 behind an answer, and so reach no other token.
With rloo, tokens are clipped one by one, as with grpo; TRL's RLOOTrainer clips
the ratio of a whole answer.
"""

import dataclasses
import logging
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core import advantages, gradients, keys, losses, optim, rewards
from jaxalign.core.logprobs import logprobs_and_entropy, reverse_kl
from jaxalign.core.types import Metrics, Params, TextBatch, TrainState
from jaxalign.models import lora
from jaxalign.models.heads import VALUE, policy_of
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime import answers
from jaxalign.runtime.answers import Tools
from jaxalign.runtime.context import Context

_log = logging.getLogger(__name__)


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """A step's answers, prompt by prompt, in C passes of B rows."""

  text: TextBatch  # [C, B, T]; loss_mask: tokens that were drawn and kept
  score: Float[Array, "C B"]  # raw logit; anything where nothing was kept
  ended: Bool[Array, "C B"]  # False = cut at the length limit
  model_logps: Float[Array, "C B T"]  # of the drawn tokens, by the sampler
  sampling_logps: Float[Array, "C B T"]  # under what they were drawn from


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
  """A rollout with what is known before the first update; column t = t + 1."""

  text: TextBatch  # [..., B, T]
  logp: Float[Array, "*C B T"]  # of the policy that drew
  value: Float[Array, "*C B T"]  # V before the token is drawn
  reference: Float[Array, "*C B T"]  # log-probs of the reference
  weight: Float[Array, "*C B T"]  # π/μ where sampling was reshaped, else 1
  advantage: Float[Array, "*C B T"]
  returns: Float[Array, "*C B T"]


@dataclasses.dataclass(frozen=True)
class PPOTools(Tools):
  """The tools of a PPO run.

  Attributes:
    critic: a separate value model with a score head, its parameters under
      `value`; None = `value` is a head on the policy's states, or is missing
      where no value is needed.
  """

  critic: Model | None = None


def run(
  ctx: Context,
  tools: PPOTools,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> TrainState:
  """Rolls out, rewards, improves; repeats."""
  state = ctx.state
  learn = ctx.compile(make_learn(ctx, tools.critic, optimizer, rate))
  assert ctx.prior is not None
  prior, last = ctx.prior[1], None
  for step in ctx.steps():
    key = keys.fold(ctx.key, step)
    metrics, rows, rolled = {}, [], None
    with answers.tolerated(ctx, step):
      policy = policy_of(lora.join(state.params, ctx.frozen))
      scored = answers.draw(ctx, tools, policy, step, key)
      rolled = scored, *tools.encode(scored)
    if last:
      _check_kl(step, *(float(x) for x in jax.device_get(last)))
    if rolled:
      scored, kept, batch = rolled
      with ctx.stage("learn"):
        state, found = learn(state, ctx.frozen, prior, batch, key)
        jax.block_until_ready(found)
      last = found["kl/mean"], found["sampling/logp_diff_max"]
      metrics, rows = answers.tell(tools, step, scored, kept)
      metrics |= found
    state = optim.advance(state)
    answers.end_step(ctx, tools, step, state, metrics, rows)
  return state


def make_learn(
  ctx: Context,
  critic: Model | None,
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """All of a step but its answers: `(state, frozen, prior, rollout, key)`.

  Reference and value passes, rewards, advantages, epochs; a program of its
  own, so that nothing but the answers and the metrics leaves the device.
  """
  config = ctx.config

  def learn(
    state: TrainState, frozen: Params, prior: Params, batch: Rollout, key: Array
  ) -> tuple[TrainState, Metrics]:
    params = lora.join(state.params, frozen)
    look = lambda text: _look(ctx, critic, params, prior, text)
    seen = jax.lax.map(look, batch.text)
    mask = batch.text.loss_mask[..., 1:]
    shaped, carried, metrics = rewards.shape(
      *(config.shaping, config.kl, batch.score, batch.ended),
      *(seen["kl"], mask, state.carried),
    )
    advantage, returns = advantages.estimate(
      config, shaped, seen["value"], mask
    )
    drawn_from = batch.sampling_logps[..., 1:]
    judged = Judged(
      batch.text,
      *(seen["logp"], seen["value"], seen["reference"]),
      _weight(config.sampling_correction, seen["logp"] - drawn_from),
      *(advantage, returns),
    )
    gap = jnp.abs(seen["logp"] - batch.model_logps[..., 1:])
    tokens = jnp.maximum(mask.sum(), 1)
    metrics |= {
      "kl/mean": seen["k1"].sum() / tokens,
      "sampling/logp_diff_max": jnp.where(mask, gap, 0).max(),
      "policy/entropy_avg": seen["entropy"].sum() / tokens,
      "num_tokens": tokens,
    }
    state = dataclasses.replace(state, carried=carried)
    coefficient = metrics["objective/kl_coef"]
    loss = _make_loss(ctx, critic, frozen, prior, coefficient)
    state, found = _improve(config, loss, optimizer, rate, state, judged, key)
    return state, metrics | found | _explained(judged, mask)

  return learn


def _forward(ctx: Context, critic: Model | None, params: Params, text):
  """Module, states, log-probs, entropies and values of `[B, T]` texts."""
  inputs = (text.tokens, text.positions, text.segments)
  module = ctx.model.bind(policy_of(params))
  hidden = module(*inputs)[0][:, :-1]
  mask, targets = text.loss_mask[:, 1:], text.tokens[:, 1:]
  logp, entropy = logprobs_and_entropy(hidden, targets, mask, module.unembed)
  value = jnp.zeros_like(logp)
  if critic is not None:
    judge = critic.bind(params[VALUE])
    value = judge.score_head(judge(*inputs)[0][:, :-1])[..., 0]
  elif VALUE in params:
    head = params[VALUE]["value_head"]
    # Behind the states proper may stand an output adapter's features.
    states = hidden[..., : len(head["kernel"])].astype(jnp.float32)
    value = (states @ head["kernel"])[..., 0] + head["bias"]
  value = jnp.where(mask, value.astype(jnp.float32), 0)
  return module, hidden, logp, entropy, value


def _look(ctx: Context, critic, params: Params, prior: Params, text: TextBatch):
  """What the policy that drew and the reference say of `[B, T]` texts."""
  module, hidden, logp, entropy, value = _forward(ctx, critic, params, text)
  before, states = _reference(ctx, prior, text)
  mask, targets = text.loss_mask[:, 1:], text.tokens[:, 1:]
  # The same computation as the policy's: their difference starts at exactly 0.
  reference, _ = logprobs_and_entropy(states, targets, mask, before.unembed)
  return {
    "logp": logp,
    "reference": reference,
    "entropy": entropy,
    "value": value,
    "kl": _kl(
      ctx.config.kl.estimator,
      logp - reference,
      lambda: reverse_kl(hidden, states, mask, module.unembed, before.unembed),
    ),
    "k1": logp - reference,
  }


def _reference(ctx: Context, prior: Params, text: TextBatch):
  """The reference policy as a module, and its states before each target."""
  assert ctx.prior is not None
  before = ctx.prior[0].bind(prior)
  hidden, _ = before(text.tokens, text.positions, text.segments)
  return before, jax.lax.stop_gradient(hidden[:, :-1])


def _kl(
  estimator: str, log_ratio: Float[Array, "B T"], exact: Callable[[], Array]
) -> Float[Array, "B T"]:
  """KL(policy ‖ reference) of each token; `exact` is run for `full` alone."""
  if estimator == "full":
    return exact()
  return losses.divergence(estimator, log_ratio)


def _weight(cap: float, log_weight: Float[Array, "C B T"]):
  """min(π/μ, cap): what makes up for drawing from μ (Espeholt 2018)."""
  if not cap:
    return jnp.ones_like(log_weight)
  return jnp.minimum(jnp.exp(log_weight), cap)


def _make_loss(
  ctx: Context, critic, frozen: Params, prior: Params, coefficient
):
  """`(params, Judged micro-batch, tokens) -> (loss, metrics)`, summed up."""
  config = ctx.config

  def loss(params: Params, part: Judged, tokens: Array):
    whole = lora.join(params, frozen)
    module, hidden, logp, entropy, value = _forward(
      ctx, critic, whole, part.text
    )
    mask = part.text.loss_mask[:, 1:]
    mean = lambda x: jnp.where(mask, x, 0).sum() / tokens
    log_ratio = jnp.where(mask, logp - part.logp, 0)
    gain = losses.policy_gradient(
      *(log_ratio, part.advantage),
      *(config.clip_low, config.clip_high, config.dual_clip),
    )
    policy = mean(part.weight * gain)
    total = policy
    found = {"loss/policy_avg": policy}
    if config.advantage == "gae":
      error = losses.value(value, part.value, part.returns, config.value_clip)
      found["loss/value_avg"] = mean(error)
      total += config.vf_coef * found["loss/value_avg"]
      free = losses.value(value, part.value, part.returns)
      found["val/clipfrac_avg"] = mean(error > free)
    if config.entropy_coef:
      total -= config.entropy_coef * mean(entropy)
    if config.kl.place == "loss":

      def exact():
        before, states = _reference(ctx, prior, part.text)
        return reverse_kl(hidden, states, mask, module.unembed, before.unembed)

      kl = _kl(config.kl.estimator, logp - part.reference, exact)
      total += coefficient * mean(kl)
    ratio = jnp.exp(log_ratio)
    falls = (part.advantage < 0) & (ratio < 1 - config.clip_low)
    rises = (part.advantage > 0) & (ratio > 1 + config.clip_high)
    return total, found | {
      "loss/total": total,
      "val/ratio": mean(ratio),
      "policy/clipfrac_avg": mean(falls | rises),
      "policy/approxkl_avg": mean(0.5 * log_ratio**2),
      "policy/policykl": -mean(log_ratio),
    }

  return loss


def _improve(
  config: Any,
  loss: Callable[..., tuple[Array, Metrics]],
  optimizer: optax.GradientTransformation,
  rate: Callable[[Array], Array],
  state: TrainState,
  judged: Judged,
  key: Array,
) -> tuple[TrainState, Metrics]:
  """The epochs over minibatches, each cut into passes of `micro_rows`."""
  rows = config.rollout.rows
  flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), judged)
  lr = rate(state.step)

  def update(state: TrainState, batch: Judged):
    tokens = jnp.maximum(batch.text.loss_mask[..., 1:].sum(), 1)
    total, found, grads = gradients.accumulate(
      lambda params, part, _: loss(params, part, tokens),
      *(state.params, batch, key),
    )
    moved = found["policy/policykl"] > 1.5 * config.target_kl
    if config.ratio_threshold:
      far = found["val/ratio"] > config.ratio_threshold
      total = jnp.where(far, jnp.nan, total)  # left out and counted
    new, norm = optim.apply_gradients(
      state, grads, total, lr, optimizer, config.optimizer.ema
    )
    if config.target_kl:
      new = jax.tree.map(lambda a, b: jnp.where(moved, a, b), state, new)
    return new, moved, found | {"grad_norm": norm, "updates": jnp.int32(1)}

  def minibatch(carry, picked):
    state, stopped = carry
    cut = lambda x: x[picked].reshape(-1, config.micro_rows, *x.shape[1:])
    batch = meshes.constrain_rows(jax.tree.map(cut, flat), 1)
    if not config.target_kl:
      state, _, found = update(state, batch)
      return (state, stopped), found
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
  order = _order(config, rows, key)
  (state, _), found = jax.lax.scan(minibatch, start, order)
  updates = found.pop("updates").sum()
  mean = {name: x.sum() / updates for name, x in found.items()}
  return state, mean | {
    "lr": lr,
    "updates": updates,
    "skipped_updates": state.skipped,
  }


def _order(config: Any, rows: int, key: Array) -> Int[Array, "U B"]:
  """The rows of each update; the first epoch takes them as they come."""
  shuffled = [
    jax.random.permutation(keys.fold(key, epoch), rows)
    for epoch in range(1, config.epochs)
  ]
  epochs = jnp.stack([jnp.arange(rows), *shuffled])
  return epochs.reshape(-1, config.minibatch)


def _explained(judged: Judged, mask: Bool[Array, "C B T"]) -> Metrics:
  """How well values foretold returns: 1 = wholly, <= 0 = not at all."""
  count = jnp.maximum(mask.sum(), 1)
  mean = lambda x: jnp.where(mask, x, 0).sum() / count
  error = mean((judged.value - judged.returns) ** 2)
  spread = mean((judged.returns - mean(judged.returns)) ** 2)
  return {
    "val/mean": mean(judged.value),
    "returns/mean": mean(judged.returns),
    "val/var_explained": 1 - error / jnp.maximum(spread, 1e-8),
  }


def _check_kl(step: int, kl: float, gap: float) -> None:
  """An estimated KL far below 0 is a fault; says which it may be."""
  if kl < -0.05:
    _log.warning(
      "step %d: the estimated KL to the reference is %.3f nats a token, though "
      "a KL is never negative. Either tokens are not drawn from the policy "
      "(see sampling and sampling_correction), or sampler and trainer disagree "
      "(sampling/logp_diff_max is %.2g; above 0.1 is a fault), or the policy "
      "goes where only the reference is likely: raise kl.coefficient or lower "
      "optimizer.learning_rate",
      *(step, kl, gap),
    )
