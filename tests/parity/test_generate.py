"""Greedy sampling against transformers' generate."""

import jax
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.hf import folder
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

VOCAB, NEW = 83, 24
PROMPTS = [[5, 6, 7, 8, 5, 6], [9], [10, 11, 12, 10, 11, 12, 10, 11, 60, 3, 2]]
MODELS = {
  "neox": transformers.GPTNeoXConfig(
    vocab_size=VOCAB,
    hidden_size=36,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=40,
    initializer_range=0.3,
    max_position_embeddings=64,
  ),
  "llama": transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=40,
    initializer_range=0.3,
    max_position_embeddings=64,
  ),
  "qwen3": transformers.Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=24,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    num_hidden_layers=2,
    intermediate_size=40,
    initializer_range=0.3,
    max_position_embeddings=64,
    use_sliding_window=True,
    sliding_window=5,
    max_window_layers=1,
  ),
  "gpt-neo": transformers.GPTNeoConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    num_heads=4,
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    window_size=5,
    intermediate_size=40,
    initializer_range=0.3,
    max_position_embeddings=64,
  ),
}
# ours, theirs
SETTINGS = [
  ({}, {}),
  (
    {"repetition_penalty": 1.4, "no_repeat_ngram": 3},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
  ),
  (
    {"repetition_penalty": 0.6, "no_repeat_ngram": 2},
    {"repetition_penalty": 0.6, "no_repeat_ngram_size": 2},
  ),
  (
    {"eos_ids": tuple(range(4)), "min_new_tokens": 7},
    {"eos_token_id": [0, 1, 2, 3], "min_new_tokens": 7},
  ),
]


def load(config, path):
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(config)
  theirs.eval().save_pretrained(path)
  model, params = folder.load(path)
  return Sampler(model, (16,), (NEW,)), params, theirs


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  return load(MODELS[request.param], path)


# Settings know no architecture, so one has them all.
@pytest.mark.parametrize(
  ("pair", "ours", "theirs"),
  [("neox", *each) for each in SETTINGS]
  + [(name, {}, {}) for name in MODELS if name != "neox"],
  indirect=["pair"],
)
def test_greedy_tokens_are_equal(pair, ours, theirs):
  sampler, params, model = pair
  drawn = settings.make(temperature=0, max_new_tokens=NEW, **ours)
  # One batch of three lengths here; one prompt at a time there, because
  # transformers would penalise the padding of a batch.
  out = sampler(params, PROMPTS, drawn, jax.random.key(0))
  for row, prompt in enumerate(PROMPTS):
    expected = model.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt)),
      do_sample=False,
      max_new_tokens=NEW,
      pad_token_id=0,
      **{"eos_token_id": None, **theirs},
    )[0, len(prompt) :].tolist()
    assert out.tokens[row, : out.lengths[row]].tolist() == expected


def test_longrope_ends_short_texts_at_its_limit(tmp_path):
  """There the keys would have to be rotated again; a long prompt goes on."""
  config = transformers.Phi3Config(
    vocab_size=VOCAB,
    hidden_size=24,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_hidden_layers=2,
    intermediate_size=40,
    initializer_range=0.3,
    pad_token_id=0,
    max_position_embeddings=64,
    original_max_position_embeddings=8,
    rope_parameters={
      "rope_type": "longrope",
      "rope_theta": 10000.0,
      "short_factor": [1.0, 1.2, 1.5, 2.0],
      "long_factor": [4.0, 6.0, 8.0, 9.0],
    },
  )
  sampler, params, theirs = load(config, tmp_path)
  drawn = settings.make(temperature=0, max_new_tokens=NEW)
  out = sampler(params, PROMPTS, drawn, jax.random.key(0))
  np.testing.assert_array_equal(out.lengths, [2, 7, NEW])
  for row, prompt in enumerate(PROMPTS):
    expected = theirs.generate(
      torch.tensor([prompt]),
      do_sample=False,
      max_new_tokens=NEW,
      eos_token_id=None,
    )[0, len(prompt) :].tolist()
    length = out.lengths[row]
    assert out.tokens[row, :length].tolist() == expected[:length]
  # A prefix is read as a short text, so it must not make a long one.
  with pytest.raises(UserError, match="the model's context of 8"):
    sampler(params, [[1, 2, 3]], drawn, jax.random.key(0), prefix=[1] * 6)


def test_a_batch_with_padding_is_equal(pair):
  sampler, params, model = pair
  drawn = settings.make(temperature=0, max_new_tokens=NEW)
  out = sampler(params, PROMPTS, drawn, jax.random.key(0))
  width = max(map(len, PROMPTS))
  tokens = np.zeros((len(PROMPTS), width), np.int64)
  mask = np.zeros_like(tokens)
  for row, prompt in enumerate(PROMPTS):
    tokens[row, width - len(prompt) :] = prompt
    mask[row, width - len(prompt) :] = 1
  expected = model.generate(
    torch.tensor(tokens),
    attention_mask=torch.tensor(mask),
    do_sample=False,
    max_new_tokens=NEW,
    pad_token_id=0,
    eos_token_id=None,
  )[:, width:]
  np.testing.assert_array_equal(out.tokens, expected.numpy())
