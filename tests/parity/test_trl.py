"""Our formulas against TRL's own, on tensors that record_trl.py wrote down.

Everything is compared to 1e-5. Each file names the TRL it was recorded from:
0.11.4, the last with the classic PPOTrainer, or the newest. Whole updates are
compared in test_trl_steps.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.reward_model.data import ScoredBatch
from jaxalign.algorithms.reward_model.train import pair_loss
from jaxalign.core import advantages, losses, rewards
from jaxalign.core.logprobs import logprobs_and_entropy, reverse_kl

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def masked_mean(x, mask):
  return jnp.where(mask, x, 0).sum() / mask.sum()


# TRL 0.11.4: core functions.


@pytest.fixture(scope="module")
def core(recorded):
  return recorded("ppo")["functions"]


def test_whiten(core):
  """`core.masked_whiten`; PPOTrainer and PPOv2Trainer call the same one."""
  mask = core["mask"]
  found = advantages.whiten(core["x"], mask)
  close(found, jnp.where(mask, core["masked_whiten"], 0))
  kept = advantages.whiten(core["x"], mask, shift=False)
  close(kept, jnp.where(mask, core["masked_whiten_keeping_mean"], 0))


def test_moments_of_one_batch(core):
  """`core.masked_mean` and `core.masked_var`, the unbiased one."""
  found = rewards.Moments.none().add(core["x"], core["mask"])
  close(found.mean, core["masked_mean"])
  close(found.deviation**2, core["masked_var"])


def test_running_moments(core):
  """`RunningMoments.update`: three batches, one after the other."""
  wanted, moments = core["moments"], rewards.Moments.none()
  for i, batch in enumerate(wanted["batches"]):
    moments = moments.add(batch, jnp.ones(batch.shape, bool))
    close(moments.count, wanted["count"][i])
    close(moments.mean, wanted["mean"][i])
    close(moments.deviation, wanted["std"][i])


def test_adaptive_coefficient(core):
  """`AdaptiveKLController.update`, from 0.2 at target 6 and horizon 1000."""
  found = jnp.float32(0.2)
  wanted = core["controller"]
  for i, kl in enumerate(wanted["kl"]):
    found = rewards.adapt(found, kl, 6.0, 1000, wanted["answers"][i])
    close(found, wanted["value"][i])


def test_logprobs_and_entropy(core):
  """`core.logprobs_from_logits` and `core.entropy_from_logits`."""
  everywhere = jnp.ones(core["labels"].shape, bool)
  logp, entropy = logprobs_and_entropy(
    core["logits"], core["labels"], everywhere, lambda x: x
  )
  close(logp, core["logprobs_from_logits"])
  close(entropy, core["entropy_from_logits"])


# TRL 0.11.4: methods of the classic PPOTrainer.


@pytest.fixture(scope="module")
def methods(recorded):
  return recorded("ppo")["methods"]


def penalties(given, kind):
  """Our KL of each token; `logits` are the states of a model of one matrix."""

  def same(x):
    return x

  states, labels, mask = given["logits"], given["labels"], given["mask"]
  if kind == "full":
    return reverse_kl(states, given["ref_logits"], mask, same, same)
  both = (
    logprobs_and_entropy(x, labels, mask, same)[0]
    for x in (states, given["ref_logits"])
  )
  ours = {"kl": "k1", "mse": "k2", "abs": "abs"}
  return losses.kl_estimate(ours[kind], jnp.subtract(*both))


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_rewards(methods, kind):
  """`PPOTrainer.compute_rewards`: the penalty, and the score at the end."""
  given = methods["compute_rewards"]
  kl, wanted = penalties(given, kind), given["found"][kind]
  mask = given["mask"]
  close(kl, jnp.where(mask, wanted["kls"], 0))
  found = rewards.at_end(given["scores"], mask) - 0.3 * kl
  close(found, jnp.where(mask, wanted["rewards"], 0))


def estimated(given, mask, whiten_rewards):
  shaped = given["rewards"]
  if whiten_rewards:
    shaped = advantages.whiten(shaped, mask, shift=False)
  found, returns = advantages.gae(
    shaped, given["values"], mask, given["gamma"], given["lam"]
  )
  return advantages.whiten(found, mask), returns


@pytest.mark.parametrize(
  ("ends", "rewards"),
  [("ragged", "plain"), ("flush", "plain"), ("flush", "whitened")],
)
def test_advantages(methods, ends, rewards):
  """`PPOTrainer.compute_advantages`: GAE, then whitening over the step."""
  given = methods["compute_advantages"]
  mask, wanted = given[ends]["mask"], given[ends][rewards]
  found, returns = estimated(given, mask, rewards == "whitened")
  close(found, jnp.where(mask, wanted["advantages"], 0))
  close(returns, jnp.where(mask, wanted["returns"], 0))


def test_whitened_rewards_stay_within_an_answer(methods):
  """Ours differs where whitened answers end before the last column.

  TRL whitens the padding behind an answer too: what was 0 there becomes
  something else, and GAE carries it back into the answer. An answer's returns
  then depend on how long others are. Ours are those of the answers moved to
  the right, where nothing is behind them.
  """
  given = methods["compute_advantages"]
  mask = given["ragged"]["mask"]
  found, returns = estimated(given, mask, True)
  theirs = given["ragged"]["whitened"]["returns"]
  wrong = jnp.abs(jnp.where(mask, theirs - returns, 0)).max(axis=1)
  ends_last = mask[:, -1]
  close(wrong[ends_last], 0)
  assert (wrong[~ends_last] > 1e-2).all()
  shift = mask.shape[1] - 1 - jnp.argmax(jnp.cumsum(mask, axis=1), axis=1)
  roll = jax.vmap(jnp.roll)
  moved = {k: roll(given[k], shift) for k in ("rewards", "values")}
  again = estimated(given | moved, roll(mask, shift), True)
  close(roll(found, shift), again[0])
  close(roll(returns, shift), again[1])


def test_losses_of_a_minibatch(methods):
  """`PPOTrainer.loss`: policy, value, their gradients, and what is logged."""
  given = methods["loss"]
  mask, config, stats = given["mask"], given["config"], given["stats"]
  clip = config["cliprange"]

  def mean(x):
    return masked_mean(x, mask)

  def policy(logprobs):
    log_ratio = logprobs - given["old_logprobs"]
    return mean(
      losses.clipped_surrogate_loss(log_ratio, given["advantages"], clip, clip)
    )

  def value(vpreds):
    before, after = given["values"], given["returns"]
    return mean(
      losses.clipped_value_loss(
        vpreds, before, after, config["cliprange_value"]
      )
    )

  found, gradient = jax.value_and_grad(policy)(given["logprobs"])
  close(found, stats["loss/policy"])
  close(gradient, given["by_logprobs"])
  error, slope = jax.value_and_grad(value)(given["vpreds"])
  close(error, stats["loss/value"])
  close(config["vf_coef"] * slope, given["by_vpreds"])
  close(found + config["vf_coef"] * error, stats["loss/total"])
  log_ratio = given["logprobs"] - given["old_logprobs"]
  close(jnp.exp(log_ratio), stats["policy/ratio"])
  close(mean(losses.kl_estimate("k2", log_ratio)), stats["policy/approxkl"])
  close(-mean(log_ratio), stats["policy/policykl"])


# TRL 0.11.4: DPOTrainer, the last with a conservative loss.


@pytest.mark.parametrize("smoothing", ["0.0", "0.1", "0.3"])
def test_conservative_preference(recorded, smoothing):
  """`DPOTrainer.dpo_loss`, sigmoid with label smoothing."""
  given = recorded("smoothing")
  wanted = given["found"][smoothing]
  better = given["chosen"] - given["ref_chosen"]
  worse = given["rejected"] - given["ref_rejected"]
  found = losses.dpo_loss(
    "sigmoid", better - worse, given["beta"], float(smoothing)
  )
  close(found, wanted["loss"])
  close(given["beta"] * better, wanted["rewards/chosen"])
  close(given["beta"] * worse, wanted["rewards/rejected"])


# The newest TRL.


@pytest.fixture(scope="module")
def rated(recorded):
  return recorded("preference")["reward"]


@pytest.mark.parametrize("case", ["plain", "margin", "both"])
def test_pairwise_and_centring(rated, case):
  """`RewardTrainer.compute_loss`, its gradient and what it logs."""
  margin = 0.0 if case == "plain" else rated["margin"]
  wanted = rated["found"][case]

  def loss(scores):
    better, worse = jnp.split(scores[:, 0], 2)
    total = losses.bradley_terry_loss(better, worse, margin).mean()
    if case == "both":
      total += rated["centring"] * losses.reward_centering(better, worse).mean()
    return total

  found, gradient = jax.value_and_grad(loss)(rated["scores"])
  close(found, wanted["loss"])
  close(gradient, wanted["gradient"])


def test_pairs_within_a_batch(rated):
  """The same by `pair_loss`: eight answers to four prompts."""
  better, worse = jnp.split(rated["scores"][:, 0], 2)
  empty = jnp.zeros((8, 1), jnp.int32)
  batch = ScoredBatch(
    *(empty, empty == 0, empty),
    reward=jnp.repeat(jnp.array([1.0, 0.0]), 4),
    margin=jnp.tile(rated["margin"], 2),
    group=jnp.tile(jnp.arange(4), 2),
    chars=empty[:, 0],
    real=jnp.ones(8, bool),
  )
  scores = jnp.concatenate([better, worse])
  loss, pairs = pair_loss(scores, batch)
  assert int(pairs.sum()) == 4
  close(loss.sum() / 4, rated["found"]["margin"]["loss"])
  logged = rated["found"]["margin"]["metrics"]
  close((better - worse).mean(), logged["margin"])
  close((better > worse).mean(), logged["accuracy"])


@pytest.fixture(scope="module")
def groups(recorded):
  return recorded("groups")


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_group_advantages(groups, kind):
  """`_generate_and_score_completions`; what no function scored is NaN there."""
  scores = groups["scores"]
  found = getattr(advantages, kind)(scores, ~jnp.isnan(scores))
  close(found, groups["advantages"][kind])


def test_unscaled_advantages(groups):
  """GRPO's `scale_rewards="none"` is RLOO's advantage times (n − 1) / n."""
  scores = groups["scores"]
  mask = ~jnp.isnan(scores)
  count = mask.sum(axis=1, keepdims=True)
  found = advantages.rloo(scores, mask) * (count - 1) / count
  close(found, groups["advantages"]["unscaled"])
