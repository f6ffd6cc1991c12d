"""PPO's loop with the real sampler: it learns and it warns."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.ppo import train as ppo
from jaxalign.algorithms.ppo.config import KLConfig, PPOConfig, RolloutConfig
from jaxalign.algorithms.ppo.experience import first_extra_state
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models.heads import VALUE
from jaxalign.sampling import settings
from jaxalign.sampling.generator import Generator
from jaxalign.sampling.sampler import Sampler

EACH = 32


def config(**changes):
  given = {
    "rollout": RolloutConfig(prompts=1, samples_per_prompt=EACH),
    "batch_size": 16,
    "epochs": 2,
    "kl": KLConfig(coefficient=0.0),
    "optimizer": OptimizerConfig(
      learning_rate=0.02, schedule="constant", weight_decay=0.0
    ),
  }
  return PPOConfig(**given | changes)


def source(toy, model):
  """The real sampler; completions are rewarded for each "e" in them."""
  generator = Generator(
    Sampler(model, prompt_buckets=(4,), new_token_buckets=(4,)),
    toy.letters,
    settings.make(max_new_tokens=4, eos_ids=[]),
    whole_tokens=True,
  )

  def score(prompts, texts):
    return [text.count("e") for text in texts]

  return toy.source(["ab"], generator, score)


def start(toy, cfg):
  model, params = toy.build()
  reference = model, params
  if cfg.advantage == "gae":
    head = {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)}
    params = params | {VALUE: {"value_head": head}}
  extra_state = first_extra_state(cfg.kl.coefficient)
  return toy.run(cfg, model, params, reference, extra_state)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_it_learns_what_is_rewarded(toy, advantage):
  run = start(toy, config(steps=12, advantage=advantage))
  ppo.train(run, source(toy, run.model), None)
  metrics = run.recorder.metrics
  scores = [float(m["score/mean"]) for m in metrics]
  assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1.5
  gaps = [float(m["sampling/logp_diff_max"]) for m in metrics]
  assert max(gaps) < 1e-4  # the sampler reads the updated policy


def test_no_usable_completion_is_an_error(toy):
  """Empty completions are not learned from, whatever they score."""
  run = start(toy, config(steps=1))

  def sample(params, prompts, samples, key):
    return toy.completions(prompts, [""] * samples)

  def score(prompts, texts):
    return np.ones(len(texts))

  with pytest.raises(ValueError, match="every completion was empty"):
    ppo.train(run, toy.source(["ab"], sample, score), None)


def test_a_negative_kl_names_its_causes(caplog):
  with caplog.at_level(logging.WARNING):
    ppo.check_kl(7, -0.2, 0.5)
    ppo.check_kl(8, -0.01, 0.0)
  (said,) = caplog.messages
  assert said.startswith("step 8: the estimated KL")
  for cause in ("sampling_correction", "sampling/logp_diff_max is 0.5"):
    assert cause in said
