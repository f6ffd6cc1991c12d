import pytest

from jaxalign.data import formats
from jaxalign.errors import UserError

PAIRS = (formats.load_preferences, formats.load_completions)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": "a", "response": "b"}, "rename response to completion"),
    (
      {"question": "a", "answer": "b"},
      "rename answer to completion, rename question to",
    ),
    (
      {"instruction": "a", "input": "", "output": "b"},
      "Alpaca: write @alpaca after",
    ),
    ({"conversations": []}, "ShareGPT: write @sharegpt after the"),
    ({"promt": "a", "completion": "b"}, "rename promt to prompt"),
    ({"x": 1}, "add the column"),
  ],
)
def test_completions_say_how_to_convert(write, row, message):
  with pytest.raises(UserError, match=message) as told:
    formats.load_completions(write([row]))
  found = ", ".join(sorted(row))
  assert f"has the columns ({found}), need (prompt, completion)" in str(
    told.value
  )


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"winner": "a", "loser": "b"}, "rename winner to chosen"),
    ({"prompt": "a", "chosen": "b", "reject": "c"}, "rename reject to reject"),
    ({"messages": []}, "put the last assistant message into completion"),
    (
      {"prompt": "a", "completion": "b"},
      "add the column chosen, add the column rejected",
    ),
  ],
)
def test_preferences_say_how_to_convert(write, row, message):
  with pytest.raises(UserError, match=message):
    formats.load_preferences(write([row]))


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (
      {"prompt": "a", "completion": "b"},
      "nearest format: add the column label (true = desirable, false = not)",
    ),
    ({"prompt": "a", "completion": "b", "thumbs": 1}, "rename thumbs to label"),
    ({"messages": []}, "nearest format: add the column label (true"),
    ({"messages": [], "good": 1}, "nearest format: rename good to label"),
    ({"prompt": "a", "chosen": "b"}, "add the column rejected"),
  ],
)
def test_labelled_answers_say_how_to_convert(write, row, message):
  with pytest.raises(UserError) as told:
    formats.load_completions(write([row]), need="label")
  line = str(told.value)
  assert message in line
  need = (
    "(prompt, completion, label) or (messages, label) or (chosen, rejected)"
  )
  assert f"need {need}" in line


def test_a_lacking_column_of_groups_is_all_there_is_to_add(write):
  webgpt = ("question", "answer_0", "answer_1", "score_0", "score_1")
  path = write([dict.fromkeys([*webgpt, "messages"], "")])
  with pytest.raises(UserError, match=r"format: add the column annotator$"):
    formats.load_preferences(path, group="annotator")


def test_distillation_needs_a_reward(write):
  path = write([{"prompt": "a", "completion": "b", "train_reward": 1.0}])
  with pytest.raises(UserError, match="rename train_reward to reward"):
    formats.load_completions(path, need="reward")
  found = formats.load_completions(
    path, need="reward", columns={"reward": "train_reward"}
  )
  assert found.rows[0].reward == 1.0


def test_columns_of_all_rows_count(write):
  path = write([{"text": "a"}, {"prompt": "a", "completion": "b"}])
  rows = formats.load_completions(path).rows
  assert [row.prompt for row in rows] == ["", "a"]
