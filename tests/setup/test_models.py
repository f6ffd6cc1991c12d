"""New models by their sizes, and what tells one model from another."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.config import InitConfig
from jaxalign.config.sections import AdapterConfig, PrecisionConfig
from jaxalign.data.tokenizer import Notes
from jaxalign.errors import UserError
from jaxalign.models.hf import folder
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.setup import models


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt_neo"])
def test_a_new_model_of_every_architecture(
  kind, word_tokenizer, tmp_path, monkeypatch
):
  """Its tokenizer is named like any model: here by a revision on the hub."""
  word_tokenizer("abc").save(tmp_path)
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path)
  )
  init = InitConfig(
    tokenizer="owner/name@v1",
    model_type=kind,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
  )
  config = SFTConfig(policy="init", init=init)
  loaded = models.open_policy(config, meshes.make_mesh(), "lm").load()
  assert loaded.model.config.layers == 3
  assert loaded.params["embedding"]["embedding"].shape == (6, 16)


NAME = "gpt_neox.layers.0.attention.dense.weight"


@pytest.fixture
def policy(word_tokenizer, tmp_path):
  """The folder of a small model, in one file."""
  model = Model.build(NeoXConfig(6, 16, 2, 2, 24))
  params = model.init(jax.random.key(0))
  tokenizer = word_tokenizer("abc")
  folder.save(model, params, tmp_path / "policy", also=tokenizer.save)
  return tmp_path / "policy"


def opened(policy, **changes):
  config = SFTConfig(policy=str(policy), **changes)
  return models.open_policy(config, meshes.make_mesh(), "lm")


@pytest.mark.parametrize("rank", [0, 2])
def test_the_shapes_are_those_of_what_is_read(policy, rank):
  """Adapters stay float32, whatever the weights are; a drawn head does too."""
  precision = PrecisionConfig(params="bfloat16")
  lora = AdapterConfig(rank=rank, targets=("dense",) if rank else ())
  spec = opened(policy, precision=precision, lora=lora)

  def seen(leaf):
    return leaf.shape, str(leaf.dtype), leaf.sharding

  given = jax.tree.map(seen, spec.shapes())
  assert given == jax.tree.map(seen, spec.read())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_head_that_is_trained_stays_float32(rank, word_tokenizer, tmp_path):
  """Beside adapters a score head is trained in full."""
  model = Model.build(NeoXConfig(6, 16, 2, 2, 24)).replace(head="score_last")
  params, also = model.init(jax.random.key(0)), word_tokenizer("abc").save
  folder.save(model, params, tmp_path / "reward", also=also)
  config = SFTConfig(
    policy=str(tmp_path / "reward"),
    precision=PrecisionConfig(params="bfloat16"),
    lora=AdapterConfig(rank=rank, targets=("dense",) if rank else ()),
  )
  spec = models.open_policy(config, meshes.make_mesh(), "score_last")
  read = spec.read()
  kernel = read["score_head"]["kernel"]
  assert kernel.dtype == ("float32" if rank else "bfloat16")
  assert read["embedding"]["embedding"].dtype == "bfloat16"


def flip(tensors):
  """The lowest bit of one value."""
  tensors[NAME].view(np.uint32).flat[7] ^= 1


def swap(tensors):
  tensors[NAME][0, :2] = tensors[NAME][0, 1::-1].copy()


def swap_layers(tensors):
  other = NAME.replace(".0.", ".1.")
  tensors[NAME], tensors[other] = tensors[other], tensors[NAME]


def round_off(tensors):
  tensors[NAME] = tensors[NAME].astype(jnp.bfloat16)


@pytest.mark.parametrize("change", [flip, swap, swap_layers, round_off])
def test_a_digest_sees_every_bit_and_its_place(change, policy):
  before = opened(policy).fingerprint()
  file = policy / "model.safetensors"
  tensors = {name: x.copy() for name, x in load_file(file).items()}
  save_file(tensors, file, metadata={"format": "pt"})
  again = opened(policy).fingerprint()
  change(tensors)
  save_file(tensors, file, metadata={"format": "pt"})
  after = opened(policy).fingerprint()
  assert after["config"] == again["config"] == before["config"]
  assert after["parameters"] != again["parameters"]


def test_a_digest_sees_every_file(policy, tmp_path):
  """A tensor of the second of two files."""
  loaded = opened(policy).load()
  place = tmp_path / "sharded"
  folder.save(
    loaded.model,
    loaded.params,
    place,
    shard_bytes=4000,
    also=loaded.tokenizer.save,
  )
  files = sorted(place.glob("*.safetensors"))
  assert len(files) > 1
  found = {opened(place).fingerprint()["parameters"]}
  for file in files:
    tensors = {name: x.copy() for name, x in load_file(file).items()}
    next(iter(tensors.values())).view(np.uint32).flat[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    found.add(opened(place).fingerprint()["parameters"])
  assert len(found) == len(files) + 1


def test_a_digest_sees_the_config_but_not_how_memory_is_saved(policy):
  before = opened(policy).fingerprint()
  assert opened(policy).fingerprint() == before
  assert opened(policy, remat="full").fingerprint() == before
  half = PrecisionConfig(compute="bfloat16")
  other = opened(policy, precision=half).fingerprint()
  assert other["config"] != before["config"]
  assert other["parameters"] == before["parameters"]
  # Another config.json with the same weights.
  path = policy / "config.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {"layer_norm_eps": 1e-3}))
  other = opened(policy).fingerprint()
  assert other["config"] != before["config"]
  assert other["parameters"] == before["parameters"]


def test_attention_is_chosen_for_the_devices_and_changes_no_digest(policy):
  """Nothing but the dense form is for a CPU; a kernel by name is refused."""
  assert opened(policy).model.config.attention == "dense"
  with pytest.raises(UserError, match="splash does not run on a cpu"):
    opened(policy, attention="splash")
  kernel = opened(policy).model.replace(attention="splash")
  spec = dataclasses.replace(opened(policy), model=kernel)
  assert spec.fingerprint() == opened(policy).fingerprint()


def test_a_digest_sees_the_type_of_the_parameters(policy):
  """They are rounded as they are read."""
  half = PrecisionConfig(params="bfloat16")
  other = opened(policy, precision=half).fingerprint()
  assert other["parameters"] != opened(policy).fingerprint()["parameters"]


def test_a_digest_of_a_new_model_is_its_seed_and_config(
  word_tokenizer, tmp_path
):
  word_tokenizer("abc").save(tmp_path)

  def digest(seed=0, hidden_size=16):
    init = InitConfig(
      tokenizer=str(tmp_path),
      hidden_size=hidden_size,
      num_hidden_layers=1,
      num_attention_heads=2,
    )
    config = SFTConfig(policy="init", init=init, seed=seed)
    return models.open_policy(config, meshes.make_mesh(), "lm").fingerprint()

  assert digest() == digest()
  assert digest(seed=1)["parameters"] != digest()["parameters"]
  assert digest(hidden_size=32)["config"] != digest()["config"]


def test_a_reward_models_encoding_is_its_own(capsys):
  """What ships says so; from elsewhere it goes by architecture, and is said."""
  spec = models.open_reward_model("lab", meshes.make_mesh(), "float32", "x")
  capsys.readouterr()

  def choose(asked, tokenizer=spec.tokenizer, model=spec.model):
    return models.choose_encoding(asked, tokenizer, model, "mine")

  assert choose("auto") == choose("pair") == "pair"
  with pytest.raises(
    UserError, match="mine was trained with the encoding pair"
  ):
    choose("concat")
  assert not capsys.readouterr().out
  silent = dataclasses.replace(spec.tokenizer, notes=Notes())
  assert choose("concat", silent) == "concat"
  assert not capsys.readouterr().out
  assert choose("auto", silent) == "pair"
  causal = Model.build(NeoXConfig(6, 16, 2, 2, 24, head="score_last"))
  assert choose("auto", silent, causal) == "concat"
  assert capsys.readouterr().out.count("mine does not say how it reads") == 2
