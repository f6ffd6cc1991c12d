"""Which completion is better: by score, by a function, by people."""

import json

import numpy as np
import pytest

from jaxalign.core.types import Completions, Samples
from jaxalign.errors import StepError, UserError
from jaxalign.feedback import judges
from jaxalign.training.rollout import Rollout


def never():
  return False


def rollout(texts, scores, ended=None):
  """Pairs of completions, two for each prompt."""
  zeros = np.zeros((len(texts), 1), np.float32)
  ints = np.zeros(len(texts), np.int32)
  samples = Samples(zeros.astype(np.int32), ints, ints, zeros, zeros)
  prompts = [f"q{i}" for i in range(len(texts) // 2)]
  found = Completions(
    prompts,
    [[0]] * len(prompts),
    texts,
    samples,
    ended or [True] * len(texts),
    [1] * len(texts),
  )
  return Rollout(found, np.array(scores, float).reshape(-1, 2), None)


FOUR = rollout(
  ["a", "b", "c", "d", "e", "e", "f", ""],
  [1.0, 2.0, 3.0, 3.0, 0.0, 1.0, 5.0, -np.inf],
)


def test_the_higher_score_wins_and_a_tie_is_the_first():
  """Equal texts and unusable completions are no comparison."""
  assert judges.by_score(FOUR).tolist() == [1, 0, -1, -1]


def test_a_completion_that_was_cut_pays_for_it():
  found = rollout(["a", "b"], [1.0, 2.0], [True, False])
  assert judges.by_score(found, 0.5).tolist() == [1]
  assert judges.by_score(found, 1.5).tolist() == [0]


def test_the_judge_of_a_config_takes_its_penalty(tmp_path):
  found = rollout(["a", "b"], [1.0, 2.0], [True, False])
  for penalty, choice in ((0.5, 1), (1.5, 0)):
    judge = judges.make_judge("reward_model", None, penalty, tmp_path)
    assert judge(0, found, never).tolist() == [choice]


def make(name, folder):
  return judges.make_judge(name, judges.open_judge(name), 0.0, folder)


def test_a_function_of_the_user(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "def longest(prompts, first, second):\n"
    "  return [int(len(b) > len(a)) for a, b in zip(first, second)]\n"
    "def lazy(prompts, first, second):\n"
    "  return [0]\n"
    "def broken(prompts, first, second):\n"
    "  return [int(text) for text in first]\n"
  )
  found = rollout(["aa", "b", "c", "dd", "e", "e"], [0.0] * 6)
  judge = make(f"{file}:longest", tmp_path)
  assert judge(0, found, never).tolist() == [0, 1, -1]
  with pytest.raises(UserError, match=r"lazy must return 0, 1 or -1 .* 3"):
    make(f"{file}:lazy", tmp_path)(0, found, never)
  with pytest.raises(StepError, match=r"mine\.py line 6: ValueError: invalid"):
    make(f"{file}:broken", tmp_path)(0, found, never)
  with pytest.raises(UserError, match="has no function other"):
    make(f"{file}:other", tmp_path)
  with pytest.raises(UserError, match=r"none\.py does not exist"):
    make(f"{tmp_path}/none.py:prefer", tmp_path)
  file.write_text("1 / 0\n")
  with pytest.raises(UserError, match="division by zero"):
    make(f"{file}:longest", tmp_path)


def label(folder, choices):
  with (folder / judges.LABELS).open("a") as file:
    for name, choice in choices.items():
      file.write(json.dumps({"id": name, "choice": choice}) + "\n")


def queue(folder):
  lines = (folder / judges.QUEUE).read_text().splitlines()
  return {row["id"]: row for row in map(json.loads, lines)}


def test_people_are_asked_and_waited_for(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(judges, "POLL_S", 0.0)
  judge = make("people", tmp_path)
  # What people have done at each look; the last label of a pair counts.
  days = iter([{}, {"3-1": 0}, {"3-2": -1, "3-1": 1}])

  def stopping():
    label(tmp_path, next(days))
    return False

  choice = judge(2, FOUR, stopping)
  assert choice.tolist() == [1, -1, -1, -1]
  # Pairs that are no comparison are not shown to anyone.
  assert set(queue(tmp_path)) == {"3-1", "3-2"}
  assert queue(tmp_path)["3-1"]["answers"] == ["a", "b"]
  assert "waiting for 2 labels" in capsys.readouterr().out
  # A step that is done again finds its labels and asks no one twice.
  assert judge(2, FOUR, never).tolist() == [1, -1, -1, -1]
  lines = (tmp_path / judges.QUEUE).read_text().splitlines()
  assert len(lines) == 2


def test_a_stop_ends_the_wait(tmp_path):
  assert make("people", tmp_path)(0, FOUR, lambda: True) is None


def test_a_bad_label_is_an_error(tmp_path):
  label(tmp_path, {"1-1": "left", "1-2": 0})
  with pytest.raises(UserError, match="the choice of 1-1 must be 0, 1 or -1"):
    make("people", tmp_path)(0, FOUR, never)
  (tmp_path / judges.LABELS).write_text('{"id": "1-1", "choice": 0}\nyes\n')
  with pytest.raises(UserError, match="line 2: not an object with an id"):
    make("people", tmp_path)(0, FOUR, never)
