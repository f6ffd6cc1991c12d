"""`python -m jaxalign.convert`: runs, checkpoints and folders."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import config as config_lib
from jaxalign import convert
from jaxalign.algorithms import read_config
from jaxalign.models import lora
from jaxalign.models.hf import folder
from jaxalign.models.layers import LoraConfig
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.runtime.checkpoint import Checkpointer

LAB = pathlib.Path(convert.__file__).parent / "lab"


@pytest.fixture
def base(tmp_path, word_tokenizer):
  """A tiny model folder with its tokenizer, the model and its parameters."""
  model = Model.build(LlamaConfig(19, 16, 2, 2, 2, 8, 16))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), model.shapes
  )
  tokenizer = word_tokenizer("abcdefghijklmnop")
  ids = tokenizer.special_ids()
  folder.save(model, params, tmp_path / "base", config=ids, also=tokenizer.save)
  return tmp_path / "base", model, params


def make_run(path, base, **settings):
  """A run's folder as `main` leaves it in the middle."""
  mapping = {"algorithm": "sft", "policy": str(base)} | settings
  config = read_config(mapping)
  path.mkdir()
  text = json.dumps(config_lib.to_mapping(config))
  (path / "config.json").write_text(text)
  return path


def save_checkpoints(run, *states):
  saver = Checkpointer(run / "checkpoints", keep=9)
  for step, params in enumerate(states):
    saver.save(step, {"params": params}, {})
  saver.close()


def test_a_folder_keeps_its_numbers(base, tmp_path):
  path, model, params = base
  folder.save(model, params, tmp_path / "half", dtype="bfloat16")
  out = tmp_path / "out"
  assert convert.main([str(tmp_path / "half"), str(out)]) == 0
  a, b = (p / "model.safetensors" for p in (tmp_path / "half", out))
  assert a.read_bytes() == b.read_bytes()
  assert (out / "README.md").is_file()
  assert convert.main([str(path), str(out), "--dtype=float16"]) == 0
  assert folder.stored_dtype(out) == "float16"


def test_a_finished_run_gives_its_model(base, tmp_path):
  path, _, params = base
  run = make_run(tmp_path / "run", tmp_path / "gone")
  path.rename(run / "model")
  (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 0.5}\n')
  convert.convert(run, tmp_path / "out", license="mit", note="Be careful.")
  back = folder.load(tmp_path / "out")[1]
  jax.tree.map(np.testing.assert_array_equal, back, params)
  card = (tmp_path / "out" / "README.md").read_text()
  assert 'license: "mit"' in card
  assert "\nBe careful.\n" in card
  assert "| loss/total | 0.5 |" in card


def test_checkpoints_of_an_unfinished_run(base, tmp_path):
  path, _, params = base
  later = jax.tree.map(lambda x: x + 1, params)
  run = make_run(tmp_path / "run", path)
  save_checkpoints(run, params, later)
  for source, expected in (
    (run, later),
    (run / "checkpoints" / "00000000", params),
  ):
    convert.convert(source, tmp_path / "out")
    back = folder.load(tmp_path / "out")[1]
    jax.tree.map(np.testing.assert_array_equal, back, expected)


ADAPTERS = LoraConfig(2, 4.0, targets=("q_proj", "lm_head"))


@pytest.fixture
def lora_run(base, tmp_path):
  """A run's folder, its model and parameters, and the trained adapters."""
  path, _, _ = base
  settings = {"rank": 2, "alpha": 4.0, "targets": ADAPTERS.targets}
  run = make_run(tmp_path / "run", path, lora=settings)
  opened = folder.open_pretrained(path, lora=ADAPTERS)
  model, params = opened.model, opened.read()
  trained = jax.tree.map(lambda x: x + 0.5, lora.split(params)[0])
  save_checkpoints(run, trained)
  return run, model, params, trained


def test_adapters_of_a_checkpoint_are_merged(lora_run, tmp_path):
  run, model, params, trained = lora_run
  convert.convert(run, tmp_path / "out")
  whole = lora.join(trained, lora.split(params)[1])
  _, expected = lora.merge(model, whole)
  back = folder.load(tmp_path / "out")[1]
  jax.tree.map(np.testing.assert_array_equal, back, expected)


def test_adapters_alone_in_pefts_format(base, lora_run, tmp_path, capsys):
  run, _, _, trained = lora_run
  out = tmp_path / "out"
  assert convert.main([str(run), str(out), "--adapters"]) == 0
  assert {p.name for p in out.iterdir()} == {
    "adapter_config.json",
    "adapter_model.safetensors",
  }
  model, back = folder.load(out)  # finds the base by itself
  assert model.lora == dataclasses.replace(ADAPTERS, dropout=0.05)
  jax.tree.map(np.testing.assert_array_equal, lora.split(back)[0], trained)
  assert convert.main([str(base[0]), str(out), "--adapters"]) == 2
  assert "is no run's folder" in capsys.readouterr().err
  argv = [str(run), str(out), "--adapters", "--dtype=float16"]
  assert convert.main(argv) == 2
  assert "leave --dtype, --license and --note out" in capsys.readouterr().err


def test_mistakes_are_one_line_and_status_2(base, tmp_path, capsys):
  path, _, _ = base
  run = make_run(tmp_path / "run", path)
  (run / "checkpoints").mkdir()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  for arguments, message in (
    ((tmp_path / "none", tmp_path / "out"), "does not exist"),
    ((run, tmp_path / "out"), "neither a finished model/ nor a whole"),
    ((path, tmp_path / "full"), "holds files that are not a model"),
  ):
    assert convert.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
  assert not (tmp_path / "out").exists()


@pytest.mark.parity
def test_check_compares_with_transformers(base):
  pytest.importorskip("torch")
  path, _, _ = base
  line = convert.check(path)
  assert "checked against transformers: max abs difference" in line
  assert "KL" in line
  assert float(line.split("difference ")[1].split(",")[0]) < 1e-4


@pytest.mark.parity
def test_check_of_a_classifier():
  pytest.importorskip("torch")
  line = convert.check(LAB / "reward-train")
  assert float(line.split("difference ")[1].split(",")[0]) < 1e-4


@pytest.mark.parity
def test_check_finds_a_difference(base, monkeypatch):
  pytest.importorskip("torch")
  right = jaxalign.logits

  def wrong(*args):
    return right(*args) + np.eye(19)[3]

  monkeypatch.setattr(jaxalign, "logits", wrong)
  with pytest.raises(convert.UserError, match="differs from transformers"):
    convert.check(base[0])


def test_check_says_what_it_cannot_do(base, monkeypatch):
  path, _, _ = base
  monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
  assert convert.check(path).startswith("not checked: torch is not installed")
