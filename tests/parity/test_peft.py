"""Adapters against the peft library, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
]

TOKENS = np.array([[5, 3, 11, 9, 2, 8, 14]], np.int32)


@pytest.fixture(scope="module", params=["neox", "llama"])
def base(request, tmp_path_factory):
  """(folder of a tiny model, targets as PEFT names them, and as we do)."""
  torch.manual_seed(0)
  path = tmp_path_factory.mktemp(request.param)
  sizes = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
  }
  if request.param == "neox":
    config = transformers.GPTNeoXConfig(**sizes)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(path)
    return path, ["query_key_value", "dense"]
  config = transformers.LlamaConfig(**sizes)
  transformers.LlamaForCausalLM(config).save_pretrained(path)
  return path, ["q_proj", "v_proj", "down_proj"]


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
  draw = lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape)
  return lora.join(jax.tree.map(draw, trainable), frozen)


def test_export_loads_in_peft_and_merges(base, tmp_path):
  path, targets = base
  adapters = LoraConfig(3, 12.0, targets=tuple(targets))
  model, params = folder.load(path, lora=adapters)
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


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapters_load_here(base, rslora, tmp_path):
  path, targets = base
  lm = transformers.AutoModelForCausalLM.from_pretrained(path)
  config = theirs.LoraConfig(
    r=2,
    lora_alpha=5,
    target_modules=targets,
    task_type="CAUSAL_LM",
    use_rslora=rslora,
  )
  wrapped = theirs.get_peft_model(lm, config).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in wrapped.named_parameters():
      if "lora_" in name:
        parameter.normal_(std=0.3)
    expected = wrapped(torch.tensor(TOKENS).long()).logits.numpy()
  wrapped.save_pretrained(tmp_path)
  model, params = folder.load(tmp_path)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


def test_score_head_travels_with_the_adapters(base, tmp_path):
  path, targets = base
  adapters = LoraConfig(2, 4.0, targets=tuple(targets))
  model, params = folder.load(path, lora=adapters, head="score_last")
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
