"""Loading: what is placed where, what is refused, in one line each."""

import concurrent.futures
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.models.hf import folder, place, weights
from jaxalign.models.layers import LoraConfig


@pytest.fixture
def saved(make, tmp_path):
  """(folder of a tiny LLaMA, model, params)."""
  model, params = make("llama")
  folder.save(model, params, tmp_path / "model")
  return tmp_path / "model", model, params


LONGROPE = {"rope_parameters": {"rope_type": "longrope", "long_factor": [3.0]}}


def change(path, **values):
  config = json.loads((path / "config.json").read_text())
  config = {k: v for k, v in (config | values).items() if v is not None}
  (path / "config.json").write_text(json.dumps(config))


def load(path, **more):
  opened = folder.open_pretrained(path, **more)
  return opened.model, opened.read()


def refuse(path, message, **more):
  with pytest.raises(UserError, match=message) as error:
    folder.open_pretrained(path, **more)
  assert "\n" not in str(error.value)


def test_round_trip_is_bit_equal(any_causal, tmp_path):
  model, params = any_causal
  folder.save(model, params, tmp_path / "a", shard_bytes=3000)
  again, back = folder.load(tmp_path / "a")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("head", ["score_last", "score_eos", "score_mean"])
def test_score_heads_survive_the_folder(make, head, tmp_path):
  model, params = make("gpt-neo", head, eos_id=5)
  folder.save(model, params, tmp_path / "a")
  again, back = folder.load(tmp_path / "a")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_language_model_gets_a_fresh_score_head_when_asked(saved):
  path, _, params = saved
  model, back = load(path, head="score_last", seed=1)
  assert model.config.head == "score_last"
  other = load(path, head="score_last", seed=2)[1]
  assert (back["score_head"]["kernel"] != other["score_head"]["kernel"]).any()
  for name in ("blocks", "embedding", "final_norm"):
    jax.tree.map(np.testing.assert_array_equal, back[name], params[name])


def test_adapters_are_drawn_afresh(saved):
  path, _, _ = saved
  config = LoraConfig(2, 4.0, targets=("q_proj",))
  model, params = load(path, lora=config)
  assert model.lora == config
  q = params["blocks"]["q_proj"]
  assert q["lora_a"].std() > 0.01
  assert not q["lora_b"].any()
  # What is trained is not rounded to the base's few bits.
  _, params = load(path, lora=config, dtype="bfloat16")
  kinds = {name: x.dtype for name, x in params["blocks"]["q_proj"].items()}
  assert kinds["lora_a"] == kinds["lora_b"] == jnp.float32
  assert kinds["kernel"] == jnp.bfloat16
  refuse(
    path,
    "q_prj; the model's linear",
    lora=LoraConfig(2, 4.0, targets=("q_prj",)),
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_filling_gives_the_same(saved, dtype, monkeypatch):
  path, _, _ = saved
  whole = folder.load(path, dtype=dtype)[1]
  monkeypatch.setattr(place, "CPU_STAGE_BYTES", 0)
  by_layer = folder.load(path, dtype=dtype)[1]
  assert by_layer["embedding"]["embedding"].dtype == dtype
  jax.tree.map(np.testing.assert_array_equal, whole, by_layer)


def test_another_output_matrix_than_the_embedding_is_the_models(
  make, tmp_path, capsys
):
  """Whatever tie_word_embeddings says; an equal one stays tied."""
  path, (model, params) = tmp_path / "a", make("llama", tied=False)
  folder.save(model, params, path)
  change(path, tie_word_embeddings=True)
  again, back = folder.load(path)
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, back, params)
  said = capsys.readouterr().out
  assert (
    "tie_word_embeddings is on, but model.safetensors holds another" in said
  )
  folder.save(again, back, tmp_path / "b")
  config = json.loads((tmp_path / "b" / "config.json").read_text())
  assert config["tie_word_embeddings"] is False

  file = path / "model.safetensors"
  tensors = load_file(file)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  save_file(tensors, file, {"format": "pt"})
  again, back = folder.load(path)
  assert again.config.tied
  assert "lm_head" not in back
  assert not capsys.readouterr().out


def test_missing_pieces(saved, tmp_path):
  path, _, _ = saved
  refuse(tmp_path / "nowhere", "does not exist")
  refuse(path / "config.json", "is a file")
  weights = (path / "model.safetensors").read_bytes()
  (path / "model.safetensors").write_bytes(weights[:-100])
  refuse(path, "model.safetensors is truncated")
  (path / "model.safetensors").unlink()
  refuse(path, "has no weights")
  (path / "config.json").write_text("{")
  refuse(path, "config.json cannot be read as JSON")
  (path / "config.json").unlink()
  refuse(path, "config.json is missing")


def test_a_missing_shard(make, tmp_path):
  folder.save(*make("neox"), tmp_path / "a", shard_bytes=3000)
  sorted((tmp_path / "a").glob("*.safetensors"))[1].unlink()
  refuse(tmp_path / "a", "00002-of-.* is missing, though")
  index = tmp_path / "a" / "model.safetensors.index.json"
  index.write_text('{"weight_map": {"w": "../../etc/passwd"}}')
  refuse(tmp_path / "a", "passwd is missing")


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model_type": "mamba"}, "'mamba' is not supported; .*gpt_neox, llama"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "18"}, "hidden_size must be an integer, got '18'"),
    ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
    ({"num_hidden_layers": 1}, "9 tensors have no place"),
    (
      {"vocab_size": 40},
      r"has shape \[31, 18\], config.json asks .*\[40, 18\]",
    ),
    ({"rope_parameters": {"rope_type": "axial"}}, "'axial' is not supported"),
    (
      {"rope_parameters": {"mrope_section": [1, 1]}},
      "mrope_section is not a setting of rope_type 'linear'; it has factor",
    ),
    (
      {"rope_scaling": {"short_factor": [2.0, 0]}, **LONGROPE},
      "short_factor must be a list of positive numbers",
    ),
    (
      {"rope_scaling": {"short_factor": [2.0, 1]}, **LONGROPE},
      "long_factor has 1 numbers; a head has 2 pairs",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ({"logits_scaling": 8.0}, "logits_scaling = 8.0 is not known here"),
    ({"use_qk_norm": True}, "use_qk_norm = True is not known here"),
    ({"hidden_act": "mish"}, "activation 'mish' is not supported"),
    ({"num_key_value_heads": 4}, "6 must be a multiple of .* 4"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    (
      {"architectures": ["LlamaForSequenceClassification"]},
      "classifier has 2 labels",
    ),
    ({"architectures": ["LlamaForRewardModel"]}, "RewardModel, whose head is"),
  ],
)
def test_configs_that_do_not_fit(saved, values, message):
  path, _, _ = saved
  change(path, **values)
  refuse(path, message)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"layer_types": ["full_attention"]}, "must name 2 layers"),
    ({"layer_types": ["full_attention", "chunked"]}, "got 'chunked'; this mod"),
    ({"use_sliding_window": False}, "in Qwen2 and Qwen3 use_sliding_window"),
    ({"sliding_window": 0}, "needs a sliding_window of at least 1"),
  ],
)
def test_layer_types_that_do_not_fit(make, values, message, tmp_path):
  folder.save(*make("qwen3"), tmp_path / "a")
  change(tmp_path / "a", **values)
  refuse(tmp_path / "a", message)


def test_quantised_tensors(saved):
  path, _, _ = saved
  name = "model.norm.weight"
  arrays = load_file(path / "model.safetensors")
  arrays[name] = arrays[name].astype(np.int8)
  save_file(arrays, path / "model.safetensors")
  refuse(path, "model.norm.weight is stored as I8; quantised")


def test_wrong_arguments(saved):
  path, _, _ = saved
  refuse(path, "dtype must be one of", dtype="int8")
  refuse(path, "head 'score_context' does not exist", head="score_context")


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("thesis.txt", "mine", "holds files that are not a model"),
    ("config.json", '{"port": 80}', "holds files that are not a model"),
    ("config.json", '{"algorithm": "sft"}', "holds a run, not a model"),
  ],
)
def test_other_files_are_not_replaced(make, tmp_path, name, text, message):
  """A run's own `model/` is replaced, as by a run that goes on."""
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / name).write_text(text)
  for _ in range(2):
    folder.save(*make(), tmp_path / "a" / "model")
  with pytest.raises(UserError, match=message):
    folder.save(*make(), tmp_path / "a")
  assert (tmp_path / "a" / name).read_text() == text


def test_a_failed_save_leaves_the_old_model(saved):
  path, model, params = saved
  before = (path / "model.safetensors").read_bytes()

  def full(new):
    raise OSError(28, "No space left on device")

  with pytest.raises(UserError, match="No space left"):
    folder.save(model, params, path, also=full)
  assert (path / "model.safetensors").read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_placing_turns_and_stacks(tmp_path):
  layers = {
    "a": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    "b": np.array([[7, 8, 9], [10, 11, 12]], np.float32),
  }
  save_file(layers, tmp_path / "model.safetensors")
  tensors = list(weights.open_tensors(tmp_path).values())
  found = place.place(tensors, (1, 0), (2, 3, 2), np.dtype(np.float32))
  expected = [[[1, 4], [2, 5], [3, 6]], [[7, 10], [8, 11], [9, 12]]]
  np.testing.assert_array_equal(found, expected)


SHARDED = """
import jax, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxalign.models.hf import folder, place
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
def shardings(shapes):
  def one(leaf):
    axes = [n if leaf.shape[i] % 2 == 0 else None
            for i, n in zip(range(len(leaf.shape)), ("a", "b"))]
    return NamedSharding(mesh, P(*axes))
  return jax.tree.map(one, shapes)
_, plain = folder.load(sys.argv[1])
for place.CPU_STAGE_BYTES in (float("inf"), 0):
  opened = folder.open_pretrained(sys.argv[1])
  model = opened.model
  params = opened.read(shardings(model.shapes))
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  kernel = params["blocks"]["q_proj"]["kernel"]
  assert kernel.sharding.spec == P("a", "b"), kernel.sharding
  assert kernel.addressable_shards[0].data.shape[:2] == (1, 9)
folder.save(model, params, sys.argv[2])
_, back = folder.load(sys.argv[2])
jax.tree.map(np.testing.assert_array_equal, back, plain)
"""


def run(program, *args, devices=1):
  flags = f"--xla_force_host_platform_device_count={devices}"
  out = subprocess.run(
    [sys.executable, "-c", program, *map(str, args)],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert out.returncode == 0, out.stderr
  return out.stdout


def test_loading_into_shards_and_saving_from_them(saved, tmp_path):
  run(SHARDED, saved[0], tmp_path / "out", devices=4)


HOSTS = """
import jax, math, numpy as np, sys
path, port, number = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from jaxalign.models.hf import folder, place, weights
from jaxalign.parallel import mesh as meshes
plain = folder.load(path)[1]
read, parts = weights.SafeTensor.read, {}
def count(self, index=()):
  part = read(self, index)
  # Rows in one piece, so that a file's pages are looked at by one host alone.
  assert part.flags.c_contiguous or self.shape[0] % 4
  parts.setdefault(self.name, []).append(part.size)
  return part
weights.SafeTensor.read = count
place.SMALL_BYTES, place.BLOCK_BYTES = 0, 512
opened = folder.open_pretrained(path)
mesh = meshes.make_mesh(fsdp=2, tensor=2)
params = opened.read(meshes.shardings(opened.model.shapes, mesh))
def check(ours, expected):
  for shard in ours.addressable_shards:
    np.testing.assert_array_equal(shard.data, expected[shard.index])
jax.tree.map(check, params, plain)
assert not params["embedding"]["embedding"].is_fully_addressable
assert max(map(len, parts.values())) > 1
tensors = sum(opened.tensors.values(), [])
whole = sum(math.prod(tensor.shape) for tensor in tensors)
print(sum(map(sum, parts.values())) / whole)
"""


def test_a_host_reads_only_its_share_of_the_rows(make, tmp_path):
  """Of two hosts each reads half of all that divides over their devices."""
  folder.save(*make("neox"), tmp_path / "a")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    start = functools.partial(run, HOSTS, tmp_path / "a", port, devices=2)
    shares = [float(out.split()[-1]) for out in pool.map(start, range(2))]
  # The odd vocabulary's rows are not split: the embedding's features are.
  assert all(0.5 <= share < 0.6 for share in shares), shares


MEMORY = """
import jax, jax.numpy as jnp, pathlib, sys
from jaxalign.models.hf import folder
from jaxalign.parallel import mesh as meshes
jax.block_until_ready(jnp.zeros(4) + 1)
def peak():  # `ru_maxrss` would begin with the parent's
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) * 1024
opened, mesh = folder.open_pretrained(sys.argv[1]), meshes.make_mesh(fsdp=-1)
shardings = meshes.shardings(opened.model.shapes, mesh)
before = peak()
params = jax.block_until_ready(opened.read(shardings))
leaves = jax.tree.leaves(params)
arrays = sum(leaf.nbytes for leaf in leaves)
shard = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
print((peak() - before - arrays) / shard)
"""


def test_peak_memory_is_near_one_copy(make, tmp_path):
  """Next to the parameters there is less than 1.3 of their largest shard."""
  from jaxalign.models.llama import LlamaConfig
  from jaxalign.models.model import Model

  config = LlamaConfig(2048, 512, 8, 8, 8, 64, 2048)
  model = Model.build(config)
  params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), model.shapes)
  folder.save(model, params, tmp_path / "a")
  assert (tmp_path / "a" / "model.safetensors").stat().st_size > 140e6
  assert float(run(MEMORY, tmp_path / "a")) < 1.3
  folder.save(model, params, tmp_path / "b", shard_bytes=36_000_000)
  assert len(list((tmp_path / "b").glob("*.safetensors"))) >= 4
  assert float(run(MEMORY, tmp_path / "b", devices=2)) < 1.3


@pytest.mark.parametrize("head", ["score_last", "score_mean"])
def test_the_heads_of_groups_survive_the_folder(make, head, tmp_path):
  model, params = make("llama", head, groups=("bob", "São Paulo"))
  folder.save(model, params, tmp_path / "a")
  again, back = folder.load(tmp_path / "a")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, back, params)
  config = json.loads((tmp_path / "a" / "config.json").read_text())
  assert config["id2label"] == {"0": "bob", "1": "São Paulo"}
  assert config["problem_type"] == "regression"


def test_classes_are_no_groups(make, tmp_path):
  """Of two labels neither is a reward, unless the file says they are scores."""
  model, params = make("llama", "score_last", groups=("no", "yes"))
  path = tmp_path / "a"
  folder.save(model, params, path)
  change(path, problem_type="single_label_classification")
  refuse(path, r"the classifier has 2 labels; a reward model has num_labels=1")
  change(path, problem_type="regression", id2label={"0": "no", "1": "no"})
  refuse(path, "id2label has one name for two labels: no, no; a name stands")
  change(path, id2label={"0": "a", "1": "b", "2": "c"})
  refuse(path, r"score.weight has shape \[2, 18\], config.json asks for \[3,")
  # As transformers leaves two labels that were never named.
  change(path, id2label=None)
  assert folder.load(path)[0].config.groups == ("LABEL_0", "LABEL_1")
