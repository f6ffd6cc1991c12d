"""Adapters against the peft library, in both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.hf import folder, peft
from jaxalign.models.layers import LoraConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

pytestmark = [
  pytest.mark.parity,
  # peft reads an attribute that transformers is renaming.
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
  # It stores lm_head itself beside the adapter of lm_head, and says so.
  pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

TOKENS = np.array([[5, 3, 11, 9, 2, 8, 14]], np.int32)


SIZES = {
  "vocab_size": 29,
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "intermediate_size": 20,
}
GPT_NEO = {
  "num_layers": 2,
  "attention_types": [[["global", "local"], 1]],
  "tie_word_embeddings": False,
}
CONFIGS = {
  "neox": transformers.GPTNeoXConfig(**SIZES),
  "llama": transformers.LlamaConfig(**SIZES),
  "gpt-neo": transformers.GPTNeoConfig(**SIZES, **GPT_NEO),
  "phi3": transformers.Phi3Config(**SIZES, pad_token_id=0),
}
TARGETS = {
  "neox": ["query_key_value", "dense"],
  "llama": ["q_proj", "v_proj", "down_proj"],
  "gpt-neo": ["out_proj", "c_fc"],
  "phi3": ["qkv_proj", "gate_up_proj"],
}


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory):
  """The folder of a tiny model, and linear layers of its blocks."""
  path = tmp_path_factory.mktemp(request.param)
  save(CONFIGS[request.param], path)
  return path, TARGETS[request.param]


def save(config, path):
  torch.manual_seed(0)
  auto = transformers.AutoModelForCausalLM
  auto.from_config(config).save_pretrained(path)


def load(path, **more):
  opened = folder.open_pretrained(path, **more)
  return opened.model, opened.read()


def logits(model, params):
  def run(params):
    module = model.bind(params)
    positions = jnp.arange(TOKENS.shape[1])[None]
    tokens = jnp.asarray(TOKENS)
    hidden, _ = module(tokens, positions, jnp.ones_like(tokens))
    return module.unembed(hidden)

  return np.asarray(jax.jit(run)(params))


def filled(params):
  """Adapters as after some training: B is no longer zero."""
  trainable, frozen = lora.split(params)

  def draw(x):
    return 0.3 * jax.random.normal(jax.random.key(1), x.shape)

  return lora.join(jax.tree.map(draw, trainable), frozen)


def test_export_loads_in_peft_and_merges(base, tmp_path):
  path, targets = base
  targets = [*targets, "lm_head"]
  adapters = LoraConfig(3, 12.0, targets=tuple(targets))
  model, params = load(path, lora=adapters)
  params = filled(params)
  ours = logits(model, params)
  assert abs(ours - logits(*folder.load(path))).max() > 0.01
  peft.save(model, params, tmp_path / "adapters", base=str(path))
  lm = transformers.AutoModelForCausalLM.from_pretrained(path)
  wrapped = theirs.PeftModel.from_pretrained(lm, tmp_path / "adapters").eval()
  with torch.no_grad():
    expected = wrapped(torch.tensor(TOKENS).long()).logits.numpy()
  np.testing.assert_allclose(ours, expected, atol=1e-4)

  folder.save(model, params, tmp_path / "merged")
  merged = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "merged"
  ).eval()
  with torch.no_grad():
    whole = merged(torch.tensor(TOKENS).long()).logits.numpy()
  np.testing.assert_allclose(whole, expected, atol=1e-4)

  again, back = folder.load(tmp_path / "adapters")
  assert sorted(again.lora.targets) == sorted(targets)
  assert again.lora.scale == model.lora.scale
  jax.tree.map(np.testing.assert_array_equal, back, params)


def save_peft(whole, targets, path, **settings):
  """Writes drawn adapters with peft and returns its logits."""
  config = theirs.LoraConfig(
    r=2, lora_alpha=5, target_modules=targets, **settings
  )
  wrapped = theirs.get_peft_model(whole, config).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in wrapped.named_parameters():
      if "lora_" in name:
        parameter.normal_(std=0.3)
    expected = wrapped(torch.tensor(TOKENS).long()).logits.numpy()
  wrapped.save_pretrained(path)
  return expected


def their_lm(path):
  return transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapters_load_here(base, rslora, tmp_path):
  path, targets = base
  targets = [*targets, "lm_head"] if rslora else targets
  expected = save_peft(
    their_lm(path), targets, tmp_path, task_type="CAUSAL_LM", use_rslora=rslora
  )
  model, params = folder.load(tmp_path)
  assert sorted(model.lora.targets) == sorted(targets)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", r".*(v_proj|dense|c_fc)"])
def test_all_linear_and_patterns_mean_the_same_here(base, targets, tmp_path):
  """All linear layers are those of the blocks; the output is not among them."""
  path, _ = base
  expected = save_peft(their_lm(path), targets, tmp_path, task_type="CAUSAL_LM")
  model, params = folder.load(tmp_path)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
  blocks = {name for name, at in lora.linears(model).items() if at != "lm_head"}
  if targets == "all-linear":
    assert set(model.lora.targets) == blocks
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text()) | {"target_modules": "all-linear"}
    config.write_text(json.dumps(values))
    model = folder.open_pretrained(tmp_path).model
    assert set(model.lora.targets) == blocks


def test_adapters_that_older_transformers_named_load_here(tmp_path):
  """There GPT-NeoX's output matrix was embed_out, and peft did not store it."""
  from safetensors.torch import load_file, save_file

  save(CONFIGS["neox"], tmp_path / "base")
  lm = their_lm(tmp_path / "base")
  new = tmp_path / "adapters"
  expected = save_peft(lm, ["lm_head", "dense"], new, task_type="CAUSAL_LM")
  config, file = new / "adapter_config.json", new / "adapter_model.safetensors"
  config.write_text(config.read_text().replace("lm_head", "embed_out"))
  tensors = load_file(file)
  del tensors["base_model.model.lm_head.base_layer.weight"]
  renamed = {k.replace("lm_head", "embed_out"): v for k, v in tensors.items()}
  save_file(renamed, file)
  model, params = folder.load(new)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_output_is_refused(tmp_path):
  config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
  save(config, tmp_path / "base")
  lm, new = their_lm(tmp_path / "base"), tmp_path / "adapters"
  save_peft(lm, ["q_proj", "lm_head"], new, task_type="CAUSAL_LM")
  with pytest.raises(UserError) as caught:
    folder.load(new)
  message = str(caught.value)
  assert "base_model.model.lm_head.base_layer.weight has no place" in message
  assert "v_proj; its output matrix is the embedding" in message


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"init_lora_weights": "pissa"},
      "init_lora_weights='pissa', which changes",
    ),
    (
      {"init_lora_weights": "olora"},
      "init_lora_weights='olora', which changes",
    ),
    ({"use_dora": True}, "use_dora is not supported; merge"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is not supported; merge"),
    (
      {"exclude_modules": ["v_proj"]},
      "exclude_modules is not supported; merge",
    ),
    ({"invented_later": 3}, "invented_later is not supported; merge"),
    (
      {"target_modules": r".*layers\.0.*q_proj"},
      "names q_proj of some layers only",
    ),
  ],
)
def test_what_an_adapter_may_be_beside_a_product_is_refused(
  settings, said, tmp_path
):
  """Known settings pass; any other that is in use may change the weights."""
  save(CONFIGS["llama"], tmp_path / "base")
  config = theirs.LoraConfig(
    r=2,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
    base_model_name_or_path=str(tmp_path / "base"),
  )
  config.save_pretrained(tmp_path / "adapters")
  path = tmp_path / "adapters" / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  with pytest.raises(UserError) as caught:
    folder.open_pretrained(tmp_path / "adapters")
  assert said in str(caught.value)


def test_a_score_head_is_never_drawn_unasked(base, deberta, tmp_path):
  """A file without the head, and one without DeBERTa's pooler."""
  from safetensors.torch import load_file, save_file

  path, targets = base
  whole = their_classifier(path)
  save_peft(whole, targets, tmp_path / "a", task_type="SEQ_CLS")
  file = tmp_path / "a" / "adapter_model.safetensors"
  kept = {k: v for k, v in load_file(file).items() if "score" not in k}
  save_file(kept, file)
  with pytest.raises(UserError, match="score head is missing, and a drawn one"):
    folder.load(tmp_path / "a")
  # Asked for, as training does, it is drawn.
  assert folder.load(tmp_path / "a", head="score_last")[0].shapes["score_head"]

  config = transformers.AutoConfig.from_pretrained(deberta)
  transformers.DebertaV2Model(config).save_pretrained(tmp_path / "trunk")
  whole = their_classifier(tmp_path / "trunk")
  save_peft(whole, ["key_proj"], tmp_path / "b", task_type="SEQ_CLS")
  with pytest.raises(UserError, match=r"pooler.* of the score head is missing"):
    folder.load(tmp_path / "b")


def test_score_head_travels_with_the_adapters(base, tmp_path):
  path, targets = base
  adapters = LoraConfig(2, 4.0, targets=tuple(targets))
  model, params = load(path, lora=adapters, head="score_last")
  params = filled(params)
  peft.save(model, params, tmp_path, base=str(path))
  auto = transformers.AutoModelForSequenceClassification
  classifier = auto.from_pretrained(path, num_labels=1)
  wrapped = theirs.PeftModel.from_pretrained(classifier, tmp_path).eval()
  with torch.no_grad():
    expected = wrapped(torch.tensor(TOKENS).long()).logits.numpy()[:, 0]
  again, back = folder.load(tmp_path)
  for m, p in ((model, params), (again, back)):
    score = jax.jit(lambda p, t, m=m: m.bind(p).score(t, t > 0))(p, TOKENS)
    np.testing.assert_allclose(np.asarray(score), expected, atol=1e-4)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
  """The folder of a tiny DeBERTa whose embeddings are projected."""
  path = tmp_path_factory.mktemp("deberta")
  config = transformers.DebertaV2Config(
    **SIZES,
    embedding_size=16,
    num_labels=1,
    pad_token_id=0,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
  )
  torch.manual_seed(0)
  classifier = transformers.DebertaV2ForSequenceClassification(config)
  classifier.save_pretrained(path)
  return path


def their_classifier(path):
  auto = transformers.AutoModelForSequenceClassification
  return auto.from_pretrained(path, num_labels=1)


def score(model, params):
  def run(p, t):
    return model.bind(p).score(t, t > 0)

  return np.asarray(jax.jit(run)(params, TOKENS))


def test_deberta_with_its_projection_goes_both_ways(deberta, tmp_path):
  """`output.dense` ends `attention.output.dense` too, which has no adapter."""
  targets = ("output", "query_proj", "embed_proj")
  config = LoraConfig(2, 4.0, targets=targets)
  model, params = load(deberta, lora=config)
  params = filled(params)
  peft.save(model, params, tmp_path / "ours", base=str(deberta))
  wrapped = theirs.PeftModel.from_pretrained(
    their_classifier(deberta), tmp_path / "ours"
  ).eval()
  pairs = sum("lora_A" in name for name, _ in wrapped.named_parameters())
  assert pairs == 2 * 2 + 1
  with torch.no_grad():
    expected = wrapped(torch.tensor(TOKENS).long()).logits.numpy()[:, 0]
  np.testing.assert_allclose(score(model, params), expected, atol=1e-4)
  again, back = folder.load(tmp_path / "ours")
  assert sorted(again.lora.targets) == sorted(targets)
  jax.tree.map(np.testing.assert_array_equal, back, params)

  names = ["embed_proj", "key_proj"]
  whole = their_classifier(deberta)
  expected = save_peft(whole, names, tmp_path / "new", task_type="SEQ_CLS")
  found = score(*folder.load(tmp_path / "new"))
  np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)


def test_an_adapter_on_a_head_is_refused(deberta, tmp_path):
  whole = their_classifier(deberta)
  save_peft(whole, "all-linear", tmp_path, task_type="SEQ_CLS")
  with pytest.raises(UserError) as caught:
    folder.load(tmp_path)
  message = str(caught.value)
  assert "base_model.model.pooler.dense.lora_A.weight has no place" in message
  assert "embed_proj; its score head is trained in full; merge" in message
