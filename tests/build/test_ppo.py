"""Answers as rollouts: which tokens are trained, and that they are rewarded."""

import numpy as np
import pytest

from jaxalign.build import ppo
from jaxalign.build.models import Loaded
from jaxalign.config import PPOConfig, RolloutConfig
from jaxalign.core.types import Answers, Samples
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime.answers import Scored

EOS = 1
# Tokens of one letter, and two of several: 2 is "end.\n\n", 3 is "\n\nHuman:".
LONG = {2: "end.\n\n", 3: "\n\nHuman:"}


def say(ids):
  return "".join(LONG.get(i, chr(i)) for i in ids if i != EOS)


def letters(texts, **_):
  return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


TOKENIZER = Tokenizer(
  inner=letters,
  name="letters",
  pad_id=0,
  bos_id=None,
  eos_id=EOS,
  vocab_size=128,
  prefix=(),
  suffix=(),
)


MODEL = Model.build(NeoXConfig(128, 8, 1, 1, 8, max_positions=64))
POLICY = Loaded(MODEL, {}, TOKENIZER)


@pytest.mark.parametrize(
  ("ids", "text", "wanted"),
  [
    # Nothing was cut: the end of text is trained too.
    ([*b" yes", EOS], "yes", (5, "yes")),
    # Blanks behind the text go with the cut.
    ([*b" yes", 3, *b"no"], "yes", (4, "yes")),
    # The cut falls behind a token that ends in blanks.
    ([*b" the ", 2, *b"Human:"], "the end.", (6, "the end.")),
    # It falls inside a token: "end" cannot be had without its full stop.
    ([*b" the ", 2, *b"x"], "the end", (5, "the")),
    ([3, *b"yes"], "", (0, "")),
    ([2, *b"x"], "e", (0, "")),
  ],
)
def test_cut_tokens(ids, text, wanted):
  assert ppo.cut_tokens(say, list(ids), text) == wanted


def answers(drawn, texts, trained):
  width = max(len(d) for d in drawn)
  tokens = np.zeros((len(drawn), width), np.int32)
  for row, ids in zip(tokens, drawn, strict=True):
    row[: len(ids)] = ids
  lengths = np.array([len(d) for d in drawn], np.int32)
  logps = -np.arange(1.0, 1 + tokens.size, dtype=np.float32)
  logps = logps.reshape(tokens.shape)
  samples = Samples(tokens, lengths, lengths * 0, logps, 2 * logps)
  return Answers(["ab", "c"], texts, samples, [True] * len(texts), trained)


def test_a_rollout_holds_what_was_drawn():
  """Two prompts, two answers each; the last is empty, one has no score."""
  drawn = [[*b"xyz"], [*b"x", EOS], [*b"pq"], [*b"r"]]
  found = answers(drawn, ["x", "x", "pq", ""], [1, 2, 2, 0])
  scores = np.array([[0.5, -np.inf], [2.0, 3.0]])
  config = PPOConfig(
    rollout=RolloutConfig(prompts=2, samples_per_prompt=2), minibatch=2
  )
  kept, rollout = ppo.encode_rollout(
    config, POLICY, meshes.make_mesh(), Scored(found, scores, None)
  )
  assert kept.tolist() == [0, 2]
  tokens = np.asarray(rollout.text.tokens)
  assert tokens.shape == (2, 2, 32)
  mask = np.asarray(rollout.text.loss_mask)
  rows = tokens.reshape(4, -1), mask.reshape(4, -1)
  trained = [row[keep].tolist() for row, keep in zip(*rows, strict=True)]
  assert trained == [[*b"x"], [], [*b"pq"], []]
  assert tokens[0, 0, :4].tolist() == [*b"abx", 0]
  assert tokens[1, 0, :4].tolist() == [*b"cpq", 0]
  np.testing.assert_array_equal(rollout.score, [[0.5, 0.0], [2.0, 0.0]])
  logps = np.asarray(rollout.model_logps).reshape(4, -1)
  np.testing.assert_array_equal(logps[2, 1:3], [-7, -8])
  np.testing.assert_array_equal(
    np.asarray(rollout.sampling_logps), 2 * np.asarray(rollout.model_logps)
  )


def test_nothing_usable_is_an_error():
  found = answers([[*b"x"], [*b"y"]], ["", ""], [0, 0])
  config = PPOConfig(rollout=RolloutConfig(prompts=2), minibatch=2)
  scored = Scored(found, np.full((2, 1), -np.inf), None)
  with pytest.raises(ValueError, match="every completion was empty"):
    ppo.encode_rollout(config, POLICY, meshes.make_mesh(), scored)


def test_texts_are_those_of_whole_tokens():
  """What the reward model reads is what is trained, token for token."""
  drawn = [[*b" the ", 2, *b"x"], [*b" yes", EOS]]
  raw = answers(drawn, ["the end", "yes"], None)
  found = ppo.exact(lambda *_: raw, say)("params", ["ab", "c"], 1, "key")
  assert found.texts == ["the", "yes"]
  assert found.trained == [5, 5]
