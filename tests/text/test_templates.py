import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.text import templates as t

WORDS = st.text(
  st.characters(exclude_categories=["Cs"], exclude_characters=":"), min_size=1
).map(str.strip)
TEXT = WORDS.filter(bool)


def test_prompt_is_the_wire_string_byte_for_byte():
  expected = b"\n\nHuman: Why is the sky blue?\n\nAssistant:"
  assert t.build_prompt("Why is the sky blue?").encode() == expected
  assert (
    t.build_prompt("Hi", "Be nice.") == "Be nice.\n\nHuman: Hi\n\nAssistant:"
  )


def test_system_texts_end_as_the_runs_had_them():
  assert t.SYSTEM_CS224N.endswith("AI assistant responds.")
  assert t.SYSTEM_CS224N_RLHF.endswith("AI assistant responds:")
  assert t.SYSTEM_CS224N[:-1] == t.SYSTEM_CS224N_RLHF[:-1]
  assert t.SYSTEM_LATER == (
    "A human user sends a message, and a helpful and harmless AI assistant "
    "responds."
  )


@pytest.mark.parametrize(
  "completion", ["Hi there", "  Hi there\n", "\n Hi there"]
)
def test_join_puts_one_space_behind_the_delimiter(completion):
  prompt = "\n\nHuman: Hi\n\nAssistant:"
  assert t.join(prompt, completion) == prompt + " Hi there"


@pytest.mark.parametrize(
  ("prompt", "completion", "joined"),
  [
    ("The sky is", " blue.", "The sky is blue."),
    ("The sk", "y is blue.", "The sky is blue."),
    ("2+2=", "4", "2+2=4"),
    ("[/INST]", "four</s>", "[/INST]four</s>"),
    ("The sky is ", "blue.", "The sky is blue."),
    ("<|assistant|>", "Hi", "<|assistant|>Hi"),
    ("assistant\n", "Hi<|end|>\n", "assistant\nHi<|end|>\n"),
    ("", " a text", " a text"),
  ],
)
def test_join_keeps_the_seam_of_other_prompts(prompt, completion, joined):
  assert t.join(prompt, completion) == joined


@pytest.mark.parametrize(
  ("prompt", "completion", "joined"),
  [
    ("The sky is", "blue. ", "The sky is blue."),
    ("The sky is", " blue.", "The sky is blue."),
    ("The sky is ", "blue.", "The sky is blue."),
    ("", "blue.", "blue."),
    ("\n\nHuman: Hi\n\nAssistant:", "  Hi\n", "\n\nHuman: Hi\n\nAssistant: Hi"),
    ("\n\nHuman: Hi\n\nAssistant:", "", "\n\nHuman: Hi\n\nAssistant:"),
  ],
)
def test_reward_models_read_words_apart(prompt, completion, joined):
  assert t.join_words(prompt, completion) == joined


def test_first_delimiter():
  text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
  assert t.split_first(text) == (
    "\n\nHuman: a\n\nAssistant:",
    " b\n\nHuman: c\n\nAssistant: d",
  )
  assert t.first_question(text) == "\n\nHuman: a\n\nAssistant:"
  assert t.split_first("no dialogue") is None
  assert t.split_first("Assistant: too few newlines") is None
  assert t.first_question("a story\n\nAssistant: b") is None


def test_pair_with_a_shared_beginning_splits_at_the_delimiter():
  """Not at the longest common text, which would end inside an answer."""
  head = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
  assert t.split_pair(head + " I think so", head + " I think not") == (
    head,
    " I think so",
    " I think not",
  )


def test_pair_where_one_answer_plays_on():
  head = "\n\nHuman: q\n\nAssistant:"
  long = " a\n\nHuman: r\n\nAssistant: b"
  assert t.split_pair(head + " c", head + long) == (head, " c", long)
  assert t.split_pair(head + long, head + " c") == (head, long, " c")
  assert t.split_pair("\n\nHuman: x\n\nAssistant: a", head + " a") is None


def test_bare_question():
  assert t.bare_question("Be nice.\n\nHuman: Why?\n\nAssistant:") == "Why?"
  assert t.bare_question("Why?") == "Why?"
  two = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
  assert t.bare_question(two) == "a\n\nAssistant: b\n\nHuman: c"


def test_is_prompt():
  assert t.is_prompt(t.build_prompt("a"))
  assert not t.is_prompt(t.build_prompt("a") + " b")
  assert not t.is_prompt("a")


def test_messages_become_the_wire_string():
  messages = [
    {"role": "system", "content": "Be nice."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
  ]
  text = "Be nice.\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
  assert t.from_messages(messages) == text
  assert t.from_messages(messages, reply=True) == text + "\n\nAssistant:"
  assert t.to_messages(text + "\n\nAssistant:") == messages


@given(
  system=TEXT | st.just(""),
  turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT)),
)
def test_messages_round_trip(system, turns):
  messages = [{"role": role, "content": words} for role, words in turns]
  if system:
    messages.insert(0, {"role": "system", "content": system})
  assert t.to_messages(t.from_messages(messages)) == messages


@given(question=TEXT, answer=TEXT)
def test_join_and_split_round_trip(question, answer):
  prompt = t.build_prompt(question)
  joined = t.join(prompt, answer)
  assert t.split_first(joined) == (prompt, " " + answer)


def test_hh_dialogues_survive_the_round_trip(shared_data):
  """No turn is lost, whatever blank lines stand inside one."""
  path = shared_data / "hh" / "helpful-online" / "test.jsonl.gz"
  with gzip.open(path) as file:
    texts = [json.loads(line)["chosen"] for line in file]
  for text in texts:
    messages = t.to_messages(text)
    turns = text.count(t.HUMAN) + text.count(t.ASSISTANT)
    assert len(messages) == turns - text.endswith(t.ASSISTANT)
    assert t.from_messages(messages).split() == text.split()
