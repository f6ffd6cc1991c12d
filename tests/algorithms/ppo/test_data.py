"""Completions as rollouts: which of their tokens are trained."""

import jax
import numpy as np

from jaxalign.algorithms.ppo.config import PPOConfig, RolloutConfig
from jaxalign.algorithms.ppo.data import blank_batch, encode_rollout
from jaxalign.core.types import Completions, Samples
from jaxalign.training.rollout import Rollout

EOS = 1


def completions(drawn, texts, num_tokens):
  width = max(len(d) for d in drawn)
  tokens = np.zeros((len(drawn), width), np.int32)
  for row, ids in zip(tokens, drawn, strict=True):
    row[: len(ids)] = ids
  lengths = np.array([len(d) for d in drawn], np.int32)
  logps = -np.arange(1.0, 1 + tokens.size, dtype=np.float32)
  logps = logps.reshape(tokens.shape)
  samples = Samples(tokens, lengths, lengths * 0, logps, 2 * logps)
  prompts = ["ab", "c"]
  prompt_ids = [list(prompt.encode()) for prompt in prompts]
  ended = [True, False, True, True]
  return Completions(prompts, prompt_ids, texts, samples, ended, num_tokens)


def test_a_rollout_holds_what_was_drawn():
  """Two prompts, two completions each; one is empty, one has no score."""
  drawn = [[*b"xyz"], [*b"x", EOS], [*b"pq"], [*b"r"]]
  found = completions(drawn, ["x", "x", "pq", ""], [1, 2, 2, 0])
  scores = np.array([[0.5, -np.inf], [2.0, 3.0]])
  config = PPOConfig(
    rollout=RolloutConfig(prompts=2, samples_per_prompt=2), batch_size=2
  )
  kept, batch = encode_rollout(config, 0, Rollout(found, scores, None))
  assert kept.tolist() == [0, 2]
  tokens = np.asarray(batch.text.tokens)
  assert tokens.shape == (2, 2, 32)
  mask = np.asarray(batch.text.loss_mask)
  rows = tokens.reshape(4, -1), mask.reshape(4, -1)
  trained = [row[keep].tolist() for row, keep in zip(*rows, strict=True)]
  assert trained == [[*b"x"], [], [*b"pq"], []]
  assert tokens[0, 0, :4].tolist() == [*b"abx", 0]
  assert tokens[1, 0, :4].tolist() == [*b"cpq", 0]
  np.testing.assert_array_equal(batch.score, [[0.5, 0.0], [2.0, 0.0]])
  np.testing.assert_array_equal(batch.ended, [[True, False], [True, True]])
  blank = blank_batch(tokens.shape)
  assert jax.tree.map(np.shape, blank) == jax.tree.map(np.shape, batch)
  # Each log-prob stands at the position before its token.
  logps = np.asarray(batch.model_logps).reshape(4, -1)
  assert logps.shape == (4, 31)
  np.testing.assert_array_equal(logps[2, :3], [-7, -8, 0])
  np.testing.assert_array_equal(logps[0, :3], [0, -1, 0])
  np.testing.assert_array_equal(
    np.asarray(batch.sampling_logps), 2 * np.asarray(batch.model_logps)
  )
