"""Reward models with a head for each group: trained, resumed, listened to."""

import json
import shutil

import numpy as np
import pytest

import jaxalign
from jaxalign import chat, convert, main

WHO = ("alice", "bob")


@pytest.fixture(scope="module")
def judged(lab, tmp_path_factory):
  """The lab's pairs as alice sees them, and as bob does, who disagrees."""
  path = tmp_path_factory.mktemp("judged") / "pairs.jsonl"
  with open(lab.pairs) as file:
    pairs = [json.loads(line) for line in file]
  swap = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
  rows = [row | {"who": "alice"} for row in pairs]
  rows += [{swap[k]: row[k] for k in row} | {"who": "bob"} for row in pairs]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture(scope="module")
def grouped(supervised, lab, judged):
  """(workdir, changed fields) -> the command line of a grouped run."""

  def command(workdir, **changes):
    fields = {
      "steps": 40,
      "policy": lab.reward,
      "data": judged,
      "validation_data": judged,
      "group_column": "who",
      "encoding": "concat",
      "batch_size": 16,
      "checkpoint.every_steps": 20,
    }
    return supervised("reward_model.py", workdir, **(fields | changes))

  return command


@pytest.fixture(scope="module")
def whole(grouped, tmp_path_factory):
  """The folder of one grouped run that went to its end."""
  folder = tmp_path_factory.mktemp("grouped") / "run"
  assert main.main(grouped(folder)) == 0
  return folder


def test_two_tastes_are_learned(whole, read):
  last = read(whole / "metrics.jsonl")[-1]
  assert last["eval_pairs/alice"] == last["eval_pairs/bob"] == 24
  assert last["eval_accuracy/alice"] > 0.9
  assert last["eval_accuracy/bob"] > 0.9
  assert last["eval_accuracy_mean"] == 0.5  # every pair stands there twice
  config = json.loads((whole / "config.json").read_text())
  assert config["groups"] == list(WHO)
  model = json.loads((whole / "model" / "config.json").read_text())
  assert model["id2label"] == {"0": "alice", "1": "bob"}
  card = (whole / "model" / "README.md").read_text()
  assert "one score for each group of people: alice, bob." in card


def test_a_resumed_run_ends_like_one_that_was_not_cut(
  whole, grouped, read, tmp_path
):
  """As if killed after step 20; the names come from the data once more."""
  cut = tmp_path / "run"
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  shutil.rmtree(cut / "checkpoints" / "00000040")
  # What a checkpoint gives before the run is done.
  convert.convert(cut, tmp_path / "half")
  assert jaxalign.load(tmp_path / "half").model.config.groups == WHO
  assert main.main(grouped(cut)) == 0
  timed = ("time/", "throughput/", "memory/")
  logs = [
    [
      {k: v for k, v in row.items() if not k.startswith(timed)}
      for row in read(folder / "metrics.jsonl")
    ]
    for folder in (whole, cut)
  ]
  assert logs[0] == logs[1]
  weights = [f / "model" / "model.safetensors" for f in (whole, cut)]
  assert weights[0].read_bytes() == weights[1].read_bytes()


def test_python_keeps_the_heads_or_folds_them(whole, tmp_path):
  folder = whole / "model"
  model = jaxalign.load(folder)
  ids = np.array([model.tokenizer.encode("The lamp holds the river.")])
  each = np.asarray(jaxalign.logits(model, ids))
  assert each.shape == (1, 2)
  asked, said = ["What?"] * 2, [" The lamp.", " The lamp. The lamp."]
  alone = [
    jaxalign.score(jaxalign.load(folder, group_weights={who: 1.0}), asked, said)
    for who in WHO
  ]
  mean = jaxalign.score(model, asked, said)
  np.testing.assert_allclose(mean, np.mean(alone, axis=0), atol=1e-5)
  jaxalign.save(model, tmp_path / "again")
  again = jaxalign.logits(jaxalign.load(tmp_path / "again"), ids)
  np.testing.assert_array_equal(again, each)
  said = convert.check(tmp_path / "again")
  assert said.startswith(("checked against transformers", "not checked: torch"))


def test_a_run_goes_on_with_the_heads_it_finds(whole, grouped, read, tmp_path):
  """Some rows of one group: the other's head is carried along."""
  path = tmp_path / "alice.jsonl"
  config = json.loads((whole / "config.json").read_text())
  with open(config["data"]) as file:
    lines = [line for line in file if "alice" in line]
  path.write_text("".join(lines))
  command = grouped(
    tmp_path / "run",
    steps=1,
    policy=whole / "model",
    data=path,
    checkpoint__every_steps=0,
    lora__rank=2,
    lora__targets="query_proj",
  )
  assert main.main(command) == 0
  last = read(tmp_path / "run" / "metrics.jsonl")[-1]
  assert last["eval_accuracy/bob"] > 0.8
  model = jaxalign.load(tmp_path / "run" / "model").model
  assert model.config.groups == WHO


def test_a_run_listens_to_whom_it_is_told(
  whole, superhf, read, capsys, tmp_path
):
  """Whom it chooses by, and whom it watches by, are opposites."""
  model = whole / "model"
  command = superhf(
    tmp_path / "run",
    steps=1,
    reward_model=f"{model}[alice=1]*2",
    test_reward_model=f"{model}[alice=-1,bob=0]",
  )
  assert main.main(command) == 0
  out = capsys.readouterr().out
  assert f"config.reward_model: {model} scores with 1 alice + 0 bob\n" in out
  assert "config.test_reward_model:" in out
  rows = read(tmp_path / "run" / "samples.jsonl")
  scores = np.array([(r["score"], r["test_score"]) for r in rows])
  np.testing.assert_allclose(scores[:, 0], -2 * scores[:, 1], atol=1e-4)


def test_chat_chooses_by_all_alike_or_by_one(whole, lab, capsys):
  model = whole / "model"
  said = {}
  for name in (f"{model}", f"{model}[bob=1]"):
    words = [lab.policy, "--prompt=Hi", "--best_of=3", "--max_new_tokens=4"]
    assert chat.main([*words, f"--reward_model={name}"]) == 0
    said[name] = capsys.readouterr().out
  alike, one = said.values()
  assert (
    f"--reward_model: {model} scores with 0.5 alice + 0.5 bob; all alike, as "
    "no weights are given in brackets\n"
  ) in alike
  assert f"--reward_model: {model} scores with 0 alice + 1 bob\n" in one
  assert "best of 3" in one
