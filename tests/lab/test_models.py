"""The models that ship: small, whole, and what their cards say they are."""

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
  made = {}

  def get(name):
    if name not in made:
      made[name] = jaxalign.load(LAB / name)
    return made[name]

  return get


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


@pytest.mark.parametrize("name", ["reward-train", "reward-test"])
def test_reward_models_dislike_broken_text(load, name):
  """Means over demonstrations against the same ones broken in three ways."""
  with (LAB / "demonstrations.jsonl").open() as lines:
    rows = [json.loads(line) for line in lines][::18]
  asked = [row["prompt"] for row in rows]
  said = [row["completion"].split()[:20] for row in rows]
  rng = np.random.default_rng(0)
  texts = {
    "whole": said,
    "one word again and again": [[words[0]] * 20 for words in said],
    "shuffled": [list(rng.permutation(words)) for words in said],
    "another prompt's": said[1:] + said[:1],
  }
  means = {}
  for kind, some in texts.items():
    found = [" ".join(words) for words in some]
    means[kind] = jaxalign.score(
      load(name), asked, found, encoding="pair"
    ).mean()
  for kind, mean in means.items():
    assert kind == "whole" or mean < means["whole"] - 0.2, means
