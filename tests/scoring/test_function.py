"""Reward functions of the user: what they are given, return and may take."""

import logging
import threading
import time

import numpy as np
import pytest

from jaxalign.data.rows import PromptRow
from jaxalign.errors import StepError, UserError
from jaxalign.scoring.function import ask_functions, open_function
from jaxalign.scoring.reward_model import RewardModel

ASKED = [{"role": "user", "content": "2 + 2?"}]
PLAIN = PromptRow(
  "\n\nHuman: 1 + 1?\n\nAssistant:",
  columns={"prompt": "1 + 1?", "completion": "2", "answer": 2, "tags": ["a"]},
)
ROLES = PromptRow(
  "<u>2 + 2?<a>", "", tuple(ASKED), {"messages": ASKED, "answer": 4}
)
ROWS = [PLAIN, PLAIN, ROLES]
TEXTS = ["2", "x", "4"]


@pytest.fixture
def write(tmp_path):
  """(source, name, limit in seconds) -> the function."""

  def opened(source, name="f", seconds=0):
    file = tmp_path / "mine.py"
    file.write_text(source)
    return open_function(f"{file}:{name}", "config.reward_model", seconds)

  return opened


def test_it_is_given_what_its_signature_asks_for(write):
  """Prompts as in the data, role lists as in TRL, None for a lacking column."""
  source = """
def f(prompts, completions, answer, tags, level=7):
  assert prompts[1:] == ["1 + 1?", [{"role": "user", "content": "2 + 2?"}]]
  assert completions == ["2", "x", [{"role": "assistant", "content": "4"}]]
  assert (tags, level) == ([["a"], ["a"], None], 7)
  tags[0].append("b")
  return [float(a) for a in answer]

def everything(prompts, completions, **kwargs):
  assert sorted(kwargs) == ["answer", "messages", "tags"]
  return [1, True, None]
"""
  assert write(source)(ROWS, TEXTS).tolist() == [2, 2, 4]
  # What a function does to its arguments is gone afterwards.
  assert write(source)(ROWS, TEXTS).tolist() == [2, 2, 4]
  found = write(source, "everything")(ROWS, TEXTS)
  np.testing.assert_array_equal(found, [1, 1, np.nan])


def test_an_object_without_a_hash_is_a_function_too(write):
  source = """
import dataclasses

@dataclasses.dataclass
class Length:
  scale: float

  def __call__(self, completions):
    return [self.scale * len(text) for text in completions]

f = Length(2)
"""
  function = write(source)
  found = ask_functions([function, function], [PLAIN], ["abc"])
  assert found.tolist() == [[6], [6]]


def test_a_prompt_is_what_the_policy_was_asked(write):
  """Of a dialogue with its answer only the first question."""
  dialogue = "\n\nHuman: a?\n\nAssistant: b"
  row = PromptRow("\n\nHuman: a?\n\nAssistant:", columns={"chosen": dialogue})
  source = "def f(prompts, **_): return [len(p) for p in prompts]"
  assert write(source)([row], ["c"]).tolist() == [len(row.prompt)]


@pytest.mark.parametrize(
  ("source", "said"),
  [
    ("def f(x, /): return []", "f must take x by name; it takes prompts, "),
    (
      "def f(completions, reply): return []",
      "f takes reply, which data.jsonl does not have; it has answer, "
      "completions, prompts, tags: rename it, or give it a default",
    ),
    ("def f(prompt, completion): return []", "f takes prompt, which"),
  ],
)
def test_a_signature_that_the_data_cannot_serve(source, said, write):
  function = write(source)
  with pytest.raises(UserError, match=r"mine\.py:f") as error:
    function.check_columns(["answer", "prompt", "tags"], "data.jsonl")
  assert said in str(error.value)
  write("def f(completions, *, answer, more=1, **k): ...").check_columns(
    ["answer"], ""
  )


@pytest.mark.parametrize(
  ("value", "said"),
  [
    ("[1.0]", "a float or None for each of 3 completions, got 1 values"),
    ("1.0", "for each of 3 completions, got 1.0"),
    ("[1, '1', 1]", "got '1' for row 1, the completion 'x' of the prompt"),
    ("[[1], 0, 0]", "got [1] for row 0, the completion '2' of the prompt"),
  ],
)
def test_a_return_value_that_is_none_of_the_contract(value, said, write):
  function = write(f"def f(completions): return {value}")
  with pytest.raises(UserError) as error:
    function(ROWS, TEXTS)
  assert said in str(error.value)
  assert not isinstance(error.value, StepError)  # it will not go away


def test_numbers_that_are_not_finite_are_logged_with_their_row(write, caplog):
  function = write(
    "import numpy as np\n"
    "def f(completions): return np.array([np.nan, 1, -np.inf], np.float32)"
  )
  with caplog.at_level(logging.WARNING):
    assert function(ROWS, TEXTS).tolist() == [np.inf, 1, np.inf]
  assert "f: 2 of 3 rewards are not finite, the first for row 0, the" in (
    caplog.text
  )


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_an_exception_names_row_and_line(kind, write):
  function = write(
    f"{kind} f(completions):\n  return list(map(int, completions))"
  )
  with pytest.raises(StepError) as error:
    function([PLAIN, PLAIN], ["4", "x"])
  said = str(error.value)
  assert "config.reward_model: " in said
  assert "mine.py:f failed for row 1, the completion 'x' of the prompt " in said
  assert "1 + 1?" in said
  assert "mine.py line 2: ValueError: invalid literal for int()" in said


@pytest.mark.parametrize(
  ("hang", "in_main"),
  [
    # Holds Python's lock for years, so no other thread could end it.
    ("re.match('(a+)+b', 30 * 'a')", True),
    ("time.sleep(60)", True),
    ("time.sleep(60)", False),
  ],
)
def test_a_function_that_hangs_is_left(hang, in_main, write):
  source = f"""
import re, time
def f(completions):
  if "x" in completions:
    {hang}
  return [0.0 for _ in completions]
"""
  function, found = write(source, seconds=0.2), []

  def call():
    with pytest.raises(StepError) as error:
      function(ROWS, TEXTS)
    found.append(str(error.value))

  start = time.monotonic()
  if in_main:
    call()
  else:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
  assert time.monotonic() - start < 5
  assert (
    "took more than config.scoring.function_timeout=0.2 seconds for 3 "
    "completions; one by one it came to row 1, the completion 'x' of the prompt"
  ) in found[0]


def test_async_functions_wait_together(write):
  """Both are called before either answers; a loop that blocks is replaced."""
  source = """
import asyncio, time
begun = asyncio.Event()
async def f(completions):
  await asyncio.wait_for(begun.wait(), 20)
  return [1.0 for _ in completions]
async def g(completions):
  begun.set()
  return [2.0 for _ in completions]
async def blocks(completions):
  time.sleep(5)
"""
  first = write(source, seconds=30)
  # Of one module, which holds the event.
  second = first.function.__globals__["g"]
  both = [first, type(first)("mine.py:g", second)]
  assert ask_functions(both, ROWS, TEXTS)[:, 0].tolist() == [1, 2]
  with pytest.raises(StepError, match="took more than"):
    write(source, "blocks", 0.1)(ROWS[:1], TEXTS[:1])
  assert write(source, "g")(ROWS, TEXTS).tolist() == [2, 2, 2]


def test_none_leaves_a_function_out_of_a_rows_sum(write):
  source = """
def f(completions): return [None, 1, 4]
def g(completions): return [10, None, float("inf")]
"""
  both = write(source), write(source, "g")
  rewards = RewardModel(both, (0.5, -2.0))
  scores = rewards.scores(ROWS, TEXTS)
  assert scores.shape == (2, 3)
  assert rewards.total(scores, ROWS).tolist() == [-20, 0.5, -np.inf]
  assert rewards.names == ("f", "g")
  assert RewardModel((*both, both[0]), (1.0,) * 3).names == ("f_1", "g", "f_2")
  alone = RewardModel((both[0],))
  with pytest.raises(UserError, match=r"mine.py:f: None for 1 of 3 .*1 \+ 1\?"):
    alone(ROWS, TEXTS)
