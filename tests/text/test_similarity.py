import random

import pytest

from jaxalign.text import similarity as s


@pytest.fixture
def no_wordnet(monkeypatch):
  """A machine without nltk data; reading or fetching any is an error."""
  import nltk

  def refused(*args, **kwargs):
    raise AssertionError("nltk data must not be downloaded")

  s._meteor_parts.cache_clear()
  monkeypatch.setattr(nltk.data, "path", [])
  monkeypatch.setattr(nltk, "download", refused)
  yield
  s._meteor_parts.cache_clear()


@pytest.mark.usefixtures("no_wordnet")
class TestMeteor:
  def test_hand_worked(self):
    """3 of 3 and 3 of 6 words match in one run.

    P = 1, R = 1/2: F = 10·½ / (½ + 9) = 5/9.5; 1 − ½·(1/3)³ = 53/54.
    Swapped, P = 1/2, R = 1: F = 5 / (1 + 4.5) = 5/5.5.
    """
    long, short = "one cat sat on the mat", "one cat sat"
    assert s.meteor(long, short) == pytest.approx(5 / 9.5 * 53 / 54)
    assert s.meteor(short, long) == pytest.approx(5 / 5.5 * 53 / 54)

  def test_two_runs_cost_more(self):
    """4 of 4 words in 2 runs: 1 − ½·(2/4)³ = 15/16."""
    assert s.meteor("a b c d", "c d a b") == pytest.approx(15 / 16)

  def test_stems_and_case(self):
    """Two matches by stem in one run: 1 − ½·(1/2)³ = 15/16."""
    assert s.meteor("Running dogs", "run dog") == pytest.approx(15 / 16)

  def test_synonyms_do_not_count_without_wordnet(self):
    assert s.meteor("a big house", "a large house") < s.meteor("a b", "a b")
    assert s.meteor("big", "large") == 0

  def test_punctuation_stays_with_its_word(self):
    assert s.meteor("yes.", "yes") == 0

  def test_mean_is_over_ordered_pairs(self):
    texts = ["one cat sat on the mat", "one cat sat"]
    assert s.mean_meteor(texts) == pytest.approx(
      (5 / 9.5 + 5 / 5.5) / 2 * 53 / 54
    )
    three = s.mean_meteor(["a b", "a b", "x y"])
    assert three == pytest.approx(15 / 16 * 2 / 6)

  def test_fewer_than_two_have_no_mean(self):
    assert s.mean_meteor([]) is None
    assert s.mean_meteor(["a"]) is None

  def test_empty_texts_score_zero(self):
    assert s.mean_meteor(["", "a b", ""]) == 0

  def test_sampled_pairs_are_reproducible(self):
    texts = [f"word{i} and word{i % 3}" for i in range(12)]
    all_pairs = s.mean_meteor(texts)
    some = s.mean_meteor(texts, max_pairs=60, seed=1)
    assert some == s.mean_meteor(texts, max_pairs=60, seed=1)
    assert some == pytest.approx(all_pairs, abs=0.05)


def test_jaccard():
  assert s.jaccard("A b c", "b C d") == 2 / 4
  assert s.jaccard("a a a", "a") == 1
  assert s.jaccard("", "") == 0


def test_overlap_looks_at_different_prompts_only():
  """Pairs (0, 2) and (1, 2) differ in prompt: 1/3 and 0 of their words."""
  prompts = ["p", "p", "q"]
  answers = ["a b", "c d", "b e"]
  assert s.mean_overlap(prompts, answers) == pytest.approx((1 / 3 + 0) / 2)
  assert s.mean_overlap(["p", "p"], ["a", "a"]) is None
  assert s.mean_overlap([], []) is None


def test_overlap_of_a_collapsed_model_is_one():
  prompts = [f"p{i}" for i in range(200)]
  assert s.mean_overlap(prompts, ["same answer"] * 200) == 1
  varied = [
    " ".join(random.Random(i).choices("abcdefgh", k=3)) for i in range(200)
  ]
  value = s.mean_overlap(prompts, varied, seed=3)
  assert value == s.mean_overlap(prompts, varied, seed=3)
  assert 0.05 < value < 0.5


def test_repetition():
  """`a b a b` has the pairs ab, ba, ab: 1 of 3 repeats."""
  assert s.repetition("a b a b") == pytest.approx(1 / 3)
  assert s.repetition("a b c", n=1) == 0
  assert s.repetition("") == 0


def test_overlap_agrees_with_the_published_table(shared_data):
  """The shared file holds the overlap of each model's answers."""
  import collections
  import gzip
  import json

  table = json.loads(
    (shared_data / "superhf/model_similarity.json").read_text()
  )
  answers = collections.defaultdict(list)
  path = shared_data / "superhf" / "scored_completions.test.jsonl.gz"
  with gzip.open(path) as file:
    for row in map(json.loads, file):
      answers[row["model"]].append((row["prompt"], row["completion"]))
  checked = 0
  for model, pairs in answers.items():
    if model in table and len(pairs) > 300:
      value = s.mean_overlap(*zip(*pairs, strict=True), max_pairs=2000)
      assert value == pytest.approx(table[model]["similarity"], abs=0.03)
      checked += 1
  assert checked > 3
