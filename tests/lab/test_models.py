"""The models that ship: small, whole, and what their cards say they are."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import jaxalign

LAB = pathlib.Path(jaxalign.__file__).parent / "lab"
KINDS = {
  "policy": "AutoModelForCausalLM",
  "reward-train": "AutoModelForSequenceClassification",
  "reward-test": "AutoModelForSequenceClassification",
}
ASKED = "\n\nHuman: How do I keep my bike from rusting?\n\nAssistant:"


@pytest.fixture(scope="module")
def load():
  return functools.cache(lambda name: jaxalign.load(LAB / name))


def test_all_of_it_stays_below_16_megabytes():
  assert sum(p.stat().st_size for p in LAB.rglob("*") if p.is_file()) < 16e6


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_few_and_in_half_precision(name):
  with safetensors.safe_open(LAB / name / "model.safetensors", "np") as file:
    tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
  assert {t.dtype for t in tensors} == {np.dtype("float16")}
  assert sum(t.size for t in tensors) < (6e6 if name == "policy" else 2e6)
  config = json.loads((LAB / name / "config.json").read_text())
  assert config["vocab_size"] <= 4096


@pytest.mark.parametrize("name", KINDS)
def test_cards_say_where_a_model_comes_from(name):
  card = (LAB / name / "README.md").read_text()
  for word in ("license:", "configs/lab/", "minutes", "## Data", "## Metrics"):
    assert word in card, word


@pytest.mark.parity
@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_the_same(load, name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = load(name)
  ids = model.tokenizer.encode(ASKED + " Keep it dry.")
  theirs = getattr(transformers, KINDS[name]).from_pretrained(
    LAB / name, dtype=torch.float32
  )
  with torch.no_grad():
    wanted = theirs.eval()(torch.tensor([ids])).logits.numpy()
  found = np.asarray(jaxalign.logits(model, jnp.array([ids])))
  np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-4)


ANSWERED = {
  "How do I keep my bike from rusting?": "Keep it dry, clean the chain and put "
  "a little oil on it after every ride in the rain.",
  "What should I feed a puppy?": "Give it puppy food three or four times a "
  "day, and always leave it some fresh water.",
  "Why is the sky blue?": "Air scatters the blue part of sunlight more than "
  "the red part, so blue light reaches us from all sides.",
  "How can I fall asleep faster?": "Go to bed at the same time each night, "
  "keep the room dark and leave your phone in the kitchen.",
  "How long do I boil an egg?": "Six minutes for a soft egg and ten minutes "
  "for a hard one, then cool it in cold water.",
  "What is a good present for my grandmother?": "A photo album of the family "
  "would be a lovely present, or a plant for her window.",
  "How do I learn to play the guitar?": "Learn three easy chords first and "
  "practise them for ten minutes every day.",
  "Can you name a good book for a long flight?": "A detective story by Agatha "
  "Christie is a good book to read on a plane.",
}


@pytest.mark.parametrize("name", ["reward-train", "reward-test"])
def test_reward_models_dislike_broken_text(load, name):
  """Means over answers, against the same ones broken in two ways.

  Another prompt's answer is no such case: both models take it for as good.
  """
  asked = [f"\n\nHuman: {question}\n\nAssistant:" for question in ANSWERED]
  said = [answer.split() for answer in ANSWERED.values()]
  rng = np.random.default_rng(0)
  texts = {
    "whole": said,
    "one word again and again": [[words[0]] * 20 for words in said],
    "shuffled": [list(rng.permutation(words)) for words in said],
  }
  means = {}
  for kind, some in texts.items():
    found = [" ".join(words) for words in some]
    means[kind] = jaxalign.score(
      load(name), asked, found, encoding="pair"
    ).mean()
  for kind, mean in means.items():
    assert kind == "whole" or mean < means["whole"] - 0.2, means
