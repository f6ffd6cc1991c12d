"""DeBERTa against transformers, on random tiny models of odd shapes."""

import jax
import numpy as np
import pytest

from jaxalign.models.deberta import DebertaConfig, relative_rows
from jaxalign.models.hf import folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

BASE = {
  "vocab_size": 53,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 41,
  "max_position_embeddings": 40,
  "relative_attention": True,
  "position_biased_input": False,
  "max_relative_positions": -1,
  "position_buckets": 8,
  "pos_att_type": ["p2c", "c2p"],
  "share_att_key": True,
  "norm_rel_ebd": "layer_norm",
  "type_vocab_size": 0,
}
STYLES = {
  "v3": {},
  "v2": {"conv_kernel_size": 3, "conv_act": "gelu"},
  "own projections": {"share_att_key": False, "pos_att_type": "c2p|p2c"},
  "c2p, no buckets": {
    "pos_att_type": ["c2p"],
    "position_buckets": -1,
    "max_relative_positions": 7,
  },
  "p2c, plain table": {
    "pos_att_type": ["p2c"],
    "share_att_key": False,
    "norm_rel_ebd": "none",
  },
  "absolute": {
    "relative_attention": False,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "embedding_size": 16,
    "type_vocab_size": 2,
  },
  "everything, one layer": {
    "num_hidden_layers": 1,
    "conv_kernel_size": 5,
    "conv_groups": 2,
    "position_biased_input": True,
    "type_vocab_size": 2,
  },
}


def make(tmp_path, **changes):
  """A transformers model with lively weights, and ours from its folder."""
  config = transformers.DebertaV2Config(**(BASE | changes), num_labels=1)
  torch.manual_seed(0)
  theirs = transformers.DebertaV2ForSequenceClassification(config).eval()
  for name, p in theirs.named_parameters():
    norm = "LayerNorm.weight" in name
    p.data = torch.randn(p.shape) * (0.2 if norm else 0.4) + float(norm)
  theirs.save_pretrained(tmp_path)
  return theirs, *folder.load(tmp_path)


def rows(length, seed=0):
  rng = np.random.default_rng(seed)
  lengths = np.append(rng.integers(1, length + 1, 4), length)
  mask = np.arange(length) < lengths[:, None]
  tokens = np.where(mask, rng.integers(1, 53, (5, length)), 0)
  return tokens, mask, np.where(mask, rng.integers(0, 2, (5, length)), 0)


def reference(theirs, tokens, mask, types, **kwargs):
  with torch.no_grad():
    return theirs(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask).long(),
      token_type_ids=torch.tensor(types)
      if theirs.config.type_vocab_size
      else None,
      **kwargs,
    )


def score(model, params, *args):
  return np.asarray(
    jax.jit(lambda p, *a: model.bind(p).score(*a))(params, *args)
  )


@pytest.mark.parametrize("style", STYLES)
def test_scores_are_those_of_transformers(style, tmp_path):
  theirs, model, params = make(tmp_path, **STYLES[style])
  batch = rows(37)
  expected = reference(theirs, *batch).logits[:, 0].numpy()
  np.testing.assert_allclose(
    score(model, params, *batch), expected, atol=1e-4, rtol=0
  )


def test_single_token_is_scored_as_by_transformers(tmp_path):
  theirs, model, params = make(tmp_path, **STYLES["v2"])
  batch = rows(1)
  expected = reference(theirs, *batch).logits[:, 0].numpy()
  np.testing.assert_allclose(
    score(model, params, *batch), expected, atol=1e-4, rtol=0
  )


def test_every_layer_is_that_of_transformers(tmp_path):
  theirs, model, params = make(tmp_path, **STYLES["v2"])
  tokens, mask, types = rows(29)
  expected = reference(
    theirs, tokens, mask, types, output_hidden_states=True
  ).hidden_states
  for layers in range(1, 4):
    part = model.replace(layers=layers)
    blocks = jax.tree.map(lambda p, n=layers: p[:n], params["blocks"])
    hidden, _ = jax.jit(
      lambda p, *batch, part=part: part.bind(p).encode(*batch)
    )(params | {"blocks": blocks}, tokens, mask, types)
    np.testing.assert_allclose(
      np.asarray(hidden)[mask], expected[layers].numpy()[mask], atol=1e-5
    )


def test_export_loads_in_transformers_with_the_same_scores(tmp_path):
  theirs, model, params = make(tmp_path / "a", **STYLES["v2"])
  folder.save(model, params, tmp_path / "b")
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "b"
  )
  batch = rows(13)
  for name, tensor in theirs.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  assert torch.equal(
    reference(theirs, *batch).logits, reference(again, *batch).logits
  )


@pytest.mark.parametrize(
  ("buckets", "distance"), [(256, 512), (32, 64), (5, 17), (64, 1024)]
)
def test_buckets_are_those_of_transformers(buckets, distance):
  module = transformers.models.deberta_v2.modeling_deberta_v2
  distances = np.arange(-3 * distance, 3 * distance)
  theirs = module.make_log_bucket_position(
    torch.tensor(distances), buckets, distance
  ).long()
  config = DebertaConfig(9, 8, 1, 1, 8, buckets=buckets, max_distance=distance)
  expected = torch.clamp(theirs + buckets, 0, 2 * buckets - 1).numpy()
  np.testing.assert_array_equal(relative_rows(config, distances), expected)
