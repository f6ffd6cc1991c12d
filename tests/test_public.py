"""The functions for notebooks, on a tiny model with its tokenizer."""

import copy
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import api
from jaxalign.algorithms import read_config
from jaxalign.data.tokenizer import wrap_tokenizer
from jaxalign.models.hf import folder
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.parallel.mesh import make_mesh
from jaxalign.setup import models

WORDS = [*"abcdefgh", "Human:", "Assistant:", "ijk", "lmn", "opq"]
SIZE = 16  # three special tokens and the words
QUESTION = [
  {"role": "system", "content": "g"},
  {"role": "user", "content": "a b c"},
]
WRITTEN = "g\n\nHuman: a b c\n\nAssistant:"


def tiny(path, head, tokenizer):
  """A folder with a random model and a tokenizer of whole words."""
  config = LlamaConfig(
    SIZE, 16, 2, 2, 1, 8, 16, max_positions=64, head=head, eos_id=1
  )
  model = Model.build(config)
  rng = np.random.default_rng(0)

  def draw(s):
    return 0.3 * rng.normal(size=s.shape).astype(np.float32)

  params = jax.tree.map(draw, model.shapes)
  folder.save(
    model, params, path, config=tokenizer.special_ids(), also=tokenizer.save
  )
  return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory, word_tokenizer):
  path = tmp_path_factory.mktemp("policy") / "model"
  return tiny(path, "lm", word_tokenizer(WORDS))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, word_tokenizer):
  path = tmp_path_factory.mktemp("reward") / "model"
  return tiny(path, "score_last", word_tokenizer(WORDS))


def test_logits_of_a_language_model_and_a_classifier(policy, reward_model):
  ids = [[3, 4, 5], [6, 7, 0]]
  mask = [[True, True, True], [True, True, False]]
  logits = jaxalign.logits(jaxalign.load(policy), ids, mask)
  assert logits.shape == (2, 3, SIZE)
  classifier = jaxalign.load(reward_model)
  scores = np.asarray(jaxalign.logits(classifier, ids, mask))
  alone = np.asarray(jaxalign.logits(classifier, [[6, 7]]))
  assert scores.shape == (2,)
  np.testing.assert_allclose(scores[1], alone[0], atol=1e-5)


def test_generate_is_the_models_own_greedy_text(policy):
  model = jaxalign.load(policy)
  found = jaxalign.generate(
    model, ["a b", "c"], samples_per_prompt=2, max_new_tokens=4, temperature=0
  )
  assert [len(texts) for texts in found] == [2, 2]
  assert found[0][0] == found[0][1]
  ids = model.tokenizer.encode("a b")
  for _ in range(4):
    ids.append(int(jaxalign.logits(model, [ids])[0, -1].argmax()))
  assert found[0][0] == model.tokenizer.decode(ids[2:])
  assert jaxalign.generate(model, []) == []


def test_score_does_not_depend_on_the_others(reward_model):
  model = jaxalign.load(reward_model)
  scores = jaxalign.score(model, ["a b", "c d"], ["e f g", "h"])
  alone = jaxalign.score(model, ["c d"], ["h"])
  assert scores.shape == (2,)
  np.testing.assert_allclose(scores[1], alone[0], atol=1e-5)
  assert scores[0] != scores[1]


def test_the_wrong_kind_of_model_is_refused(policy, reward_model):
  with pytest.raises(jaxalign.UserError, match="needs a language model"):
    jaxalign.generate(jaxalign.load(reward_model), ["a"])
  with pytest.raises(jaxalign.UserError, match="needs a sequence classifier"):
    jaxalign.score(jaxalign.load(policy), ["a"], ["b"])
  with pytest.raises(jaxalign.UserError, match="as many prompts"):
    jaxalign.score(jaxalign.load(reward_model), ["a"], ["b", "c"])


def test_a_role_list_is_written_in_the_models_format(policy):
  model = jaxalign.load(policy)
  greedy = {"temperature": 0, "max_new_tokens": 6}
  ((text,),) = jaxalign.generate(model, WRITTEN, **greedy)
  assert jaxalign.generate(model, QUESTION, **greedy) == [[text.strip()]]
  both = jaxalign.generate(model, [QUESTION, WRITTEN], **greedy)
  assert both == [[text.strip()], [text]]


def test_batches_do_not_change_what_is_drawn(policy, capfd):
  model = jaxalign.load(policy)
  prompts = ["a b", "c d e", "f"]
  drawn = {"samples_per_prompt": 2, "max_new_tokens": 6, "seed": 3}
  whole = jaxalign.generate(model, prompts, **drawn)
  assert not capfd.readouterr().err
  parts = jaxalign.generate(
    model, prompts, batch_size=1, progress=True, **drawn
  )
  assert parts == whole
  assert "3/3" in capfd.readouterr().err


def test_a_stop_text_within_tokens_cuts_there(policy):
  """In batches too, and of several the first counts."""
  model = jaxalign.load(policy)
  greedy = {"temperature": 0, "max_new_tokens": 6}
  prompts = ["a b", "c d e", "f"]
  whole = jaxalign.generate(model, prompts, **greedy)
  # From the second character of a word to the first of the next one.
  middles = re.findall(r"(?<=\w)\S \S", " / ".join(t for (t,) in whole))
  assert any(middle in text for middle in middles for (text,) in whole)
  for middle in middles:
    wanted = [[text.partition(middle)[0]] for (text,) in whole]
    found = jaxalign.generate(
      model, prompts, stop=["never", middle], batch_size=1, **greedy
    )
    assert found == wanted


def test_scores_of_role_lists_and_batches(reward_model, monkeypatch):
  model = jaxalign.load(reward_model)
  answers = ["e f g", "h", "a b c d e"]
  scores = jaxalign.score(model, [WRITTEN] * 3, answers)
  monkeypatch.setattr(api, "SCORED", 2)
  said = [[{"role": "assistant", "content": answer}] for answer in answers]
  by_turns = jaxalign.score(model, [QUESTION] * 3, said, batch_size=1)
  np.testing.assert_allclose(by_turns, scores, atol=1e-5)
  assert jaxalign.score(model, [], []).shape == (0,)


def test_scores_of_a_function(tmp_path):
  def correct(prompts, completions, answer):
    assert prompts == ["2 + 2", QUESTION]
    assert completions[1] == [{"role": "assistant", "content": "no"}]
    return [float(answer[0] == completions[0]), None]

  asked = ["2 + 2", QUESTION], ["4", "no"]
  found = jaxalign.score(correct, *asked, columns={"answer": ["4", ""]})
  np.testing.assert_array_equal(found, [1, np.nan])
  file = tmp_path / "mine.py"
  file.write_text(
    "def short(completions): return [-len(c) for c in completions]"
  )
  assert jaxalign.score(f"{file}:short", ["a"], ["bcd"]).tolist() == [-3]
  # What is not finite is never the best.
  bad = jaxalign.score(
    lambda completions: [np.nan, np.inf, 1], *[["a"] * 3] * 2
  )
  assert bad.tolist() == [-np.inf, -np.inf, 1]
  with pytest.raises(jaxalign.UserError, match="takes answer, which columns"):
    jaxalign.score(correct, *asked)
  with pytest.raises(jaxalign.UserError, match="as many answer as"):
    jaxalign.score(correct, *asked, columns={"answer": ["4"]})


def test_a_model_is_a_line(policy, reward_model):
  assert repr(jaxalign.load(policy)) == (
    f"Loaded({policy}: llama, 3,664 parameters, head lm, float32)"
  )
  half = repr(jaxalign.load(reward_model, dtype="bfloat16"))
  assert half.endswith("head score_last, bfloat16)")


def test_names_of_the_models_that_ship():
  for name in ("policy", "reward-train", "reward-test"):
    place = models.locate_model(f"lab/{name}", "policy")
    assert pathlib.Path(place, "model.safetensors").is_file()


def test_the_page_for_notebooks_runs(
  policy, reward_model, monkeypatch, tmp_path
):
  """Its code, on the tiny models; its config is checked and not trained."""
  root = pathlib.Path(__file__).parents[1]
  page = (root / "docs" / "python.md").read_text()
  loaded = {
    "lab/policy": jaxalign.load(policy),
    "lab/reward-train": jaxalign.load(reward_model),
    str(tmp_path / "model"): jaxalign.load(policy),
  }
  row = {"step": 1, "loss/nll": 2.0}

  def train(config, workdir):
    config = read_config(config)
    assert config.steps == 20
    metrics = tmp_path / workdir / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps(row) + "\n")
    return jaxalign.TrainResult(metrics.parent, True, [row], tmp_path / "model")

  monkeypatch.setattr(api, "load", lambda name: loaded[str(name)])
  monkeypatch.setattr(api, "train", train)
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
    exec(block, names)
  assert [len(texts) for texts in names["texts"]] == [2, 2]
  assert names["rewards"].shape == (4,)
  assert "finished after 1 steps" in repr(names["result"])
  assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_save_writes_tokenizer_and_card(policy, tmp_path):
  model = jaxalign.load(policy)
  jaxalign.save(model, tmp_path / "out", license="mit", dtype="bfloat16")
  names = {p.name for p in (tmp_path / "out").iterdir()}
  assert {"config.json", "model.safetensors", "README.md"} <= names
  assert "tokenizer.json" in names
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["dtype"] == "bfloat16"
  assert config["pad_token_id"] == 0
  again = jaxalign.load(tmp_path / "out")
  assert again.tokenizer.encode("a b") == model.tokenizer.encode("a b")


def test_every_end_that_the_folder_names_ends_a_completion(policy, tmp_path):
  """As transformers has it; a saved folder names them again."""
  model = jaxalign.load(policy)
  greedy = {"temperature": 0, "max_new_tokens": 6}
  ((whole,),) = jaxalign.generate(model, ["a b c"], **greedy)
  words = whole.split()
  at = max(words.index(word) for word in words)  # first seen after others
  assert at > 0
  (end,) = model.tokenizer.encode(words[at])
  path = tmp_path / "model"
  shutil.copytree(policy, path)
  generation = {"eos_token_id": [1, end, 10**6], "top_p": 0.9}
  (path / "generation_config.json").write_text(json.dumps(generation))
  model = jaxalign.load(path)
  assert model.tokenizer.end_ids == (1, end)
  ((text,),) = jaxalign.generate(model, ["a b c"], **greedy)
  assert text.split() == words[: at + 1]

  jaxalign.save(model, tmp_path / "saved")
  again = tmp_path / "saved" / "generation_config.json"
  assert json.loads(again.read_text()) == generation
  config = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert config["eos_token_id"] == [1, end]


def test_a_pad_token_that_the_model_lacks_is_not_written(policy, tmp_path):
  """Nor one that only stands in: both would change what transformers reads."""
  path = tmp_path / "model"
  shutil.copytree(policy, path)
  tokenizer = jaxalign.load(policy).tokenizer
  inner = copy.deepcopy(tokenizer.inner)
  inner.add_special_tokens({"pad_token": "[PAD]"})
  assert inner.pad_token_id == SIZE
  inner.save_pretrained(path)
  model = jaxalign.load(path)
  assert model.tokenizer.pad_id < SIZE
  jaxalign.save(model, tmp_path / "saved")
  config = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert config["pad_token_id"] is None


def test_a_score_is_read_before_the_pad_token_as_in_transformers(
  policy, reward_model, tmp_path
):
  """Which is often the end token; the saved folder says the same."""
  model = jaxalign.load(reward_model)
  end = model.tokenizer.inner.eos_token
  plain, ended = jaxalign.score(model, ["a"] * 2, ["b c", f"b c {end}"])
  assert plain != ended
  path = tmp_path / "model"
  shutil.copytree(reward_model, path)
  inner = copy.deepcopy(model.tokenizer.inner)
  inner.pad_token = end
  inner.save_pretrained(path)
  config = json.loads((path / "config.json").read_text())
  for pad, score in ((1, plain), (None, ended)):
    (path / "config.json").write_text(
      json.dumps(config | {"pad_token_id": pad})
    )
    padding = jaxalign.load(path)
    (found,) = jaxalign.score(padding, ["a"], [f"b c {end}"])
    assert found == pytest.approx(score, abs=1e-6)
    jaxalign.save(padding, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["pad_token_id"] == pad
  # A new head reads as one that transformers would train with this tokenizer.
  shutil.copytree(policy, tmp_path / "policy")
  inner.save_pretrained(tmp_path / "policy")
  fields = {"algorithm": "reward_model", "policy": str(tmp_path / "policy")}
  spec = models.open_policy(read_config(fields), make_mesh(), "score_last")
  assert spec.model.config.pad_id == 1


def test_generate_takes_one_text_and_stops_at_texts(policy):
  model = jaxalign.load(policy)
  greedy = {"temperature": 0, "max_new_tokens": 6}
  ((whole,),) = jaxalign.generate(model, ["a b c"], **greedy)
  assert jaxalign.generate(model, "a b c", **greedy) == [[whole]]
  word = whole.split()[2]
  wanted = whole.partition(word)[0]
  for stops in ({"stop": [word]}, {"stop": word}, {"stops": [word]}):
    assert jaxalign.generate(model, "a b c", **greedy, **stops) == [[wanted]]


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"samples_per_prompt": 0},
      "samples_per_prompt must be a whole number >= 1",
    ),
    ({"stop": [""]}, "stop must hold texts of at least one character"),
    ({"n": 5}, "no setting .n.; did you mean samples_per_prompt"),
    ({"topp": 1}, "no setting .topp.; did you mean top_p"),
    ({"beams": 5}, "no setting 'beams'; it has temperature, top_p, "),
    ({"min_new_tokens": 65}, "must be at most max_new_tokens=64, got 65"),
  ],
)
def test_settings_of_generate_that_are_mistakes(policy, settings, said):
  with pytest.raises(jaxalign.UserError, match=said):
    jaxalign.generate(jaxalign.load(policy), ["a"], **settings)


@pytest.mark.parametrize(
  ("ids", "mask", "said"),
  [
    ([3, 4], None, r"token_ids must be whole numbers \[B, T\]"),
    ([[0.5]], None, "token_ids must be whole numbers .* got float64"),
    ([[3, SIZE]], None, r"token_ids must be in \[0, 16\), .* got 3 to 16"),
    ([[-1]], None, "token_ids must be in"),
    ([[3, 4]], [[True]], r"mask must have the shape of token_ids \[1, 2\]"),
  ],
)
def test_ids_that_are_mistakes(policy, ids, mask, said):
  model = jaxalign.load(policy)
  real = None if mask is None else np.array(mask)
  with pytest.raises(jaxalign.UserError, match=said):
    jaxalign.logits(model, np.array(ids), real)


def test_rows_of_unlike_lengths(policy):
  with pytest.raises(jaxalign.UserError, match="rows of one length"):
    jaxalign.logits(jaxalign.load(policy), [[3], [3, 4]])


def test_other_mistakes_are_one_line_too(policy, reward_model, tmp_path):
  model, judge = jaxalign.load(policy), jaxalign.load(reward_model)
  with pytest.raises(jaxalign.UserError, match="encoding must be auto"):
    jaxalign.score(judge, ["a"], ["b"], encoding="x")
  # A pair is written without the judge's chat template, which takes any role.
  inner = copy.deepcopy(judge.tokenizer.inner)
  inner.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
  judge = dataclasses.replace(judge, tokenizer=wrap_tokenizer(inner))
  turns = [QUESTION[1], {"role": "tool", "content": "b"}]
  with pytest.raises(jaxalign.UserError, match="the role 'tool' in it, need"):
    jaxalign.score(judge, [turns], ["b"], encoding="pair")
  with pytest.raises(jaxalign.UserError, match="dtype must be one of float32"):
    jaxalign.save(model, tmp_path / "out", dtype="int8")
  assert not (tmp_path / "out").exists()


# The test run checks annotations, so what breaks them is tried outside of it.
MISTAKES = """
import sys, jaxalign
model, judge = map(jaxalign.load, sys.argv[1:])
half = chr(0xD800)
user = {'role': 'user', 'content': 'a'}
for call in (
  "jaxalign.load(5)",
  "jaxalign.load(sys.argv[1], dtype='int8')",
  "jaxalign.load(sys.argv[1], group_weights=['a'])",
  "jaxalign.load(sys.argv[1], group_weights={'a': 'b'})",
  "jaxalign.logits('lab', [[1]])",
  "jaxalign.logits(model, [['a']])",
  "jaxalign.logits(model, [[3, 4]], [[1], [1, 2]])",
  "jaxalign.logits(model, [[3]], [['x']])",
  "jaxalign.generate(None, ['a'])",
  "jaxalign.generate(model, 5)",
  "jaxalign.generate(model, user)",
  "jaxalign.generate(model, ['a', user])",
  "jaxalign.generate(model, b'a')",
  "jaxalign.generate(model, half)",
  "jaxalign.generate(model, '')",
  "jaxalign.generate(model, ['a'] * 3 + ['a ' * 70])",
  "jaxalign.generate(model, [[]])",
  "jaxalign.generate(model, [{'role': 'user'}])",
  "jaxalign.generate(model, [user | {'content': 5}])",
  "jaxalign.generate(model, [user | {'content': half}])",
  "jaxalign.generate(model, [user | {'role': 'bot'}])",
  "jaxalign.generate(model, [user | {'role': 'system'}])",
  "jaxalign.generate(model, [user, user | {'role': 'assistant'}])",
  "jaxalign.generate(model, 'a', temperature='hot')",
  "jaxalign.generate(model, 'a', samples_per_prompt=1.5)",
  "jaxalign.generate(model, 'a', samples_per_prompt=True)",
  "jaxalign.generate(model, 'a', seed=2**70)",
  "jaxalign.generate(model, 'a', stop=[3])",
  "jaxalign.generate(model, 'a', stop=5)",
  "jaxalign.generate(model, 'a', stops=5)",
  "jaxalign.generate(model, 'a', eos_ids=3)",
  "jaxalign.generate(model, 'a', pad_id='x')",
  "jaxalign.generate(model, 'a', batch_size=0)",
  "jaxalign.generate(model, 'a', batch_size='all')",
  "jaxalign.generate(model, 'a', progress=1)",
  "jaxalign.score(judge, [1], ['a'])",
  "jaxalign.score(judge, ['a'], [1])",
  "jaxalign.score(judge, ['a'], half)",
  "jaxalign.score(judge, [[user | {'role': 'bot'}]], ['a'])",
  "jaxalign.score(judge, ['a'], ['a'], batch_size=-1)",
  "jaxalign.score(judge, ['a'], ['a'], encoding=['concat'])",
  "jaxalign.save(model, None)",
  "jaxalign.save(model, 'unwritten', dtype=16)",
  "jaxalign.save(model, 'unwritten', license=None)",
  "jaxalign.read_run(None)",
  "jaxalign.train(None)",
  "jaxalign.train('')",
  "jaxalign.train('configs/none.py')",
  "jaxalign.train({})",
  "jaxalign.train({'algorithm': 'sft', 'step': 3}, 'unwritten')",
  "jaxalign.train({'algorithm': 'sft', 'steps': '3x'}, 'unwritten')",
  "jaxalign.train({'algorithm': 'sft'}, 5)",
  "jaxalign.train({'algorithm': 'sft'}, overrides=['steps'])",
  "jaxalign.train({'algorithm': 'sft'}, overrides={'steps': 1.5})",
  "jaxalign.train({'algorithm': 'sft'}, stepz=20)",
  "jaxalign.train({'algorithm': 'sft'}, overrides={'optimizer': {'lr': 1}})",
  "jaxalign.train({'algorithm': 'sft'}, overrides={5: 1})",
  "jaxalign.train({'algorithm': 'sft'}, quiet=1)",
):
  try:
    eval(call)
  except jaxalign.UserError as error:
    assert len(str(error).splitlines()) == 1, call
  except Exception as error:
    raise SystemExit(f"{call}: {error!r}")
  else:
    raise SystemExit(call)
"""


def test_values_of_another_type_are_a_line(policy, reward_model, tmp_path):
  code = [sys.executable, "-c", MISTAKES, str(policy), str(reward_model)]
  done = subprocess.run(
    code, capture_output=True, text=True, timeout=300, cwd=tmp_path
  )
  assert done.returncode == 0, done.stderr
