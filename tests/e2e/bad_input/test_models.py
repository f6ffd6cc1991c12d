"""Model folders that cannot be loaded."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import safetensors.numpy

from jaxalign import chat, convert, main

# What is done to a copy of a good model folder, and what the line must say.


def is_missing(folder):
  shutil.rmtree(folder)


def is_a_file(folder):
  shutil.rmtree(folder)
  folder.touch()


def has_no_config(folder):
  (folder / "config.json").unlink()


def has_no_json(folder):
  (folder / "config.json").write_text('{"model_type": ')


def change_json(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def is_bert(folder):
  change_json(folder / "config.json", model_type="bert")


def has_a_wrong_size(folder):
  change_json(folder / "config.json", hidden_size="wide")


def has_no_heads(folder):
  change_json(folder / "config.json", num_attention_heads=0)


def has_a_word_for_scaling(folder):
  change_json(folder / "config.json", rope_parameters="linear")


def rotates_odd_widths(folder):
  whole = {"rope_type": "default", "partial_rotary_factor": 1.0}
  change_json(
    folder / "config.json", rope_parameters=whole, num_attention_heads=16
  )


def has_no_weights(folder):
  (folder / "model.safetensors").unlink()


def change_tensors(folder, change):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors, next(name for name in tensors if "layer" in name))
  safetensors.numpy.save_file(tensors, path)


def lacks_a_tensor(folder):
  change_tensors(folder, lambda tensors, name: tensors.pop(name))


def has_another_shape(folder):
  def change(tensors, name):
    tensors[name] = tensors[name][1:].copy()

  change_tensors(folder, change)


def has_a_stranger(folder):
  def change(tensors, name):
    tensors["adapter.weight"] = tensors[name]

  change_tensors(folder, change)


def cut(path, size):
  with path.open("r+b") as file:
    file.truncate(size)


def is_cut_short(folder):
  path = folder / "model.safetensors"
  cut(path, path.stat().st_size - 100)


def is_cut_in_its_header(folder):
  cut(folder / "model.safetensors", 100)


def is_no_safetensors(folder):
  (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 99)


class Evil:
  def __reduce__(self):
    return os.system, ("touch pwned",)


def runs_code(folder):
  (folder / "model.safetensors").unlink()
  with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))


def is_no_zip(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x02" * 99)


def has_a_damaged_zip(folder):
  """Its list of contents points nowhere."""
  (folder / "model.safetensors").unlink()
  path = folder / "pytorch_model.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))
  raw = bytearray(path.read_bytes())
  raw[:4] = b"nope"  # the header of its first member
  path.write_bytes(raw)


def has_no_tokenizer(folder):
  for path in folder.glob("tokenizer*"):
    path.unlink()


def has_a_broken_tokenizer(folder):
  (folder / "tokenizer.json").write_text("{")


def has_fewer_embeddings(folder):
  size = json.loads((folder / "config.json").read_text())["vocab_size"]
  change_json(folder / "config.json", vocab_size=size - 20)

  def change(tensors, _):
    for name, tensor in tensors.items():
      if tensor.shape[0] == size:
        tensors[name] = tensor[:-20].copy()

  change_tensors(folder, change)


SUPPORTED = "deberta-v2, gemma2, gemma3_text, gpt_neo, gpt_neox, llama, mistral"
FOLDERS = [
  (is_missing, "model folder", "does not exist; check the path"),
  (is_a_file, "model folder", "is a file; check the path"),
  (has_no_config, "config.json is missing", "is this the right folder?"),
  (has_no_json, "config.json cannot be read as JSON", "line 1"),
  (is_bert, "model_type 'bert' is not supported", SUPPORTED),
  (has_a_wrong_size, "hidden_size must be an integer, got 'wide'"),
  (has_no_heads, "num_attention_heads must be >= 1, got 0"),
  (has_no_weights, "has no weights; expected model.safetensors"),
  (lacks_a_tensor, "is missing; config.json asks for it"),
  (has_another_shape, "has shape [", "config.json asks for ["),
  (has_a_stranger, "1 tensors have no place", "adapter.weight"),
  (is_cut_short, "model.safetensors is truncated", "copy it again"),
  (is_cut_in_its_header, "model.safetensors is truncated", "100 bytes"),
  (is_no_safetensors, "truncated or not a safetensors file"),
  (runs_code, "pytorch_model.bin asks to call", "system", "refused without"),
  (is_no_zip, "pytorch_model.bin is truncated, or older", "safetensors copy"),
  (has_a_damaged_zip, "pytorch_model.bin cannot be read", "copy the file"),
  (has_no_tokenizer, "holds no tokenizer; need tokenizer.json"),
  (has_a_broken_tokenizer, "cannot be read", "tokenizer.json"),
  (has_fewer_embeddings, "has 20 ids beyond", "belongs to the model"),
]


POLICIES = [
  (has_a_word_for_scaling, "rope_parameters must be an object, got 'linear'"),
  (rotates_odd_widths, "all 1 features of a head are rotated in pairs"),
]


@pytest.mark.parametrize(("spoil", "words"), POLICIES)
def test_a_bad_rotation(spoil, words, lab, superhf, run, fail, tmp_path):
  folder = shutil.copytree(lab.policy, tmp_path / "model")
  spoil(folder)
  assert words in fail(superhf(run, policy=folder))


@pytest.fixture(params=FOLDERS, ids=lambda case: case[0].__name__)
def spoilt(request, tmp_path):
  """(spoils a copy of a model -> its folder, words of the message)."""
  spoil, *words = request.param

  def copy(source):
    folder = shutil.copytree(source, tmp_path / "model")
    spoil(folder)
    return folder, words

  return copy


def test_a_bad_policy(spoilt, lab, superhf, run, fail):
  folder, words = spoilt(lab.policy)
  line = fail(superhf(run, policy=folder))
  for word in (str(folder), *words):
    assert word in line


def test_a_bad_reward_model(spoilt, lab, superhf, run, fail):
  """Found before the policy's parameters are read."""
  folder, words = spoilt(lab.reward)
  line = fail(superhf(run, test_reward_model=folder))
  for word in (str(folder), *words):
    assert word in line


@pytest.mark.parametrize("command", [chat, convert])
@pytest.mark.parametrize("spoil", [is_missing, is_bert, is_cut_short])
def test_a_bad_model_elsewhere(command, spoil, lab, fail, tmp_path):
  folder = shutil.copytree(lab.policy, tmp_path / "model")
  spoil(folder)
  argv = [folder, tmp_path / "new"] if command is convert else [folder]
  words = next(words for case, *words in FOLDERS if case is spoil)
  line = fail(argv, command)
  for word in words:
    assert word in line


@pytest.mark.parametrize(
  ("command", "argv", "words"),
  [
    (chat, ["--temperature=hot", "lab"], ("--temperature", "see --help")),
    (chat, [], ("required: model", "see --help")),
    (convert, ["lab"], ("required: target", "see --help")),
    (convert, ["lab", "x", "--dtype=int8"], ("--dtype", "bfloat16")),
    (convert, ["lab", "."], ("files that are not a model", "new or empty")),
    (convert, ["lab", "a_file"], ("is a file; name a folder",)),
  ],
)
def test_bad_flags_elsewhere(command, argv, words, fail, tmp_path):
  (tmp_path / "a_file").touch()
  line = fail(argv, command)
  for word in words:
    assert word in line


def test_a_folder_that_may_not_be_read(lab, superhf, run, fail, monkeypatch):
  def denied(path, mode):
    return str(path) != lab.policy

  monkeypatch.setattr(os, "access", denied)
  line = fail(superhf(run))
  assert f"{lab.policy} cannot be read: permission denied" in line


def test_a_hub_id_without_the_hub(superhf, run, fail, monkeypatch):
  import huggingface_hub

  def no_network(*args, **kwargs):
    raise OSError("no connection\nand a long tale")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
  line = fail(superhf(run, policy="EleutherAI/pythia-7m"))
  assert "EleutherAI/pythia-7m is not a local folder and cannot be" in line
  assert "no connection; check the name and the connection" in line


def test_a_tokenizer_without_pad_token_is_fine(
  lab, supervised, tmp_path, monkeypatch
):
  from jaxalign.algorithms.sft import setup

  started = []
  folder = shutil.copytree(lab.policy, tmp_path / "model")
  change_json(folder / "tokenizer_config.json", pad_token=None)
  monkeypatch.setattr(setup, "run", lambda *args: started.append(args) or 0)
  argv = supervised("sft.py", tmp_path / "run", policy=folder, data=lab.rows)
  assert main.main(argv) == 0
  assert len(started) == 1
