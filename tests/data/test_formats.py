import json
import logging

import pytest

from jaxalign.data import encode, formats
from jaxalign.data.prompts import load_prompts
from jaxalign.data.rows import CompletionRow, PreferenceRow
from jaxalign.errors import UserError
from jaxalign.text import templates

HEAD = "\n\nHuman: q\n\nAssistant:"
USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def said(text):
  return {"role": "assistant", "content": text}


def preferences(write, *rows, **options):
  return formats.load_preferences(write(list(rows)), **options).rows


def completions(write, *rows, **options):
  return formats.load_completions(write(list(rows)), **options).rows


def test_explicit_and_implicit_prompts_agree(write):
  explicit, implicit, turns, all_turns = preferences(
    write,
    {"prompt": HEAD, "chosen": " a", "rejected": " b"},
    {"chosen": HEAD + " a", "rejected": HEAD + " b"},
    {"prompt": [USER], "chosen": [said("a")], "rejected": [said("b")]},
    {"chosen": [USER, said("a")], "rejected": [USER, said("b")]},
  )
  assert explicit == PreferenceRow(HEAD, " a", " b")
  assert explicit == implicit == turns == all_turns


def test_plain_strings_get_no_template(write):
  (row,) = preferences(
    write, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
  )
  assert row == PreferenceRow("The sky is", " blue.", " green.")


@pytest.mark.parametrize("prompt", ["q", [USER]])
def test_prompt_repeated_inside_the_lists(write, prompt):
  whole = {"chosen": [USER, said("a")], "rejected": [USER, said("b")]}
  (row,) = preferences(write, {"prompt": prompt} | whole)
  assert row == PreferenceRow(HEAD, " a", " b")


def test_prompt_repeated_inside_a_completion(write):
  path = write([{"prompt": [USER], "completion": [USER, said("a")]}])
  for every_turn in (False, True):
    for system in ("", "s"):
      (row,) = formats.load_completions(
        path, every_turn=every_turn, system=system
      ).rows
      assert (row.prompt, row.completion) == (system + HEAD, " a")


@pytest.mark.parametrize("own", [True, False])
def test_a_string_prompt_stays_next_to_a_system_text(write, own):
  """Whether the system turn is the row's or the config's."""
  first = [SYSTEM] if own else []
  (row,) = preferences(
    write,
    {
      "prompt": "q",
      "chosen": [*first, said("a")],
      "rejected": [*first, said("b")],
    },
    system="" if own else "s",
  )
  assert row == PreferenceRow("s" + HEAD, " a", " b")


def test_implicit_lists_share_all_but_the_last_turns(write):
  more = [USER, said("same"), {"role": "user", "content": "and"}]
  (row,) = preferences(
    write, {"chosen": [*more, said("a")], "rejected": [*more, said("b")]}
  )
  assert row.prompt == (
    "\n\nHuman: q\n\nAssistant: same\n\nHuman: and\n\nAssistant:"
  )


def test_margin_and_group(write):
  rows = preferences(
    write,
    {"chosen": HEAD + "a", "rejected": HEAD + "b", "margin": 1.5, "group": "x"},
    {"chosen": HEAD + "a", "rejected": HEAD + "b", "margin": "2"},
  )
  assert [(row.margin, row.group) for row in rows] == [(1.5, "x"), (2.0, "")]


def test_equal_pairs_are_dropped_and_counted(write):
  good = {"chosen": HEAD + " a", "rejected": HEAD + " b"}
  same = {"chosen": HEAD + " a", "rejected": HEAD + " a\n"}
  found = formats.load_preferences(write([good, same, same]))
  assert len(found.rows) == 1
  assert found.dropped == (("without a preference", 2),)
  assert str(found) == ("1 rows from 3 (left out: 2 without a preference)")
  with pytest.raises(
    UserError, match=r"is left of 1 rows \(1 without a preference, 0 bad\)"
  ):
    formats.load_preferences(write([same]))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("answer", ["", " \n"])
def test_pairs_with_an_empty_answer_are_dropped_and_counted(
  write, side, answer
):
  good = {"chosen": HEAD + " a", "rejected": HEAD + " b"}
  empty = good | {side: HEAD + answer}
  found = formats.load_preferences(write([good, empty, empty]))
  assert found.rows == (PreferenceRow(HEAD, " a", " b"),)
  assert str(found) == "1 rows from 3 (left out: 2 empty)"
  both = {"chosen": HEAD, "rejected": HEAD}
  with pytest.raises(UserError, match=r"of 2 rows \(2 empty, 0 bad\)"):
    formats.load_preferences(write([empty, both]))


def test_what_no_pair_can_be_made_of_gives_no_labelled_rows(write):
  good = {"chosen": HEAD + " a", "rejected": HEAD + " b"}
  same = {"chosen": HEAD + " a", "rejected": HEAD + " a"}
  empty = {"chosen": HEAD + " a", "rejected": HEAD}
  rows = [good, same, empty, {"prompt": "p", "completion": " ", "label": 1}]
  found = formats.load_completions(write(rows), need="label")
  assert [row.label for row in found.rows] == [True, False]
  assert str(found) == (
    "2 rows from 4 (left out: 2 empty, 1 without a preference)"
  )
  # For SFT the chosen answer is all that counts.
  assert len(formats.load_completions(write([same, empty])).rows) == 2


def test_webgpt_comparisons(write):
  """The better score is chosen, citations go, a tie is no preference."""
  row = {
    "question": {"full_text": "Why?", "id": "x"},
    "answer_0": "So [1]. And so [2, 3].",
    "answer_1": "No.",
  }
  path = write([row | {"score_0": a, "score_1": -a} for a in (0.5, -0.5, 0.0)])
  found = formats.load_preferences(path)
  question = "Question: Why? Answer:"
  assert found.rows == (
    PreferenceRow(question, " So. And so.", " No."),
    PreferenceRow(question, " No.", " So. And so."),
  )
  assert found.dropped == (("without a preference", 1),)
  joined = templates.join(question, found.rows[0].rejected)
  assert joined == "Question: Why? Answer: No."


def test_chat_template_writes_role_lists_only(write, tiny_chat):
  turns, text = preferences(
    write,
    {"chosen": [USER, said("a")], "rejected": [USER, said("b")]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    tokenizer=tiny_chat,
  )
  assert turns == PreferenceRow("[user]q</s>[assistant]", "a</s>", "b</s>")
  assert text == PreferenceRow("q", "a", "b")


def test_completions_of_every_format(write):
  rows = completions(
    write,
    {"prompt": HEAD, "completion": " a"},
    {"prompt": [USER], "completion": [said("a")]},
    {"messages": [USER, said("a")]},
    {"chosen": HEAD + " a", "rejected": HEAD + " b"},
    {"text": HEAD + " a"},
  )
  assert rows[0] == CompletionRow(HEAD, " a")
  assert rows[0] == rows[1] == rows[2] == rows[3]
  assert rows[4] == CompletionRow("", HEAD + " a")


def test_labels_and_their_spellings(write):
  values = [True, False, 1, 0, "True", "false", "1", 0.0]
  rows = completions(
    write,
    *({"prompt": "p", "completion": "c", "label": v} for v in values),
    need="label",
  )
  assert [row.label for row in rows] == [
    True, False, True, False, True, False, True, False,
  ]  # fmt: skip


def test_a_preference_is_two_labelled_rows(write):
  rows = completions(
    write, {"chosen": HEAD + " a", "rejected": HEAD + " b"}, need="label"
  )
  assert [(row.completion, row.label) for row in rows] == [
    (" a", True),
    (" b", False),
  ]


def test_empty_answers_are_dropped_and_counted(write):
  path = write([{"prompt": HEAD, "completion": c} for c in ("a", " ", "")])
  found = formats.load_completions(path)
  assert len(found.rows) == 1
  assert found.dropped == (("empty", 2),)
  with pytest.raises(UserError, match=r"nothing is left of 1 rows \(1 empty"):
    formats.load_completions(write([{"prompt": HEAD, "completion": " "}]))


GOOD = {"prompt": "p", "completion": "c", "reward": 1, "label": 1}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompt": None}, "nothing in prompt, need a string or a list"),
    ({"completion": 3}, "a int in completion, need a string or a list"),
    ({"prompt": [USER]}, ":2 mixes a string and a list of messages"),
    ({"prompt": [], "completion": []}, "no messages in prompt"),
    ({"prompt": [{"role": "u"}], "completion": [USER]}, "needs role and cont"),
    (
      {"prompt": [{"role": "tool", "content": "x"}], "completion": [USER]},
      "role 'tool' in prompt, need system, user, assistant",
    ),
    ({"completion": "\ud800"}, "half a Unicode character in completion"),
    ({"reward": "high"}, "'high' in reward, need a number"),
    ({"reward": float("nan")}, "nan in reward, need a finite number"),
    ({"reward": None}, "has no reward"),
  ],
)
def test_bad_values_name_the_line_and_the_rule(write, change, message):
  path = write([GOOD, GOOD | change])
  with pytest.raises(UserError, match=message) as told:
    formats.load_completions(path, need="reward")
  assert str(told.value).startswith(f"{path}:2 ")


@pytest.mark.parametrize(
  ("label", "message"),
  [
    ("maybe", "has 'maybe' in label, need true or false (1 and 0 do as well)"),
    (-1, "has -1 in label, need true or false"),
    (4.5, "turn grades into these first, say label = grade > 3"),
    ([True], "has [True] in label, need true or false"),
    (None, "has no label"),
    ("", "has no label"),
  ],
)
def test_bad_labels_name_the_line_the_value_and_what_to_do(
  write, label, message
):
  path = write([GOOD, GOOD | {"label": label}])
  with pytest.raises(UserError) as told:
    formats.load_completions(path, need="label")
  assert str(told.value).startswith(f"{path}:2 ")
  assert message in str(told.value)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"chosen": "a", "rejected": "b"}, r"no \\n\\nAssistant: that chosen and"),
    (
      {"chosen": HEAD + " a", "rejected": HEAD.replace("q", "p") + " b"},
      "so no prompt; write it into a column prompt",
    ),
    # Another question, none at all, a question that only one of them has.
    (
      {"chosen": [USER, said("a")], "rejected": [SYSTEM, said("b")]},
      "no turns before the completions that chosen and rejected share",
    ),
    ({"chosen": [said("a")], "rejected": [said("b")]}, "share, so no prompt"),
    (
      {"chosen": [SYSTEM, USER, said("a")], "rejected": [SYSTEM, said("b")]},
      "share, so no prompt; write it into a column prompt",
    ),
    (
      {
        "prompt": "q",
        "chosen": [USER, said("a")],
        "rejected": [{"role": "user", "content": "p"}, said("b")],
      },
      "share, so no prompt",
    ),
    (
      {
        "prompt": [USER],
        "chosen": [{"role": "user", "content": "p"}, said("a")],
        "rejected": [USER, said("b")],
      },
      "a user turn first in chosen, after a prompt that ends with one",
    ),
    ({"chosen": HEAD + "a"}, "has no column rejected"),
    ({"chosen": [USER], "rejected": "b"}, "mixes a string and a list"),
    (
      {"chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
      "ShareGPT message",
    ),
    ({"chosen": HEAD + "a", "rejected": HEAD + "b", "margin": "x"}, "margin"),
  ],
)
def test_bad_preferences(write, row, message):
  good = {"chosen": HEAD + " a", "rejected": HEAD + " b"}
  path = write([good, row])
  with pytest.raises(UserError, match=message):
    formats.load_preferences(path)


def test_bad_rows_up_to_the_share_are_logged(write, caplog):
  path = write([GOOD] * 9 + [{"prompt": "p"}])
  with caplog.at_level(logging.WARNING):
    found = formats.load_completions(path, max_bad_share=0.1)
  assert len(found.rows) == 9
  assert found.bad == (f"{path}:10 has no column completion",)
  assert f"{path}:10" in caplog.text


@pytest.mark.parametrize(
  ("load", "bad"),
  [(formats.load_completions, {"prompt": "p"}), (load_prompts, {"prompt": ""})],
)
def test_unreadable_lines_and_bad_rows_share_one_limit(
  write, caplog, load, bad
):
  path = write("\n".join([json.dumps(GOOD)] * 8 + ["{", json.dumps(bad)]))
  found = load(path, max_bad_share=0.2)
  assert len(found.bad) == 2
  assert found.read == 10
  assert caplog.text.count("2 of 10 rows") == 1
  assert caplog.text.count("WARNING") == 1
  with pytest.raises(UserError, match=r"rows.jsonl:9 .*2 of 10 rows"):
    load(path, max_bad_share=0.1)


def test_halves_are_disjoint_in_every_source(write):
  def rows(name):
    return [
      {"prompt": "p", "chosen": f"{name}{i}", "rejected": "z"} for i in range(5)
    ]

  source = f"{write(rows('a'), 'a.jsonl')},{write(rows('b'), 'b.jsonl')}"
  first, second = (
    [r.chosen for r in formats.load_preferences(source, part=part).rows]
    for part in ("first", "second")
  )
  assert first == ["a0", "a1", "b0", "b1"]
  assert second == ["a2", "a3", "a4", "b2", "b3", "b4"]
  with pytest.raises(UserError, match="part must be one of all, first, secon"):
    formats.load_preferences(source, part="third")


@pytest.mark.parametrize(
  ("name", "read", "equal", "empty", "played_on"),
  [
    ("harmless-base", 1156, 0, 4, 0),
    ("helpful-base", 1177, 1, 2, 7),
    ("helpful-online", 1137, 2, 3, 0),
    ("helpful-rejection-sampled", 2747, 32, 0, 3),
  ],
)
def test_hh_rows(shared_data, name, read, equal, empty, played_on):
  """Every row parses; prompts end at a delimiter and parts add up."""
  source = f"{shared_data}/hh:{name}"
  found = formats.load_preferences(source, split="test", max_bad_share=0.0)
  assert found.read == read
  counts = {"empty": empty, "without a preference": equal}
  assert dict(found.dropped) == {k: n for k, n in counts.items() if n}
  simulated = 0
  for row in found.rows:
    assert row.prompt.startswith(templates.HUMAN)
    assert row.prompt.endswith(templates.ASSISTANT)
    simulated += any(
      templates.ASSISTANT in answer for answer in (row.chosen, row.rejected)
    )
  assert simulated == played_on


def test_instructions_with_and_without_context(write):
  bare, given = completions(
    write,
    {"instruction": "q", "context": "", "response": "a", "category": "qa"},
    {"instruction": "q", "context": "c", "response": "a "},
  )
  assert bare == CompletionRow(HEAD, " a", group="qa")
  assert given == CompletionRow("\n\nContext: c" + HEAD, " a")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
  ("suffix", "change", "message"),
  [
    ("", {"instruction": None}, ":2 has nothing in instruction, need a string"),
    ("", {"context": ["c"]}, ":2 has a list in context, need a string"),
    (
      "@alpaca",
      {"instruction": None},
      "alpaca .ValueError: the instruction is",
    ),
  ],
)
def test_instructions_that_are_not_text(
  write, tiny_chat, chat, suffix, change, message
):
  good = {"instruction": "q", "response": "a", "output": "a"}
  path = write([good, good | change]) + suffix
  with pytest.raises(UserError, match=message):
    formats.load_completions(path, tokenizer=tiny_chat if chat else None)


@pytest.mark.parametrize(
  ("value", "name"),
  [("alice", "alice"), (" Jane Doe ", "Jane Doe"), (3, "3"), (3.0, "3")],
)
def test_who_judged_a_row(write, value, name):
  row = {"prompt": HEAD, "chosen": " a", "rejected": " b", "who": value}
  (found,) = preferences(write, row, group="who")
  assert found.group == name
  row = {"prompt": HEAD, "completion": " a", "reward": 1, "who": value}
  (found,) = completions(write, row, need="reward", group="who")
  assert found.group == name


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (None, "has no who, which has to say who judged it"),
    (" ", "has no who, which has to say who judged it"),
    (True, "has True in who, need a name or a whole number"),
    (0.5, "has 0.5 in who, need a name or a whole number"),
    (["a"], "has ['a'] in who, need a name or a whole number"),
    ("a=b", "has 'a=b' in who; the name of a group is one line without any"),
    ("a\nb", "has 'a\\nb' in who; the name of a group is one line"),
  ],
)
def test_bad_groups(write, value, message):
  row = {"prompt": HEAD, "chosen": " a", "rejected": " b", "who": "x"}
  path = write([row, row | {"who": value}])
  with pytest.raises(UserError) as error:
    formats.load_preferences(path, group="who")
  assert f"{path}:2 {message}" in str(error.value)


def test_rows_without_the_column_of_groups(write):
  row = {"prompt": HEAD, "chosen": " a", "rejected": " b"}
  with pytest.raises(UserError) as error:
    formats.load_preferences(write([row]), group="annotator")
  assert str(error.value).endswith(
    "has the columns (chosen, prompt, rejected), need (prompt, chosen, "
    "rejected, annotator) or (chosen, rejected, annotator) or (question, "
    "answer_0, answer_1, score_0, score_1, annotator); nearest format: add the "
    "column annotator"
  )
  path = write([row | {"annotator": "x"}, row])
  with pytest.raises(UserError, match="2 has no column annotator") as error:
    formats.load_preferences(path, group="annotator")
  assert "it has (chosen, prompt, rejected)" in str(error.value)


TOOLS = [{"name": "add"}]
RICH = (
  "{% if tools %}[{{ tools|length }} tools]{% endif %}"
  "{% for m in messages %}[{{ m.role }}]"
  "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
  "{% if m.tool_calls %}<{{ m.tool_calls[0].name }}>{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_template_is_given_whole_messages(write, make_tiny):
  """Other keys, calls of tools, other roles, None where a table has gaps."""
  tokenizer = make_tiny(template=RICH)
  answer = {
    "role": "assistant",
    "content": "4",
    "thinking": "2+2",
    "name": None,
  }
  call = {"role": "assistant", "content": None, "tool_calls": TOOLS}
  path = write(
    [
      {"messages": [USER, answer]},
      {"messages": [USER, call], "tools": TOOLS},
      {"messages": [USER, {"role": "tool", "content": "4"}, said("a")]},
      {"messages": [USER, said("a") | {"weight": 0}]},
    ]
  )
  found = formats.load_completions(path, tokenizer=tokenizer)
  assert [(row.prompt, row.completion) for row in found.rows] == [
    ("[user]q[assistant]", "(2+2)4"),
    ("[1 tools][user]q[assistant]", "<add>"),
    ("[user]q[tool]4[assistant]", "a"),
  ]
  assert found.dropped == (("empty", 1),)


@pytest.mark.parametrize(
  ("row", "template", "wrong"),
  [
    (
      {"thinking": "x"},
      None,
      "has thinking in a message of messages, which",
    ),
    ({"weight": 0.5}, RICH, "has the weight 0.5 in messages; a turn is"),
    ({"images": ["x"]}, RICH, "has images in a message, which the chat"),
    ({"role": "tool"}, None, "has the role 'tool' in messages, need system"),
  ],
)
def test_what_cannot_be_written_is_a_mistake(
  write, make_tiny, row, template, wrong
):
  path = write([{"messages": [USER | row, said("a")]}])
  with pytest.raises(UserError, match=wrong):
    formats.load_completions(path, tokenizer=make_tiny(template=template))


@pytest.mark.parametrize(
  ("columns", "wrong"),
  [
    ({"tools": "none"}, "has 'none' in tools, need JSON"),
    ({"tools": {"a": 1}}, "has a dict in tools, need a list"),
    ({"chat_template_kwargs": {"tokenize": True}}, "tokenize in chat_template"),
    (
      {"messages": [USER | {"content": [1]}, said("a")]},
      "refuses the messages",
    ),
  ],
)
def test_settings_of_a_template_that_are_mistakes(
  write, make_tiny, columns, wrong
):
  template = "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}"
  path = write([{"messages": [USER, said("a")]} | columns])
  with pytest.raises(UserError, match=wrong):
    formats.load_completions(path, tokenizer=make_tiny(template=template))


def test_parts_of_text_are_text_where_a_template_knows_no_parts(
  write, make_tiny
):
  def parts(text):
    return [{"type": "text", "text": x} for x in text]

  row = [USER | {"content": parts("ab")}, said("c") | {"content": parts("de")}]
  path = write([{"messages": row}])
  knows = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{{ p.text }};{% endfor %}{% endfor %}"
  )
  for template, whole in (
    (RICH, "[user]ab[assistant]de"),
    (None, " ab"),
    (knows, "[user]a;b;[assistant]d;e;"),
  ):
    tokenizer = make_tiny(template=template)
    (found,) = formats.load_completions(path, tokenizer=tokenizer).rows
    assert whole in found.prompt + found.completion
  image = [{"messages": [USER | {"content": [{"type": "image"}]}, said("a")]}]
  with pytest.raises(UserError, match="a part in messages that is no text"):
    formats.load_completions(write(image), tokenizer=make_tiny(template=RICH))


def test_a_template_that_cannot_do_without_reads_it(write, make_tiny):
  """Also: no tools, as text; what is aside does not part two dialogues."""
  template = (
    "{% for m in messages %}{% if not m.content and not m.tool_calls %}"
    "{{ raise_exception('empty') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}"
  )
  call = {"role": "assistant", "content": "", "tool_calls": TOOLS}
  path = write([{"messages": [USER, call, said("a")], "tools": "[]"}])
  tokenizer = make_tiny(template=template)
  assert len(formats.load_completions(path, tokenizer=tokenizer).rows) == 1
  path = write(
    [
      {
        "chosen": [USER | {"id": 1}, said("a") | {"date": "today"}],
        "rejected": [USER | {"id": 2}, said("b")],
      }
    ]
  )
  assert len(formats.load_preferences(path, tokenizer=tokenizer).rows) == 1


def test_tools_that_a_template_leaves_out_are_a_mistake(write, tiny_chat):
  path = write([{"messages": [USER, said("a")], "tools": TOOLS}])
  with pytest.raises(UserError, match="has tools, which the chat template"):
    formats.load_completions(path, tokenizer=tiny_chat)


ASK = {"role": "user", "content": "more"}
TOOL = {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "content": None, "tool_calls": TOOLS}
MARKED = (
  "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
  "{{ m.content }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Only the last turn keeps its thoughts, as in Qwen3's.
REWRITES = (
  "{% for m in messages %}[{{ m.role }}]{% if m.thinking and loop.last %}"
  "({{ m.thinking }}){% endif %}{{ m.content }}</s>{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def trained(row):
  text = templates.join(row.prompt, row.completion)
  assert not row.turns or row.turns[0][0] == len(row.prompt)
  return text, [text[a:b] for a, b in row.turns]


def every_turn(write, row, tokenizer=None):
  path = write([row])
  return formats.load_completions(path, tokenizer=tokenizer, every_turn=True)


@pytest.mark.parametrize("template", [None, RICH, MARKED])
def test_every_assistant_turn_is_marked(write, make_tiny, template):
  """System, user and what follows the last turn are not."""
  row = {"messages": [SYSTEM, USER, said("a"), ASK, said(" b\n"), ASK]}
  tokenizer = make_tiny(template=template)
  (made,) = every_turn(write, row, tokenizer).rows
  text, turns = trained(made)
  if template is None:
    assert text == f"s{HEAD} a\n\nHuman: more\n\nAssistant: b"
    assert turns == [" a", " b"]
  else:
    end = "</s>" if template == MARKED else ""
    assert turns == [f"a{end}", f" b\n{end}"]
    assert text == tokenizer.render_chat(row["messages"][:-1])


@pytest.mark.parametrize(
  ("messages", "said_by_it"),
  [
    ([USER, CALL, TOOL, said("a")], ["<add>", "a"]),
    ([USER, said("a") | {"weight": 0}, ASK, said("b")], ["b"]),
    ([USER, said("a"), ASK, said("b") | {"weight": 0}], ["a"]),
    ([USER, said("a") | {"train": False}, ASK, said("b")], ["b"]),
    ([USER, said(""), ASK, said("b")], ["b"]),
    ([said("hello"), USER, said("a")], ["hello", "a"]),
  ],
)
def test_tools_weights_and_first_words(write, make_tiny, messages, said_by_it):
  tokenizer = make_tiny(template=RICH)
  (made,) = every_turn(write, {"messages": messages}, tokenizer).rows
  assert trained(made)[1] == said_by_it
  # A completion that is a list has turns; the prompt's are not learned again.
  both = {"prompt": [USER, said("x")], "completion": messages}
  (made,) = every_turn(write, both, tokenizer).rows
  assert trained(made)[1] == said_by_it


def test_the_marks_of_a_template_are_transformers(write, make_tiny):
  tokenizer = make_tiny(template=MARKED)
  messages = [USER, said("a"), ASK, said("b")]
  (made,) = every_turn(write, {"messages": messages}, tokenizer).rows
  (row,) = encode.encode_rows(
    tokenizer,
    [made.prompt],
    [made.completion],
    max_length=99,
    turns=[made.turns],
    train_eos=True,
  ).rows
  theirs = tokenizer.inner.apply_chat_template(
    messages, return_dict=True, return_assistant_tokens_mask=True
  )
  assert list(row.ids) == theirs["input_ids"]
  assert list(row.loss_mask) == [x == 1 for x in theirs["assistant_masks"]]


def test_a_template_that_rewrites_turns_gives_a_row_for_each(write, make_tiny):
  """Written as they are sampled; said in the line that a run prints."""
  tokenizer = make_tiny(template=REWRITES)
  messages = [USER, said("a") | {"thinking": "x"}, ASK, said("b")]
  found = every_turn(write, {"messages": messages}, tokenizer)
  assert [trained(row) for row in found.rows] == [
    ("[user]q</s>[assistant](x)a</s>", ["(x)a</s>"]),
    ("[user]q</s>[assistant]a</s>[user]more</s>[assistant]b</s>", ["b</s>"]),
  ]
  assert str(found) == (
    "2 rows from 1; the chat template rewrites earlier turns of 1 dialogues, "
    "so each of their turns is a row"
  )


def test_dialogues_without_a_turn_to_learn(write, make_tiny):
  silent = {"messages": [USER, said("a") | {"weight": 0}]}
  path = write([silent, {"messages": [USER, said("a")]}])
  found = formats.load_completions(path, every_turn=True)
  assert found.dropped == (("empty", 1),)
  with pytest.raises(UserError, match="has no message of the assistant to le"):
    every_turn(write, {"messages": [USER]})
  # Marks that fit the turns in number say whose they are.
  template = MARKED.replace("{% generation %}", "{% generation %}(", 1)
  half = template.replace("== 'assistant'", "== 'nobody'")
  row = {"messages": [*silent["messages"], ASK, said("b")]}
  with pytest.raises(UserError, match="has 2 assistant turns of which 1 are"):
    every_turn(write, row, make_tiny(template=half))
