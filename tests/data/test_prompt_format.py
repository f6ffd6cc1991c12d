"""Formats of conversations: what they write, where their turns end."""

import json

import pytest
import transformers

from jaxalign.data import formats, prompts
from jaxalign.data.prompt_format import DIALOGUE, in_turns, with_system
from jaxalign.data.rows import CompletionRow, PreferenceRow
from jaxalign.data.tokenizer import load_tokenizer, with_format, with_notes
from jaxalign.errors import UserError
from jaxalign.text import templates

ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
HH = "\n\nHuman: q\n\nAssistant:"
# Turns that are plain text, which no special token closes.
PLAIN = (
  "{% for m in messages %}"
  "{{ '\\nQ: ' if m.role == 'user' else '\\nA: ' }}{{ m.content }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '\\nA:' }}{% endif %}"
)


def test_special_tokens_that_close_a_turn_end_a_completion(tiny_chat):
  # `</s>` closes a turn there; it is the eos token, too.
  assert tiny_chat.format.name == "chat"
  assert tiny_chat.format.ends == (1,)
  assert tiny_chat.format.turns == ()


def test_another_end_than_the_eos_token_is_added(make_tiny):
  template = PLAIN.replace("{% endfor %}", "<s>{% endfor %}")
  found = with_format(make_tiny(template=template), "auto")
  assert found.end_ids == (1, 0)
  assert found.special_ids()["eos_token_id"] == [1, 0]


def test_turns_of_plain_text_are_delimiters(make_tiny):
  assert make_tiny(template=PLAIN).format.turns == ("\nQ:", "\nA:")


def test_without_a_template_the_delimiters_are_superhfs(tiny):
  assert tiny.format == DIALOGUE
  assert DIALOGUE.turns == (templates.HUMAN, templates.ASSISTANT)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_the_dialogue_format_is_saved_as_a_template(tiny, tmp_path, system):
  with_format(tiny, "auto").save(tmp_path)
  inner = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for messages, reply in (([ASKED], True), ([ASKED, ANSWERED], False)):
    found = inner.apply_chat_template(
      system + messages, tokenize=False, add_generation_prompt=reply
    )
    assert found == templates.from_messages(system + messages, reply)
  # And is known again, so that texts stay those that were trained on.
  assert load_tokenizer(tmp_path).format == DIALOGUE
  assert tiny.inner.chat_template is None


def test_a_template_of_a_file_is_saved(tiny, tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(PLAIN)
  with_format(tiny, str(file)).save(tmp_path / "model")
  found = load_tokenizer(tmp_path / "model")
  assert found.render_chat([ASKED], reply=True) == "\nQ: q\nA:"


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ("chat", "tiny has no chat template"),
    ("own.jinja", "own.jinja cannot be read"),
    ("chatml", "must be auto, chat, human_assistant, raw or a file"),
  ],
)
def test_settings_that_cannot_be(tiny, setting, message):
  with pytest.raises(UserError, match=message):
    with_format(tiny, setting)


@pytest.mark.parametrize("text", ["q", HH, HH + " a\n\nHuman: r"])
def test_prompts_become_the_turns_of_a_template(write, tiny_chat, text):
  path = write([{"prompt": text}])
  (row,) = prompts.load_prompts(path, tokenizer=tiny_chat, system="s").rows
  assert row.prompt == "[system]s</s>[user]q</s>[assistant]"
  assert row.messages == ({"role": "system", "content": "s"}, ASKED)


def test_a_dialogues_own_system_turn_stays(write, tiny_chat):
  own = {"role": "system", "content": "own"}
  path = write([{"prompt": [own, ASKED]}])
  (row,) = prompts.load_prompts(path, tokenizer=tiny_chat, system="s").rows
  assert row.messages == (own, ASKED)


def test_raw_prompts_stay_as_they_are(write, tiny_chat):
  raw = with_format(tiny_chat, "raw")
  path = write([{"prompt": " 2+2="}])
  assert prompts.load_prompts(path, tokenizer=raw).rows[0].prompt == " 2+2="
  assert raw.format.turns == ()
  with pytest.raises(UserError, match="raw has no turns"):
    prompts.load_prompts(
      write([{"prompt": [ASKED]}]), tokenizer=raw, max_bad_share=0.0
    )


def test_dialogues_of_data_sets_are_written_by_the_template(write, tiny_chat):
  path = write(
    [
      {"chosen": HH + " a", "rejected": HH + " b\n\nHuman: no"},
      {"prompt": HH, "chosen": "a", "rejected": "b"},
    ]
  )
  first, second = formats.load_preferences(path, tokenizer=tiny_chat).rows
  asked = "[user]q</s>[assistant]"
  assert first == PreferenceRow(asked, "a</s>", "b</s>[user]no</s>")
  assert second == PreferenceRow(asked, "a</s>", "b</s>")


@pytest.mark.parametrize("setting", ["chat", "human_assistant"])
def test_a_format_that_is_asked_for_takes_plain_strings(
  write, tiny_chat, setting
):
  asked = with_format(tiny_chat, setting)
  path = write([{"prompt": "q", "completion": "a"}])
  (row,) = formats.load_completions(path, tokenizer=asked).rows
  expected = {
    "chat": CompletionRow("[user]q</s>[assistant]", "a</s>"),
    "human_assistant": CompletionRow(HH, " a"),
  }
  assert row == expected[setting]


def test_instructions_are_turns(tiny_chat):
  row = {"instruction": "q", "context": "c", "response": "a", "category": "x"}
  found = in_turns(row, tiny_chat.format)
  assert found["category"] == "x"
  assert found["prompt"][0]["content"] == "q\n\nContext: c"
  assert json.dumps(found["completion"]) == json.dumps([ANSWERED])
  assert in_turns(row, DIALOGUE) == row


def test_raw_is_noted_in_the_models_config(tiny_chat):
  raw = with_format(tiny_chat, "raw")
  noted = with_notes(tiny_chat, {}, raw.special_ids())
  assert noted.format == with_format(noted, "auto").format == raw.format
  again = with_format(noted, "chat")
  assert again.format.name == "chat"
  assert "jaxalign_prompt_format" not in again.special_ids()


def test_a_system_text_comes_before_the_prompt():
  system = {"role": "system", "content": "s"}
  for row, wanted in (
    ({"prompt": "q", "chosen": "a"}, {"prompt": "sq", "chosen": "a"}),
    (
      {"chosen": HH, "rejected": HH},
      {"chosen": "s" + HH, "rejected": "s" + HH},
    ),
    ({"messages": [ASKED]}, {"messages": [system, ASKED]}),
    ({"prompt": [system, ASKED]}, {"prompt": [system, ASKED]}),
    # The prompt is a string as well, next to lists that hold it.
    (
      {"prompt": "q", "chosen": [ASKED, ANSWERED]},
      {"prompt": "q", "chosen": [system, ASKED, ANSWERED]},
    ),
    ({"question": "q", "score_0": 1}, {"question": "sq", "score_0": 1}),
  ):
    assert with_system(row, "s") == wanted
    assert with_system(row, "") == row


def test_raw_instructions_have_no_delimiters(write, tiny):
  path = write([{"instruction": "do", "response": "done"}])
  raw = with_format(tiny, "raw")
  rows = formats.load_completions(path, tokenizer=raw).rows
  assert rows == (CompletionRow("do", "done"),)


def test_the_saved_generation_config_has_the_trained_ends(make_tiny, tmp_path):
  """It is what transformers' generate goes by."""
  template = PLAIN.replace("{% endfor %}", "<s>{% endfor %}")
  tokenizer = with_notes(make_tiny(template=template), {"eos_token_id": 1}, {})
  with_format(tokenizer, "auto").save(tmp_path)
  saved = json.loads((tmp_path / "generation_config.json").read_text())
  assert saved["eos_token_id"] == [1, 0]


def test_labelled_messages(write, tiny):
  path = write([{"messages": [ASKED, ANSWERED], "label": True}])
  rows = formats.load_completions(path, tokenizer=tiny, need="label").rows
  assert rows == (CompletionRow(HH, " a", label=True),)
