"""PPO's learning step against numbers worked out one text at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.ppo import setup
from jaxalign.algorithms.ppo import train as ppo
from jaxalign.algorithms.ppo.config import (
  KLConfig,
  PPOConfig,
  RolloutConfig,
  ShapingConfig,
)
from jaxalign.algorithms.ppo.data import PPOBatch
from jaxalign.algorithms.ppo.experience import (
  first_extra_state,
  shape_rewards,
)
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models.heads import VALUE
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel.mesh import make_mesh
from jaxalign.setup.models import ModelSpec
from jaxalign.setup.optimizer import optimizer_of
from jaxalign.setup.spec import RunSpec

PAIRS = [("ab", "cde"), ("c", "fghi"), ("abc", "a"), ("j", "cc")]
SCORES = [1.0, -2.0, 0.5, 3.0]
ENDED = [True, False, True, True]


def config(**changes):
  """Steps in proportion to gradients: Adam would blow rounding up."""
  given = {
    "steps": 1,
    "rollout": RolloutConfig(prompts=4),
    "batch_size": 4,
    "epochs": 1,
    "whiten_advantages": False,
    "optimizer": OptimizerConfig(
      learning_rate=1.0, schedule="constant", eps=1e3, weight_decay=0.0
    ),
  }
  return PPOConfig(**given | changes)


def first(cfg):
  return first_extra_state(cfg.kl.coefficient)


def test_values_apart_are_float32_beside_a_policy_in_bfloat16(word_tokenizer):
  """All of them is trained, however the policy's base is stored."""
  model = Model.build(NeoXConfig(6, 16, 2, 2, 24))
  policy = ModelSpec(model, word_tokenizer("abc"), make_mesh(), None)
  spec = RunSpec(config(value_model="separate"), policy, (1, 4, 8))
  params = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0))
  )
  values = setup.new_values(spec, params)
  assert {x.dtype for x in jax.tree.leaves(values)} == {jnp.dtype("float32")}


def rollout(toy, cfg, width=9, pairs=PAIRS, scores=SCORES, ended=ENDED):
  text = toy.text_batch(pairs, width, cfg.micro_rows)
  shape = -1, cfg.micro_rows
  zeros = jnp.zeros(text.targets.shape)
  return PPOBatch(
    text,
    jnp.asarray(scores).reshape(shape),
    jnp.asarray(ended).reshape(shape),
    zeros,
    zeros,
  )


def prepared(toy, cfg, moved=0.0, head=0.0):
  """A run whose policy has moved by so much of another one's weights."""
  model, reference = toy.build()
  _, other = toy.build(seed=1)
  params = jax.tree.map(lambda a, b: a + moved * b, reference, other)
  if cfg.advantage == "gae":
    kernel = head * jax.random.normal(jax.random.key(5), (16, 1))
    bias = jnp.full(1, head)
    params |= {VALUE: {"value_head": {"kernel": kernel, "bias": bias}}}
  return toy.run(cfg, model, params, (model, reference), first(cfg))


def learned(toy, cfg, batch=None, **given):
  run = prepared(toy, cfg, **given)
  learn = run.jit(ppo.make_learn(run, None))
  batch = rollout(toy, cfg) if batch is None else batch
  state, found = learn(run.state, batch, run.key)
  return run, state, found


def by_hand(toy, run, params):
  """(log-probs, values, entropies) of each completion's tokens."""
  found = []
  for prompt, completion in PAIRS:
    ids = toy.ids(prompt + completion)
    policy = {k: v for k, v in params.items() if k != VALUE}
    hidden, logp = toy.states(run.model, policy, ids)
    before = np.arange(len(prompt) - 1, len(ids) - 1)
    values = np.zeros(len(before))
    if VALUE in params:
      head = jax.tree.map(np.asarray, params[VALUE]["value_head"])
      values = (hidden[before] @ head["kernel"])[:, 0] + head["bias"]
    own = np.array([logp[t, ids[t + 1]] for t in before])
    entropies = -(np.exp(logp[before]) * logp[before]).sum(-1)
    found.append((own, values, entropies))
  return found


def gae(earned, values, lam=0.95):
  out, advantage = np.zeros(len(earned)), 0.0
  following = np.append(values[1:], 0.0)
  for t in reversed(range(len(earned))):
    advantage = earned[t] + following[t] - values[t] + lam * advantage
    out[t] = advantage
  return out


# Most tests have this one, whose programs are compiled once.
STEP = {"kl": KLConfig(coefficient=0.5), "vf_coef": 0.3, "entropy_coef": 0.1}


def advantages_by_hand(toy, run):
  """A and entropies of each completion's tokens, and its log π − log π₀.

  β = 0.5: rewards −β (log π − log π₀), the score on the last token.
  """
  now = by_hand(toy, run, run.state.params)
  reference = by_hand(toy, run, run.reference[1])
  every, entropies, spent = [], [], []
  for (logp, value, entropy), (before, *_), score in zip(
    now, reference, SCORES, strict=True
  ):
    earned = -0.5 * (logp - before)
    entropies.append(entropy)
    spent.append((logp - before).sum())
    earned[-1] += score
    every.append(gae(earned, value))
  return every, entropies, spent


def test_the_step_by_hand(toy):
  """At ρ = 1 the policy loss is −ΣA / tokens, the value loss ½ΣA² / tokens.

  As the returns are A + V. The entropy is of the whole vocabulary.
  """
  run, _, found = learned(toy, config(**STEP), moved=0.3, head=0.7)
  every, entropies, spent = advantages_by_hand(toy, run)
  flat = np.concatenate(every)
  policy, value = -flat.mean(), 0.5 * (flat**2).mean()
  entropy = np.concatenate(entropies).mean()
  wanted = {
    "loss/policy_avg": policy,
    "loss/value_avg": value,
    "policy/entropy_avg": entropy,
    "loss/total": policy + 0.3 * value - 0.1 * entropy,
    "objective/kl": np.mean(spent),
    "objective/scores": np.mean(SCORES),
    "objective/non_score_reward": -0.5 * np.mean(spent),
    "objective/rlhf_reward": np.mean(SCORES) - 0.5 * np.mean(spent),
    "kl/mean": np.sum(spent) / 10,
    "num_tokens": 10,
  }
  got = {name: float(found[name]) for name in wanted}
  assert got == pytest.approx(wanted, rel=1e-4)
  assert abs(np.mean(spent)) > 0.1


def test_the_first_update_has_ratio_one_and_kl_zero(toy):
  """Exactly: policy, reference and update read a text by one computation."""
  for micro in (4, 2):
    cfg = config(**STEP, micro_batch=micro)
    _, _, found = learned(toy, cfg, moved=0.0)
    assert float(found["val/ratio"]) == 1.0
    assert float(found["policy/approxkl_avg"]) == 0.0
    assert float(found["kl/mean"]) == float(found["objective/kl"]) == 0.0
    assert float(found["policy/clipfrac_avg"]) == 0.0


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_what_changes_no_update(toy, advantage):
  """Micro-batches, padding, and a row of which nothing was kept."""
  rollouts = RolloutConfig(prompts=2, samples_per_prompt=2)
  cfg = config(advantage=advantage, rollout=rollouts, epochs=2)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  run, whole, found = learned(toy, cfg, moved=0.3, head=0.7)
  moves = jax.tree.map(lambda a, b: a - b, whole.params, run.state.params)
  assert max(jnp.abs(x).max() for x in jax.tree.leaves(moves)) > 1e-4
  cut = dataclasses.replace(cfg, micro_batch=1)
  batch = rollout(toy, cut, width=13)
  _, state, again = learned(toy, cut, batch, moved=0.3, head=0.7)
  jax.tree.map(close, state.params, whole.params)
  for name in found:
    np.testing.assert_allclose(
      again[name], found[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_a_completion_without_tokens_counts_nowhere(toy):
  """Four completions, one of them empty, against the three alone."""
  some = config(**STEP, rollout=RolloutConfig(prompts=3), batch_size=3)
  three = rollout(toy, some, 9, PAIRS[:3], SCORES[:3], ENDED[:3])
  _, alone, found = learned(toy, some, three, moved=0.3, head=0.7)
  cfg = config(**STEP)
  pairs = [*PAIRS[:3], ("j", "")]
  four = rollout(toy, cfg, 9, pairs, [*SCORES[:3], 1e6])
  _, joined, again = learned(toy, cfg, four, moved=0.3, head=0.7)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, joined.params, alone.params)
  for name in ("objective/scores", "objective/kl", "loss/total", "val/mean"):
    np.testing.assert_allclose(again[name], found[name], rtol=1e-5)


def shaped(toy, cfg, extra_state=None):
  batch = rollout(toy, cfg)
  kl = jnp.where(batch.text.target_mask, -0.5, 0)
  return shape_rewards(cfg, batch, kl, extra_state or first(cfg))


def test_penalty_scaling_and_clip_by_hand(toy):
  """Scores 1, −2 − 1, 0.5, 3: mean 0.375, unbiased deviation 2.49583.

  Divided: 0.4007, −1.2020, 0.2003, 1.2020; the clip is at 1.
  """
  shaping = ShapingConfig(missing_eos_penalty=1.0, scaling="running", clip=1.0)
  cfg = config(shaping=shaping, kl=KLConfig(coefficient=0.0))
  earned, extra_state, found = shaped(toy, cfg)
  last = np.array([0.4006683, -1.0, 0.2003342, 1.0])
  np.testing.assert_allclose(earned.sum(axis=-1)[0], last, rtol=1e-5)
  assert float(found["objective/scores"]) == pytest.approx(last.mean(), 1e-5)
  # Centred before it is divided: 0.625 / 2.49583 and so on.
  centred = dataclasses.replace(shaping, centre=True, clip=0.0)
  earned, _, found = shaped(toy, config(shaping=centred, kl=cfg.kl))
  last = np.array([0.2504177, -1.3522555, 0.0500835, 1.0517543])
  np.testing.assert_allclose(earned.sum(axis=-1)[0], last, rtol=1e-5)
  # Running: the next step's scores join; reference: they do not.
  _, later, _ = shaped(toy, cfg, extra_state)
  assert float(later["scores"].count) == 8
  fixed = config(
    shaping=dataclasses.replace(shaping, scaling="reference"), kl=cfg.kl
  )
  _, later, _ = shaped(toy, fixed, extra_state)
  assert float(later["scores"].count) == 4


def test_kl_below_zero_can_be_clipped_and_the_coefficient_adapts(toy):
  kl = KLConfig(coefficient=0.2, target=6.0, horizon=100)
  earned, extra_state, found = shaped(toy, config(kl=kl))
  # Ten tokens of −0.5 in four completions: −1.25 each; the error is at least
  # −0.2.
  assert float(found["objective/kl"]) == pytest.approx(-1.25)
  assert float(extra_state["kl_coef"]) == pytest.approx(
    0.2 * (1 - 0.2 * 4 / 100)
  )
  np.testing.assert_allclose(
    earned.sum(), sum(SCORES) + 0.2 * 0.5 * 10, rtol=1e-5
  )
  earned, _, found = shaped(toy, config(kl=dataclasses.replace(kl, clip=True)))
  assert float(found["objective/kl"]) == 0.0
  np.testing.assert_allclose(earned.sum(), sum(SCORES), rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_kl_in_the_loss_pulls_towards_the_reference(toy, estimator):
  """With all scores equal, rloo has nothing else to go by."""
  kl = KLConfig(coefficient=1.0, place="loss", estimator=estimator)
  cfg = config(
    advantage="rloo",
    rollout=RolloutConfig(prompts=2, samples_per_prompt=2),
    kl=kl,
    epochs=8,
    optimizer=OptimizerConfig(
      learning_rate=3e-3, schedule="constant", weight_decay=0.0
    ),
  )
  batch = rollout(toy, cfg, scores=[1.0] * 4)
  run, state, found = learned(toy, cfg, batch, moved=0.3)
  learn = run.jit(ppo.make_learn(run, None))
  _, later = learn(state, batch, run.key)
  assert 0 < float(later["objective/kl"]) < 0.5 * float(found["objective/kl"])


def test_every_epoch_has_an_order_of_its_own():
  cfg = config(epochs=3, batch_size=4)
  order = ppo.minibatch_order(cfg, 8, jax.random.key(0))
  assert order.shape == (6, 4)
  first, second, third = order.reshape(3, 8).tolist()
  assert first == sorted(second) == sorted(third) == list(range(8))
  assert first != second != third != first


def test_target_kl_ends_the_updates_of_a_step(toy):
  fast = OptimizerConfig(
    learning_rate=0.05, schedule="constant", weight_decay=0.0
  )
  cfg = config(epochs=6, optimizer=fast, target_kl=1e-4)
  _, state, found = learned(toy, cfg, moved=0.3, head=0.7)
  assert 1 < int(found["updates"]) < 6
  assert int(state.skipped) == 0
  # The update that went too far is taken back: what is left is the first.
  if int(found["updates"]) == 2:
    one = config(epochs=1, optimizer=fast)
    _, first, _ = learned(toy, one, moved=0.3, head=0.7)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, state.params, first.params)


def test_an_update_beyond_the_ratio_threshold_is_skipped(toy):
  """The mean ratio is 1 in the first update, above 0.5: all are skipped."""
  cfg = config(epochs=2, ratio_threshold=0.5)
  run, state, _ = learned(toy, cfg, moved=0.3, head=0.7)
  assert int(state.skipped) == 2
  jax.tree.map(np.testing.assert_array_equal, state.params, run.state.params)


def test_reshaped_sampling_is_weighed(toy):
  """π/μ = 1/8 of two completions, 1/2 of the others, which the cap lowers."""
  cfg = config(**STEP, sampling_correction=0.25)
  batch = rollout(toy, cfg)
  mask = batch.text.target_mask
  run = prepared(toy, cfg, moved=0.3, head=0.7)
  logps = np.zeros(mask.shape, np.float32)
  for b, (logp, *_) in enumerate(by_hand(toy, run, run.state.params)):
    ratio = 8 if b < 2 else 2
    logps[0, b, np.flatnonzero(mask[0, b])] = logp + np.log(ratio)
  drawn = dataclasses.replace(batch, sampling_logps=jnp.asarray(logps))
  _, _, found = learned(toy, cfg, drawn, moved=0.3, head=0.7)
  every, *_ = advantages_by_hand(toy, run)
  shares = zip((0.125, 0.125, 0.25, 0.25), every, strict=True)
  wanted = -sum(share * advantages.sum() for share, advantages in shares) / 10
  np.testing.assert_allclose(found["loss/policy_avg"], wanted, rtol=1e-4)


def test_a_separate_value_model_learns_too(toy):
  cfg = config(vf_coef=1.0, kl=KLConfig(coefficient=0.0))
  model, params = toy.build()
  value_model, values = toy.build(head="score_last", seed=3)
  both = params | {VALUE: values}
  run = toy.run(cfg, model, both, (model, params), first(cfg))
  learn = run.jit(ppo.make_learn(run, value_model))
  state, found = learn(run.state, rollout(toy, cfg), run.key)

  def shift(a, b):
    moves = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)
    return max(jax.tree.leaves(moves))

  assert shift(state.params[VALUE]["blocks"], values["blocks"]) > 1e-5
  assert shift(state.params["blocks"], params["blocks"]) > 1e-5
  assert abs(float(found["val/mean"])) > 1e-3


def test_the_value_model_has_a_learning_rate_of_its_own():
  """A first AdamW step is rate · (sign(g) + λ p); its part's, times a ratio."""
  adamw = OptimizerConfig(eps=1e-12, weight_decay=0.5, clip_norm=0.0)
  optimizer = optimizer_of(config(optimizer=adamw, value_lr_ratio=0.25))
  params = {"blocks": jnp.array([4.0]), VALUE: {"bias": jnp.array([4.0])}}
  grads = jax.tree.map(lambda x: -3 * x, params)
  moves, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(moves["blocks"], [-1 + 0.5 * 4], rtol=1e-5)
  np.testing.assert_allclose(moves[VALUE]["bias"], [0.25], rtol=1e-5)


def test_adapters_and_the_value_head_are_trained(toy):
  adapters = LoraConfig(
    rank=2, alpha=4.0, dropout=0.5, targets=("dense", "embed_out")
  )
  model, params = toy.build(adapters=adapters)
  params["blocks"]["dense"]["lora_b"] *= 0
  params["lm_head"]["lora_b"] *= 0
  head = {"value_head": {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)}}
  cfg = config()
  run = toy.run(cfg, model, params | {VALUE: head}, None, first(cfg))
  run.reference = model.without_lora(), run.frozen
  learn = run.jit(ppo.make_learn(run, None))
  state, found = learn(run.state, rollout(toy, cfg), run.key)
  assert float(found["val/ratio"]) == 1.0
  assert abs(float(found["kl/mean"])) < 1e-7
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), state.params, run.state.params
  )
  assert moved["blocks"]["dense"]["lora_b"] > 0
  assert moved[VALUE]["value_head"]["kernel"] > 0
  assert set(state.params) == {"blocks", "lm_head", VALUE}
