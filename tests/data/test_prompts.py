import json
import random

import pytest

from jaxalign.data import prompts, sources
from jaxalign.errors import UserError


def wire(question):
  return f"\n\nHuman: {question}\n\nAssistant:"


def texts(found):
  return [row.prompt for row in found.rows]


@pytest.mark.parametrize(
  ("row", "prompt"),
  [
    ({"prompt": "Why?"}, wire("Why?")),
    ({"prompt": " Why?\n"}, wire("Why?")),
    ({"prompt": wire("Why?")}, wire("Why?")),
    ({"prompt": "\n\nHuman: Why?"}, wire("Why?")),
    ({"chosen": wire("a") + " b\n\nHuman: c\n\nAssistant: d"}, wire("a")),
    ({"transcript": wire("a") + " b\n\nHuman: c"}, wire("a")),
    ({"question": {"full_text": "Why?", "id": "x"}}, wire("Why?")),
    ({"question": "Why?"}, wire("Why?")),
    ({"text": "Output: of what?"}, wire("Output: of what?")),
    (
      {
        "messages": [
          {"role": "user", "content": "a"},
          {"role": "assistant", "content": "b"},
        ]
      },
      wire("a"),
    ),
  ],
)
def test_first_question_in_the_template(write, row, prompt):
  assert texts(prompts.load_prompts(write([row]))) == [prompt]


def test_role_lists_follow_the_chat_template(write, tiny_chat):
  path = write([{"prompt": [{"role": "user", "content": "a"}]}])
  found = prompts.load_prompts(path, tokenizer=tiny_chat)
  assert texts(found) == ["[user]a</s>[assistant]"]
  # What the template has written would be written again.
  path = write([{"prompt": "[user]a</s>[assistant]"}])
  with pytest.raises(UserError, match="template's own words in prompt; write"):
    prompts.load_prompts(path, tokenizer=tiny_chat)


def test_shuffle_is_pythons_with_the_papers_seed(write):
  path = write([{"prompt": str(i)} for i in range(50)])
  expected = [wire(i) for i in range(50)]
  random.Random(66).shuffle(expected)
  assert texts(prompts.load_prompts(path)) == expected
  assert texts(prompts.load_prompts(path, limit=7)) == expected[:7]
  assert texts(prompts.load_prompts(path, seed=1)) != expected


def test_length_counts_template_and_system(write):
  path = write([{"prompt": "x" * n} for n in (9, 10, 11)])
  limit = len(wire("x" * 10))
  found = prompts.load_prompts(path, max_chars=limit)
  assert sorted(map(len, texts(found))) == [limit - 1, limit]
  assert found.dropped[0] == (f"longer than {limit} characters", 1)
  found = prompts.load_prompts(path, max_chars=limit, system="y")
  assert texts(found) == ["y" + wire("x" * 9)]
  with pytest.raises(UserError, match=r"3 longer than 5 characters, 0 bad"):
    prompts.load_prompts(path, max_chars=5)
  bad = write([{"prompt": "x" * 9}, {"prompt": ""}])
  message = r"none of 2 rows .*1 longer than 5 characters without .*, 1 bad"
  with pytest.raises(UserError, match=message):
    prompts.load_prompts(bad, max_chars=7, system="ab", max_bad_share=1.0)


def test_repeated_prompts_go_by_default(write):
  path = write([{"prompt": p} for p in ("a", "b", "a", "a")])
  found = prompts.load_prompts(path)
  assert sorted(texts(found)) == [wire("a"), wire("b")]
  assert ("repeated", 2) in found.dropped
  assert len(prompts.load_prompts(path, unique=False).rows) == 4


def test_repeats_go_across_sources(write):
  source = (
    f"{write([{'prompt': 'a'}], 'a.jsonl')},{write([{'text': 'a'}], 'b.jsonl')}"
  )
  assert len(prompts.load_prompts(source).rows) == 1


def test_limit_per_set_takes_the_first_rows_that_fit(write):
  a = write([{"prompt": p} for p in ("long" * 9, "a1", "a2", "a3")], "a.jsonl")
  b = write([{"prompt": p} for p in ("b1", "b2", "b3")], "b.jsonl")
  found = prompts.load_prompts(f"{a},{b}", max_chars=30, limit_per_set=2)
  assert sorted(texts(found)) == [wire(q) for q in ("a1", "a2", "b1", "b2")]


def test_holdout_keeps_the_last_rows_for_the_test(write):
  path = write([{"prompt": str(i)} for i in range(10)])
  train = texts(prompts.load_prompts(path, holdout=3))
  test = texts(prompts.load_prompts(path, holdout=3, split="test"))
  assert sorted(test) == [wire(i) for i in (7, 8, 9)]
  assert sorted(train + test) == [wire(i) for i in range(10)]
  with pytest.raises(UserError, match="holdout=10 leaves nothing of 10 rows"):
    prompts.load_prompts(path, holdout=10)


def test_unreadable_lines_are_shared_out_to_both_splits(write):
  """Of 4 in 104 lines the test gets 1 with its 25 rows."""
  lines = [json.dumps({"prompt": str(i)}) for i in range(100)]
  path = write("\n".join([*lines, *"[[[["]))
  test, train = (
    prompts.load_prompts(path, holdout=25, split=x, max_bad_share=0.04)
    for x in ("test", "train")
  )
  assert (len(test.bad), test.read) == (1, 26)
  assert (len(train.bad), train.read) == (3, 78)


def test_prompt_sets_keep_their_names(write):
  path = write([{"prompt": "a", "prompt_set": "own"}])
  assert prompts.load_prompts(path).rows[0].group == "own"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": "  "}, ":1 asks nothing"),
    ({"question": {"id": 1}}, ":1 has nothing in question"),
    ({"messages": [{"role": "system", "content": "a"}]}, ":1 has no user turn"),
    ({"title": "a"}, "has the columns .title., need"),
  ],
)
def test_bad_rows(write, row, message):
  with pytest.raises(UserError, match=message):
    prompts.load_prompts(write([row]))


def test_unknown_split(write):
  with pytest.raises(UserError, match="split must be train or test"):
    prompts.load_prompts(write([{"prompt": "a"}]), split="valid")


@pytest.fixture
def hub(monkeypatch):
  """A hub of 2400 rows a set; remembers the splits asked for."""
  asked = []

  def read_hub(name, split):
    asked.append((name, split))
    column = {
      "harmless-base": "chosen",
      "red-team-attempts": "transcript",
    }.get(name.partition(":")[2], "question")
    rows = tuple({column: wire(f"{split} {i}") + " a"} for i in range(2400))
    if name == "yizhongw/self_instruct":
      rows = tuple({"prompt": f"{i} \nOutput: x"} for i in range(2400))
    return sources.Table(name, rows, tuple(map(str, range(2400))))

  monkeypatch.setattr(sources, "_read_hub", read_hub)
  return asked


def test_named_sets_split_as_superhf_split_them(hub):
  own, none = "Anthropic/hh-rlhf:harmless-base", "openai/webgpt_comparisons"
  assert len(prompts.load_prompts(own, split="test").rows) == 2400
  test = prompts.load_prompts(none, split="test")
  train = prompts.load_prompts(none)
  assert hub == [(own, "test"), (none, "train"), (none, "train")]
  assert sorted(texts(train)) == sorted(wire(f"train {i}") for i in range(100))
  assert len(test.rows) == 2300
  assert not set(texts(test)) & set(texts(train))
  # The paper's runs held nothing out.
  assert len(prompts.load_prompts(none, holdout=0).rows) == 2400
  assert train.rows[0].group == "openai/webgpt_comparisons"


def test_self_instruct_prompts_end_before_the_output(hub):
  found = prompts.load_prompts("yizhongw/self_instruct", limit=1, holdout=0)
  assert "Output" not in found.rows[0].prompt
  assert found.rows[0].group == "self_instruct"


def test_superhf_prompts_are_taken_as_they_stand(shared_data):
  path = f"{shared_data}/superhf/prompts.test.jsonl.gz"
  found = prompts.load_prompts(path)
  (table,) = sources.read(path)
  assert sorted(texts(found)) == sorted(row["prompt"] for row in table.rows)
  assert len(found.rows) == 969
