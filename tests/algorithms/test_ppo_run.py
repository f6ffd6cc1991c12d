"""PPO's loop with tools written by hand: it learns, it warns, it resumes."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms import ppo
from jaxalign.config import KLConfig, PPOConfig, RolloutConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.core import rewards
from jaxalign.models.heads import VALUE
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler

EACH = 32


def config(**changes):
  given = {
    "rollout": RolloutConfig(prompts=1, samples_per_prompt=EACH),
    "minibatch": 16,
    "epochs": 2,
    "kl": KLConfig(coefficient=0.0),
    "optimizer": OptimizerConfig(
      learning_rate=0.02, schedule="constant", weight_decay=0.0
    ),
  }
  return PPOConfig(**given | changes)


def tools(toy, cfg, model):
  """The real sampler; answers are rewarded for each "e" in them."""
  sampler = Sampler(model, prompt_buckets=(4,), new_token_buckets=(4,))
  wanted = settings.make(max_new_tokens=4, eos_ids=[])

  def sample(params, asked, each, key):
    drawn = sampler(
      params, [toy.ids(p) for p in asked], wanted, key, samples_per_prompt=each
    )
    texts = ["".join(chr(ord("a") + i - 1) for i in t) for t in drawn.tokens]
    found = toy.answers(asked, texts)
    return dataclasses.replace(found, samples=drawn, trained=[4] * len(texts))

  def encode(scored):
    answers = scored.answers
    pairs = list(zip(answers.asked, answers.texts, strict=True))
    text = toy.text_batch(pairs, 8, cfg.micro_rows)
    # Letters beyond "z" stand for themselves: the drawn ids, not the text.
    drawn, cut = answers.samples, lambda x: x.reshape(text.tokens.shape)
    tokens, logps = np.array(text.tokens).reshape(-1, 8), np.zeros((EACH, 8))
    tokens[:, 2:6], logps[:, 2:6] = drawn.tokens, drawn.model_logps
    score = jnp.asarray(scored.scores, jnp.float32)
    shape = text.tokens.shape[:2]
    logps = jnp.asarray(cut(logps), jnp.float32)
    rollout = ppo.Rollout(
      dataclasses.replace(text, tokens=jnp.asarray(cut(tokens))),
      *(score.reshape(shape), jnp.ones(shape, bool), logps, logps),
    )
    return np.arange(EACH), rollout

  return ppo.PPOTools(
    prompts=lambda step: ["ab"],
    sample=sample,
    score=lambda asked, texts: np.array([t.count("e") for t in texts]) * 1.0,
    held_out=None,
    encode=encode,
    diversity=lambda *_: {},
  )


def start(toy, cfg):
  model, params = toy.build()
  prior = params
  if cfg.advantage == "gae":
    head = {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)}
    params = params | {VALUE: {"value_head": head}}
  return toy.context(
    cfg,
    model,
    params,
    (model, prior),
    carried=rewards.first_carried(cfg.kl.coefficient),
  )


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_it_learns_what_is_rewarded(toy, advantage):
  cfg = config(steps=12, advantage=advantage)
  ctx, log = start(toy, cfg)
  ppo.run(ctx, tools(toy, cfg, ctx.model), toy.optimizer(cfg), toy.rate(cfg))
  scores = [float(m["score/mean"]) for m in log.metrics]
  assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1.5
  gaps = [float(m["sampling/logp_diff_max"]) for m in log.metrics]
  assert max(gaps) < 1e-4  # the sampler reads the updated policy


def test_a_run_goes_on_where_it_stood(toy):
  """Steps 2 and 3 of a run that was stopped are those of one that was not."""
  kl = KLConfig(coefficient=0.1, target=1.0, horizon=50)
  cfg = config(steps=4, kl=kl)
  ctx, log = start(toy, cfg)
  given = tools(toy, cfg, ctx.model)
  whole = ppo.run(ctx, given, toy.optimizer(cfg), toy.rate(cfg))
  half = dataclasses.replace(
    *(ctx,), state=log.states[1], steps=lambda: iter((2, 3))
  )
  half = dataclasses.replace(half, report=lambda *_: None, save=lambda *_: None)
  again = ppo.run(half, given, toy.optimizer(cfg), toy.rate(cfg))
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert float(whole.carried["kl_coef"]) != pytest.approx(0.1)
  assert float(whole.carried["scores"].count) == 4 * EACH


def test_a_negative_kl_names_its_causes(caplog):
  with caplog.at_level(logging.WARNING):
    ppo._check_kl(7, -0.2, 0.5)
    ppo._check_kl(8, -0.01, 0.0)
  (said,) = caplog.messages
  assert said.startswith("step 7: the estimated KL")
  for cause in ("sampling_correction", "sampling/logp_diff_max is 0.5"):
    assert cause in said
