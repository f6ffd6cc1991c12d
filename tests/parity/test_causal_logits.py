"""Causal models against transformers: odd shapes, both ways, every head."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import rope as rotary
from jaxalign.models.hf import architectures, config_json, folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

VOCAB = 71  # odd, and a little larger than the ids in use: a padded table
LENGTHS = (1, 4, 11, 13)
NEOX = {
  "hidden_size": 40,
  "num_attention_heads": 5,
  "num_hidden_layers": 2,
  "intermediate_size": 56,
}
LLAMA = {
  "hidden_size": 24,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "num_hidden_layers": 2,
  "intermediate_size": 44,
}
RELATIVES = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}


def rope(kind, **more):
  return {"rope_type": kind, "rope_theta": 10000.0, **more}


YARN = rope(
  "yarn", factor=4.0, original_max_position_embeddings=16, truncate=False
)
LONGROPE = rope(
  "longrope",
  partial_rotary_factor=0.5,
  short_factor=[1.1, 1.7],
  long_factor=[2.5, 6.0],
  original_max_position_embeddings=8,
)
CASES = {
  "neox": ("GPTNeoX", NEOX),
  "neox-sequential": (
    "GPTNeoX",
    NEOX
    | {
      "hidden_size": 36,
      "num_attention_heads": 3,
      "use_parallel_residual": False,
      "attention_bias": False,
      "rope_parameters": rope("default", partial_rotary_factor=0.5),
    },
  ),
  "neox-odd-rotary": (
    "GPTNeoX",
    NEOX
    | {
      "hidden_size": 50,
      "tie_word_embeddings": True,
      "rope_parameters": rope("linear", factor=2.0, partial_rotary_factor=0.3),
    },
  ),
  "llama": ("Llama", LLAMA),
  "llama-wide-heads": (
    "Llama",
    LLAMA
    | {
      "num_attention_heads": 3,
      "num_key_value_heads": 3,
      "head_dim": 10,
      "tie_word_embeddings": True,
      "attention_bias": True,
      "mlp_bias": True,
    },
  ),
  "llama-linear": (
    "Llama",
    LLAMA | {"rope_parameters": rope("linear", factor=4.0)},
  ),
  "llama-dynamic": (
    "Llama",
    LLAMA
    | {
      "max_position_embeddings": 8,
      "head_dim": 6,
      "rope_parameters": rope("dynamic", factor=2.0),
    },
  ),
  "llama-3": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "head_dim": 8}),
  "mistral": (
    "Mistral",
    LLAMA
    | {
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "head_dim": 10,
      "sliding_window": 5,
    },
  ),
  "qwen2": (
    "Qwen2",
    LLAMA
    | {
      "num_hidden_layers": 3,
      "use_sliding_window": True,
      "sliding_window": 4,
      "max_window_layers": 1,
      "tie_word_embeddings": True,
    },
  ),
  "qwen3": (
    "Qwen3",
    LLAMA
    | {
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "head_dim": 10,
      "attention_bias": True,
      "use_sliding_window": True,
      "sliding_window": 6,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": YARN,
    },
  ),
  "gemma2": (
    "Gemma2",
    LLAMA
    | {
      "head_dim": 10,
      "sliding_window": 5,
      "query_pre_attn_scalar": 7,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 3.0,
    },
  ),
  "gemma3": (
    "Gemma3",
    LLAMA
    | {
      "head_dim": 10,
      "sliding_window": 5,
      "query_pre_attn_scalar": 7,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": rope("linear", factor=4.0),
      },
    },
  ),
  "phi3": (
    "Phi3",
    LLAMA
    | {
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "sliding_window": 7,
      "max_position_embeddings": 32,
      "original_max_position_embeddings": 8,
      "rope_parameters": LONGROPE,
    },
  ),
  "gpt-neo": (
    "GPTNeo",
    {
      "hidden_size": 30,
      "num_heads": 3,
      "num_layers": 3,
      "attention_types": [[["global"], 1], [["local", "global"], 1]],
      "window_size": 3,
      "max_position_embeddings": 16,
    },
  ),
}


def theirs(case, task, path):
  """A transformers model with every parameter drawn, saved to `path`."""
  name, sizes = CASES[case]
  # Gemma 3's plain names are those of the model that sees.
  text = "Text" if name == "Gemma3" else ""
  config = getattr(transformers, f"{name}{text}Config")(
    vocab_size=VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    **sizes,
  )
  config.num_labels = 1
  torch.manual_seed(len(case))
  text = text if task == "SequenceClassification" else ""
  model = getattr(transformers, f"{name}{text}For{task}")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # Norm scales are drawn around what they start from, all else around 0.
      centre = float(parameter.mean() > 0.5)
      parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
  model.save_pretrained(path)
  return model


def texts(seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, VOCAB - 5, n) for n in LENGTHS]


def padded(rows, side):
  """Tokens and mask of all rows in one batch, three columns too wide."""
  width = max(map(len, rows)) + 3
  tokens = np.zeros((len(rows), width), np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    where = slice(width - len(row), None) if side == "left" else slice(len(row))
    tokens[i, where], mask[i, where] = row, True
  return tokens, mask


def our_logits(model, params, tokens, mask):
  @jax.jit
  def run(params, tokens, mask):
    module = model.bind(params)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = module(tokens, positions, mask.astype(jnp.int32))
    return module.unembed(hidden)

  return np.asarray(run(params, tokens, mask))


@pytest.fixture(scope="module", params=CASES)
def language_model(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  return theirs(request.param, "CausalLM", path), *folder.load(path)


@pytest.fixture(scope="module", params=["neox", "llama", "gpt-neo", *RELATIVES])
def classifier(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  reference = theirs(request.param, "SequenceClassification", path)
  return reference, *folder.load(path)


def test_logits_match_each_text_read_alone(language_model):
  reference, model, params = language_model
  rows = texts()
  both = [padded(rows, "left"), padded(rows, "right")]
  tokens, mask = (np.concatenate(x) for x in zip(*both, strict=True))
  logits = our_logits(model, params, tokens, mask)
  for i, row in enumerate(rows * 2):
    with torch.no_grad():
      expected = reference(torch.tensor(row[None])).logits[0].numpy()
    np.testing.assert_allclose(logits[i][mask[i]], expected, atol=1e-4)


@pytest.mark.parametrize(
  "name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3Text"]
)
def test_absent_fields_mean_what_transformers_takes(name):
  sizes = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 40,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
  }
  theirs = getattr(transformers, f"{name}Config")(**sizes)
  fields = config_json.Fields(
    sizes | {"model_type": theirs.model_type}, "config.json"
  )
  model = folder.from_config(fields, "lm", dtype="float32", remat="none")
  ours = architectures.architecture(model).to_hf(model.config)
  expected = theirs.to_dict()
  # Phi-3 says that whole heads are rotated; a pad token is the tokenizer's.
  expected["rope_parameters"].pop("partial_rotary_factor", None)
  for field in ours.keys() & expected.keys() - {"pad_token_id"}:
    assert ours[field] == expected[field], field


@pytest.mark.parametrize(
  ("values", "length"),
  [
    (YARN, 9),
    (YARN | {"truncate": True, "beta_fast": 3, "beta_slow": 0.5}, 9),
    (YARN | {"attention_factor": 1.3}, 9),
    (YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, 9),
    (YARN | {"mscale": 0.7, "factor": 2.0}, 9),
    (LONGROPE | {"partial_rotary_factor": 1.0}, 8),
    (LONGROPE | {"partial_rotary_factor": 1.0, "factor": 3.0}, 9),
    (LONGROPE | {"partial_rotary_factor": 1.0, "attention_factor": 1.2}, 9),
  ],
)
def test_rotary_tables(values, length):
  sizes = LLAMA | {"head_dim": 4, "max_position_embeddings": 32}
  # A copy: transformers writes into it.
  theirs = transformers.LlamaConfig(**sizes, rope_parameters=dict(values))
  table = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
  at = np.arange(length)[None]
  expected = table(torch.zeros(()), torch.tensor(at))
  fields = config_json.Fields(
    sizes | {"rope_parameters": values, "vocab_size": 9, "model_type": "llama"},
    "config.json",
  )
  model = folder.from_config(fields, "lm", dtype="float32", remat="none")
  config = model.config
  found = rotary.angles(
    jnp.asarray(at),
    jnp.full(at.shape, length),
    config.head_dim,
    config.rotary_base,
    scaling=config.rotary_scaling,
  )
  for ours, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, other.numpy(), atol=1e-6)


def test_classifier_scores_the_last_real_token(classifier):
  """A pad token at a text's end is passed over, as it may be the end token."""
  reference, model, params = classifier
  assert model.config.head == "score_last"
  pad = reference.config.pad_token_id
  rows = [*texts(), np.append(texts()[0], [pad, pad])]
  both = [padded(rows, "left"), padded(rows, "right")]
  tokens, mask = (np.concatenate(x) for x in zip(*both, strict=True))
  score = jax.jit(lambda p, t, m: model.bind(p).score(t, m))
  scores = np.asarray(score(params, tokens, mask))
  with torch.no_grad():
    expected = [
      reference(torch.tensor(row[None])).logits[0, 0].item() for row in rows
    ]
  np.testing.assert_allclose(scores, expected * 2, atol=1e-4)


def test_export_loads_in_transformers_bit_for_bit(language_model, tmp_path):
  reference, model, params = language_model
  folder.save(model, params, tmp_path / "out", shard_bytes=20_000)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert type(again) is type(reference)
  ours, before = again.state_dict(), reference.state_dict()
  assert ours.keys() == before.keys()
  for name, tensor in before.items():
    assert torch.equal(ours[name], tensor), name
  tokens = torch.tensor(texts()[-1][None])
  with torch.no_grad():
    expected = reference(tokens).logits
    assert torch.equal(again.eval()(tokens).logits, expected)
  back_model, back = folder.load(tmp_path / "out")
  assert back_model.config == model.config
  jax.tree.map(np.testing.assert_array_equal, params, back)


def test_exported_classifier_loads_in_transformers(classifier, tmp_path):
  reference, model, params = classifier
  config = {"pad_token_id": 0}
  folder.save(model, params, tmp_path / "out", config=config)
  auto = transformers.AutoModelForSequenceClassification
  again = auto.from_pretrained(tmp_path / "out").eval()
  assert again.config.num_labels == 1
  tokens, mask = (torch.tensor(x) for x in padded(texts(), "right"))
  with torch.no_grad():
    expected = reference(tokens.long(), attention_mask=mask).logits
    got = again(tokens.long(), attention_mask=mask).logits
  assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_load_and_export(dtype, tmp_path):
  reference = theirs("llama", "CausalLM", tmp_path / "in")
  reference.to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
  auto = transformers.AutoModelForCausalLM
  # Read anew: `to` has rounded the rotary buffers as well.
  full = auto.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
  model, params = folder.load(tmp_path / "half")
  assert params["embedding"]["embedding"].dtype == jnp.float32
  logits = our_logits(model, params, *padded(texts(), "right"))
  with torch.no_grad():
    tokens = torch.tensor(texts()[-1][None])
    expected = full(tokens).logits[0].numpy()
  np.testing.assert_allclose(logits[-1][: LENGTHS[-1]], expected, atol=1e-4)
  folder.save(model, params, tmp_path / "out", dtype=dtype)
  again = auto.from_pretrained(tmp_path / "out", dtype="auto")
  assert again.dtype == getattr(torch, dtype)
  for name, tensor in reference.state_dict().items():
    assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_load_like_safetensors(sharded, tmp_path):
  theirs("gpt-neo", "CausalLM", tmp_path / "safe")
  expected_model, expected = folder.load(tmp_path / "safe")
  binary = tmp_path / "bin"
  binary.mkdir()
  config = (tmp_path / "safe" / "config.json").read_text()
  (binary / "config.json").write_text(config)
  arrays = load_file(tmp_path / "safe" / "model.safetensors")
  state = {name: torch.from_numpy(array) for name, array in arrays.items()}
  if sharded:
    names = sorted(state)
    files = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}
    for file in set(files.values()):
      part = {n: state[n] for n in names if files[n] == file}
      torch.save(part, binary / file)
      index = json.dumps({"metadata": {}, "weight_map": files})
    (binary / "pytorch_model.bin.index.json").write_text(index)
  else:
    torch.save(state, binary / "pytorch_model.bin")
  model, params = folder.load(binary)
  assert model.config == expected_model.config
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("case", ["gpt-neo", "llama"])
def test_superhf_reward_model_files(case, tmp_path):
  """Their layout: `model.` + bare backbone, `v_head`, nested config."""
  lm = theirs(case, "CausalLM", tmp_path / "lm")
  backbone = lm.base_model
  head = torch.randn(1, backbone.config.hidden_size)
  state = {f"model.{k}": v for k, v in backbone.state_dict().items()}
  path = tmp_path / "rm"
  path.mkdir()
  torch.save(state | {"v_head.weight": head}, path / "pytorch_model.bin")
  config = {
    "model_type": "reward_model",
    "base_model_config": backbone.config.to_dict(),
  }
  (path / "config.json").write_text(json.dumps(config))
  model, params = folder.load(path)
  assert model.config.head == "score_mean"
  tokens, mask = padded(texts(), "left")
  score = jax.jit(lambda p, t, m: model.bind(p).score(t, m))
  scores = np.asarray(score(params, tokens, mask))
  with torch.no_grad():
    for row, got in zip(texts(), scores, strict=True):
      mean = backbone(torch.tensor(row[None]))[0].mean(dim=1)
      np.testing.assert_allclose(got, (mean @ head.T).item(), atol=1e-4)
