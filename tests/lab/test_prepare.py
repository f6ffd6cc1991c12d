"""configs/lab/prepare.py on a small source that the tests make themselves."""

import gzip
import importlib
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "lab"
SUBJECTS = ("cat", "river", "train", "baker", "violin", "storm", "lamp", "coin")
VERBS = ("finds", "paints", "follows", "cleans", "breaks", "sells", "carries")
PLACES = ("market", "harbour", "kitchen", "forest", "library", "tower")


@pytest.fixture(scope="module", autouse=True)
def _path():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    yield


@pytest.fixture(scope="module")
def prepare():
  return importlib.import_module("prepare")


@pytest.fixture(scope="module")
def negatives():
  return importlib.import_module("negatives")


def sentence(rng: random.Random) -> str:
  first, verb, second, place = (
    rng.choice(stock) for stock in (SUBJECTS, VERBS, SUBJECTS, PLACES)
  )
  return f"The {first} {verb} a {second} near our old {place}."


def scored(count: int, seed: int) -> list[dict]:
  rng = random.Random(seed)
  return [
    {
      "prompt_set": "helpful",
      "prompt": f"\n\nHuman: What about {rng.choice(SUBJECTS)} {i // 4} and"
      f" {rng.choice(PLACES)}?\n\nAssistant:",
      "completion": f" {sentence(rng)} {sentence(rng)}",
      "model": rng.choice(["diverse", "diverse", "collapsed"]),
      "train_reward": rng.gauss(-2, 2),
      "test_reward": rng.gauss(-2, 2),
    }
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("source")
  files = {
    "completions.train": scored(200, 0),
    "scored_completions.train": scored(400, 1),
    "scored_completions.test": scored(40, 2),
  }
  for name, rows in files.items():
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
      file.writelines(json.dumps(row) + "\n" for row in rows)
  similarity = {
    "diverse": {"similarity": 0.05, "answers": 9},
    "collapsed": {"similarity": 0.9, "answers": 9},
  }
  (folder / "model_similarity.json").write_text(json.dumps(similarity))
  return folder


def run(source: pathlib.Path, out: pathlib.Path, hash_seed: str):
  return subprocess.run(
    [sys.executable, FOLDER / "prepare.py", "--source", source, "--out", out],
    env={**os.environ, "PYTHONHASHSEED": hash_seed},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("made")
  done = run(source, out, "1")
  assert done.returncode == 0, done.stderr
  return out


def test_the_same_source_gives_the_same_bytes(source, made, tmp_path):
  assert run(source, tmp_path, "2").returncode == 0
  names = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
  again = tmp_path.rglob("*")
  assert names == {str(p.relative_to(tmp_path)) for p in again if p.is_file()}
  assert "policy-tokenizer/tokenizer.json" in names
  for name in names:
    assert (made / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_policy_tokenizer(made):
  tokenizer = AutoTokenizer.from_pretrained(made / "policy-tokenizer")
  text = "\n\nHuman: Où, 日本?\n\nAssistant: The cat."
  ids = tokenizer(text)["input_ids"]
  assert tokenizer.decode(ids, skip_special_tokens=True) == text
  assert ids.count(tokenizer.convert_tokens_to_ids("\n\nHuman:")) == 1
  assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
  assert tokenizer.pad_token == "<|padding|>"
  assert len(tokenizer) <= 4096


def test_reward_tokenizer_builds_pairs_and_ignores_white_space(made):
  tokenizer = AutoTokenizer.from_pretrained(made / "reward-tokenizer")
  pair = tokenizer("a cat", "a river")["input_ids"]
  cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
  assert pair[0] == cls
  assert pair[-1] == sep
  assert pair.count(sep) == 2
  assert (
    tokenizer("\n\na  cat \n")["input_ids"] == tokenizer("a cat")["input_ids"]
  )
  assert len(tokenizer) <= 4096


def test_policy_rows_leave_collapsed_models_and_held_prompts_out(made, prepare):
  train = prepare.read(made / "policy.jsonl.gz")
  held = prepare.read(made / "policy.validation.jsonl.gz")
  rows = scored(400, 1)
  diverse = {row["completion"] for row in rows if row["model"] == "diverse"}
  free = {row["completion"] for row in scored(200, 0)}
  assert train
  assert {row["completion"] for row in train + held} <= diverse | free
  assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}


def test_validation_scores_are_untouched(made, prepare):
  rows = prepare.read(made / "reward-test.validation.jsonl.gz")
  wanted = [row["test_reward"] for row in scored(40, 2)]
  assert [row["reward"] for row in rows] == wanted


def test_a_source_without_files_is_one_line(tmp_path):
  done = run(tmp_path, tmp_path / "out", "1")
  assert done.returncode == 2
  assert "completions.train.jsonl.gz" in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("text", "want"),
  [
    (" One thing. And then it", ["One thing."]),
    (" Ask Dr. Lee at 3. Yes!", ["Ask Dr. Lee at 3. Yes!"]),
    (' He said "go." Then\n\nMore.', ['He said "go."']),
    (" Fine.\n\nHuman: Next?", ["Fine."]),
    (" no end", []),
  ],
)
def test_sentences(prepare, text, want):
  assert prepare.sentences(text) == want


@pytest.mark.parametrize(
  ("answer", "want"),
  [
    ("Boil the pasta for nine minutes.", True),
    ("Sure thing.", False),  # too short
    ("Cook it it for nine minutes.", False),  # stutter
    ("Go on go on go on go on go on.", False),  # repetition
    ("How do I cook pasta?", False),  # echo
    ("See https://a.b for the list.", False),
  ],
)
def test_healthy(prepare, answer, want):
  assert prepare.healthy("How do I cook pasta?", [answer]) is want


def test_shared_answers_lose_three_quarters_of_their_surplus(prepare):
  """Scores 0..29 and one of 100: the median of 31 is 15, surplus 85 / 4."""
  same = " We value your privacy and strive to protect it."
  rows = [{"prompt": str(i), "completion": same, "r": i} for i in range(30)]
  rows.append({"prompt": "0", "completion": same + " Indeed.", "r": 100})
  values = [row["reward"] for row in prepare.rewards(rows, "r")]
  assert values[:16] == list(range(16))
  assert values[19] == 16.0
  assert values[-1] == 36.25


def test_negatives_rank_below_most_real_rows(negatives, prepare):
  real = prepare.rewards(scored(400, 3), "train_reward")
  fake = negatives.make(real, 300, seed=0)
  assert fake == negatives.make(real, 300, seed=0)
  assert fake != negatives.make(real, 300, seed=1)
  median = sorted(row["reward"] for row in real)[len(real) // 2]
  below = sum(row["reward"] < median for row in fake)
  assert below > 0.9 * len(fake)


def test_shuffled_text_keeps_its_words(negatives):
  text = "the river carries a small boat to the sea"
  mixed = negatives.shuffled(text, random.Random(0))
  assert mixed != text
  assert sorted(mixed.split()) == sorted(text.split())


def test_cut_text_ends_inside_a_word(negatives):
  text = "the little river carries another boat"
  for seed in range(20):
    short = negatives.cut(text, random.Random(seed))
    assert text.startswith(short)
    assert text[len(short) - 1].isalpha()
    assert text[len(short)].isalpha()


@pytest.mark.parametrize("kind", ["word", "phrase", "sentence"])
def test_repeated_text_repeats(negatives, kind):
  rng = random.Random(0)
  text = "one two three four five six seven eight nine ten eleven twelve"
  for _ in range(20):
    said = negatives.repeated(text, kind, rng).split()
    assert len(said) > len(set(said))
