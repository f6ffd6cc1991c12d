"""A head for each group: transformers reads the same scores and names."""

import json

import jax
import numpy as np
import pytest

from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.gpt_neo import GPTNeoConfig
from jaxalign.models.hf import folder
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

NAMES = ("alice", "bob", "cyd")
CONFIGS = {
  "neox": NeoXConfig(53, 20, 2, 5, 24, rotary_fraction=0.5, pad_id=0),
  "llama": LlamaConfig(53, 16, 2, 4, 2, 4, 20),
  "gpt-neo": GPTNeoConfig(53, 18, 2, 3, 24, windows=(0, 3), max_positions=32),
  "deberta": DebertaConfig(53, 24, 2, 3, 41, buckets=8, max_distance=40),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_heads_of_groups(name, tmp_path):
  head = "score_context" if name == "deberta" else "score_last"
  model = Model.build(CONFIGS[name]).replace(head=head, groups=NAMES)
  leaves, tree = jax.tree.flatten(model.shapes)
  rng = np.random.default_rng(0)
  drawn = [0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  params = jax.tree.unflatten(tree, drawn)
  folder.save(model, params, tmp_path / "a", config={"pad_token_id": 0})
  auto = transformers.AutoModelForSequenceClassification
  theirs, said = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
  assert not any(said[k] for k in ("missing_keys", "unexpected_keys"))
  assert theirs.config.id2label == dict(enumerate(NAMES))
  assert theirs.config.problem_type == "regression"
  mask = np.arange(11) < np.array([[11], [6], [2]])
  tokens = np.where(mask, rng.integers(1, 53, mask.shape), 0)
  with torch.no_grad():
    logits = theirs.eval()(
      torch.tensor(tokens), attention_mask=torch.tensor(mask).long()
    ).logits.numpy()
  ours = jax.jit(lambda p, *batch: model.bind(p).scores(*batch))
  np.testing.assert_allclose(ours(params, tokens, mask), logits, atol=1e-5)
  # And back, from what transformers writes.
  theirs.save_pretrained(tmp_path / "b")
  assert "num_labels" not in json.loads(
    (tmp_path / "b" / "config.json").read_text()
  )
  again, back = folder.load(tmp_path / "b")
  assert again.config.groups == NAMES
  np.testing.assert_array_equal(
    back["score_head"]["kernel"], params["score_head"]["kernel"]
  )
