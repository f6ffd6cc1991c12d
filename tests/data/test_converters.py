"""Each converter on rows of the shape that its data set has."""

import math

import pytest

from jaxalign.data import converters, formats, prompts
from jaxalign.errors import UserError


def asked(*texts):
  roles = ("user", "assistant") * len(texts)
  return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def answer(text):
  return [{"role": "assistant", "content": text}]


def pair(prompt, chosen, rejected, margin=None):
  row = {
    "prompt": asked(prompt),
    "chosen": answer(chosen),
    "rejected": answer(rejected),
  }
  return row if margin is None else row | {"margin": margin}


def converted(name, *rows):
  places = [f"f:{i}" for i in range(len(rows))]
  made, where, bad = converters.convert(name, "f", rows, places)
  assert not bad
  assert len(where) == len(made)
  return made


def test_alpaca():
  made = converted(
    "alpaca",
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Hi", "input": "", "output": "Ho", "system": "s"},
  )
  assert made == [
    {"prompt": asked("Add.\n\n1 2"), "completion": answer("3")},
    {
      "prompt": [{"role": "system", "content": "s"}, *asked("Hi")],
      "completion": answer("Ho"),
    },
  ]


def test_sharegpt():
  turns = [("human", "q"), ("gpt", "a"), ("observation", "o"), ("gpt", "b")]
  turns = [{"from": who, "value": text} for who, text in turns]
  better, worse = ({"from": "gpt", "value": x} for x in "xy")
  row = {"conversations": turns, "system": "s", "tools": "[]"}
  single, both = converted(
    "sharegpt",
    row,
    {"conversations": turns[:1], "chosen": better, "rejected": worse},
  )
  roles = [turn["role"] for turn in single["messages"]]
  assert roles == ["system", "user", "assistant", "tool", "assistant"]
  assert [turn["content"] for turn in single["messages"]] == [*"sqaob"]
  assert single["tools"] == "[]"
  assert both == pair("q", "x", "y")
  odd = {"conversations": [{"from": "crowd", "value": "q"}]}
  _, _, bad = converters.convert("sharegpt", "f", [odd], ["f:1"])
  assert bad == [
    "f:1 cannot be read by the converter sharegpt (ValueError: unknown "
    "speaker 'crowd')"
  ]


def completion(text, *ratings, overall=9.0):
  aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
  notes = {
    name: {"Rating": r} for name, r in zip(aspects, ratings, strict=False)
  }
  return {"response": text, "annotations": notes, "overall_score": overall}


def test_ultrafeedback():
  row = {
    "instruction": "q",
    "completions": [
      completion("good", "5", "4", "5", "N/A"),
      completion("bad", "1", "2", "1", "2", overall=10.0),
      completion("best", overall=5.0),
    ],
  }
  (made,) = converted("ultrafeedback", row)
  assert made["chosen"] == answer("best")
  assert (made["rejected"], made["margin"]) in (
    (answer("bad"), 3.5),
    (answer("good"), pytest.approx(1 / 3)),
  )
  rewards = converted("ultrafeedback_rewards", row)
  assert [x["reward"] for x in rewards] == [pytest.approx(14 / 3), 1.5, 5.0]
  assert rewards[1]["completion"] == answer("bad")
  # A tie is told apart from a preference by equal completions.
  (made,) = converted(
    "ultrafeedback", row | {"completions": row["completions"][2:] * 2}
  )
  assert made["chosen"] == made["rejected"]


def test_ultrafeedback_binarized():
  lists = {"chosen": asked("q", "a"), "rejected": asked("q", "b")}
  row = {"prompt": "q", "messages": asked("q", "a")} | lists
  made = converted(
    "ultrafeedback_binarized",
    row | {"score_chosen": 8.0, "score_rejected": 6.5},
    row | {"chosen-rating": 4.0, "rejected-rating": 4.0},
    row | {"chosen": "a", "rejected": "b"},
  )
  assert made == [
    lists | {"margin": 1.5},
    lists | {"rejected": lists["chosen"]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
  ]


def test_helpsteer2():
  """Responses to a prompt follow each other; older turns are in its text."""
  turns = "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nmore"
  rows = [
    {"prompt": prompt, "response": response, "helpfulness": grade}
    for prompt, response, grade in (
      ("p", "x", 1), ("p", "y", 4), (turns, "z", 3), (turns, "w", 3),
    )
  ]  # fmt: skip
  first, tie = converted("helpsteer2", *rows)
  assert first == pair("p", "y", "x", 3.0)
  assert tie["prompt"] == asked("q", "a", "more")
  assert tie["chosen"] == tie["rejected"]
  made = converted("helpsteer2_rewards", *rows)
  assert [row["reward"] for row in made] == [1.0, 4.0, 3.0, 3.0]


def test_pku_saferlhf():
  row = {"prompt": "q", "response_0": "a", "response_1": "b"}
  row |= {"better_response_id": 0, "safer_response_id": 1}
  assert converted("pku_saferlhf", row) == [pair("q", "a", "b")]
  assert converted("pku_saferlhf_safer", row) == [pair("q", "b", "a")]


def test_shp():
  row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b"}
  rows = [
    row | {"labels": 1, "score_ratio": 4.0},
    row | {"labels": 0, "score_ratio": 1.5},
  ]
  wanted = [
    pair("q", "a", "b", math.log(4)),
    pair("q", "b", "a", math.log(1.5)),
  ]
  assert converted("shp", *rows) == wanted
  clear, unclear = converted("shp_clear", *rows)
  assert clear == wanted[0]
  assert unclear["chosen"] == unclear["rejected"]


def test_stack_exchange_preferences():
  row = {
    "question": "<p>Is 1 &lt; 2?</p>",
    "answers": [
      {"text": f"<p>{text}</p>", "pm_score": score}
      for text, score in (("no", 0), ("yes", 5), ("<b>maybe</b>", 2))
    ],
  }
  assert converted("stack_exchange_preferences", row) == [
    pair("Is 1 < 2?", "yes", "no", 5.0),
    pair("Is 1 < 2?", "yes", "maybe", 3.0),
  ]


def test_every_reader_takes_a_converter(write):
  """Prompts, completions, preferences with their ties counted."""
  row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
  rows = [row | {"score_ratio": r} for r in (3.0, 1.5)]
  source = f"{write(rows)}@shp_clear"
  found = formats.load_preferences(source)
  head = "\n\nHuman: q\n\nAssistant:"
  assert [(r.prompt, r.chosen, r.rejected) for r in found.rows] == [
    (head, " a", " b")
  ]
  assert found.dropped == (("without a preference", 1),)
  assert formats.load_completions(source).rows[0].completion == " a"
  assert prompts.load_prompts(source).rows[0].prompt == head
  turns = {"conversations": [{"from": "human", "value": "q"}]}
  source = f"{write([turns], 'chat.jsonl')}@sharegpt"
  assert prompts.load_prompts(source).rows[0].prompt == head
  with pytest.raises(UserError, match="has no message of the assistant"):
    formats.load_completions(source, every_turn=True)
