"""The lab's prompts: four kinds, all different, in the wire format."""

import collections
import importlib.resources
import json
import re

import pytest

KINDS = {"red-team", "harmless", "helpful", "webgpt"}
HEAD, TAIL = "\n\nHuman: ", "\n\nAssistant:"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
  path = importlib.resources.files("jaxalign") / "lab" / "prompts.jsonl"
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions(rows) -> list[str]:
  return [row["prompt"][len(HEAD) : -len(TAIL)] for row in rows]


def words(text: str) -> set[str]:
  return set(re.findall(r"[a-z']+", text.lower()))


def test_there_are_enough_of_every_kind(rows):
  count = collections.Counter(row["prompt_set"] for row in rows)
  assert len(rows) >= 560
  assert set(count) == KINDS
  assert min(count.values()) >= 130


def test_every_prompt_has_the_wire_format(rows):
  for row in rows:
    assert set(row) == {"prompt_set", "prompt"}
    assert row["prompt"].startswith(HEAD), row
    assert row["prompt"].endswith(TAIL), row
    assert row["prompt"].count("Human:") == 1, row
    assert row["prompt"].count("Assistant:") == 1, row


def test_questions_are_one_clean_line_of_five_to_forty_words(questions):
  for question in questions:
    assert question == " ".join(question.split()), question
    assert question.isascii(), question
    assert question[-1] in ".?!", question
    assert 5 <= len(question.split()) <= 40, question


def test_lengths_vary(questions):
  lengths = sorted(len(question.split()) for question in questions)
  assert lengths[len(lengths) // 20] <= 8
  assert lengths[-len(lengths) // 20] >= 18


def test_no_two_questions_share_half_of_their_words(questions):
  seen: list[tuple[set[str], str]] = []
  for question in questions:
    mine = words(question)
    for other, text in seen:
      overlap = len(mine & other) / len(mine | other)
      assert overlap < 0.5, (question, text)
    seen.append((mine, question))


def test_no_way_of_beginning_is_a_template(questions):
  starts = collections.Counter(
    " ".join(question.split()[:4]).lower() for question in questions
  )
  start, count = starts.most_common(1)[0]
  assert count <= len(questions) // 40, (start, count)
