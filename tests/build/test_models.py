"""New models by their sizes."""

import pytest

from jaxalign.build import models
from jaxalign.config import InitConfig, SFTConfig
from jaxalign.parallel import mesh as meshes


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt_neo"])
def test_a_new_model_of_every_architecture(kind, word_tokenizer, tmp_path):
  word_tokenizer("abc").save(tmp_path)
  init = InitConfig(
    tokenizer=str(tmp_path),
    model_type=kind,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
  )
  config = SFTConfig(policy="init", init=init)
  loaded = models.open_policy(config, meshes.make_mesh(), "lm").load()
  assert loaded.model.config.layers == 3
  assert loaded.params["embedding"]["embedding"].shape == (6, 16)
