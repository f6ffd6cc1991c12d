r"""How conversations are written as text: one choice for all that reads them.

| name              | a question and its answer                               |
|-------------------|---------------------------------------------------------|
| `chat`            | as the tokenizer's chat template writes them            |
| `human_assistant` | `\n\nHuman: question\n\nAssistant: answer`, SuperHF's   |
| `raw`             | the texts as they are; there are no turns               |

A format also says where an answer ends: at the special tokens with which its
template closes or opens a turn, or, where these are plain text, at that text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxalign.data.converters import Row
from jaxalign.text import templates
from jaxalign.text.templates import ASSISTANT, HUMAN, Message

# A transformers.PreTrainedTokenizerBase. Its import takes seconds, so the class
# is not named here, where every annotation is evaluated in the test run.
HFTokenizer = Any

NAMES = ("chat", "human_assistant", "raw")
# What `templates.from_messages` writes, for transformers.
HUMAN_ASSISTANT_TEMPLATE = (
  "{% for message in messages %}"
  "{% if message['role'] == 'system' %}{{ message['content'] }}"
  "{% elif message['role'] == 'user' %}"
  "{{ '\\n\\nHuman: ' + message['content'] }}"
  "{% elif message['role'] == 'assistant' %}"
  "{{ '\\n\\nAssistant: ' + message['content'] }}"
  "{% else %}{{ raise_exception('roles are system, user and assistant') }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
# What a template is asked to write, to see what it puts around it.
_QUESTION, _ANSWER = "Whoisasked", "Whoanswers"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """A format of conversations.

  Attributes:
    name: one of NAMES.
    turns: texts that open a turn; a completion is cut at the first of them.
    ends: special tokens that close or open a turn, as ids; a completion ends at
      them.
    plain: plain strings of data sets are turns too, as in `prompt="2+2="`.
      Otherwise only dialogues are written in this format.
    parts: its template writes contents that are lists of parts.
    opens: how texts begin that its template has written.
  """

  name: str
  turns: tuple[str, ...] = ()
  ends: tuple[int, ...] = ()
  plain: bool = False
  parts: bool = False
  opens: tuple[str, ...] = ()


DIALOGUE = PromptFormat("human_assistant", (HUMAN, ASSISTANT))
RAW = PromptFormat("raw")


def of_tokenizer(inner: HFTokenizer) -> PromptFormat:
  """The format of its chat template; without one, SuperHF's delimiters."""
  if not inner.chat_template or (
    inner.chat_template == HUMAN_ASSISTANT_TEMPLATE
  ):
    return DIALOGUE
  parts, opens = _writes_parts(inner), _openings(inner)
  # Between the turns of a made-up dialogue stands what closes and opens them.
  asked = {"role": "user", "content": _QUESTION}
  answered = {"role": "assistant", "content": _ANSWER}
  try:
    text = inner.apply_chat_template(
      [asked, answered, {"role": "user", "content": "again"}], tokenize=False
    )
    _, rest = text.split(_QUESTION)
    opens_answer, rest = rest.split(_ANSWER)
    opens_question = rest[: rest.rindex("again")]
  # A template may refuse this dialogue, or write it in some other way.
  except Exception:
    return PromptFormat("chat", parts=parts, opens=opens)
  # Special tokens have an id; decoding leaves them out of a text.
  special = dict(
    zip(inner.all_special_tokens, inner.all_special_ids, strict=True)
  )
  for i, token in inner.added_tokens_decoder.items():
    if token.special:
      special[str(token)] = i
  turns, ends = [], []
  for opening in (opens_question, opens_answer):
    at = {t: p for t in special if (p := opening.find(t)) >= 0}
    first = min(at, key=lambda token: (at[token], -len(token)), default="")
    before = opening[: at[first]] if first else opening
    if before.strip():
      turns.append(before.rstrip())
    elif first:
      ends.append(special[first])
  return PromptFormat(
    "chat",
    tuple(dict.fromkeys(turns)),
    tuple(dict.fromkeys(ends)),
    parts=parts,
    opens=opens,
  )


def _openings(inner: HFTokenizer) -> tuple[str, ...]:
  """What a template writes before a first question and a first system text."""
  question = {"role": "user", "content": _QUESTION}
  system = {"role": "system", "content": _ANSWER}
  openings = []
  for messages in ([question], [system, question]):
    try:
      text = inner.apply_chat_template(messages, tokenize=False)
    except Exception:  # it may refuse them
      continue
    openings.append(text.partition(messages[0]["content"])[0])
  return tuple(opening for opening in openings if opening.strip())


def _writes_parts(inner: HFTokenizer) -> bool:
  """Whether a chat template knows parts; others write a list as Python does."""
  part = {"type": "text", "text": _QUESTION}
  try:
    text = inner.apply_chat_template(
      [{"role": "user", "content": [part]}], tokenize=False
    )
  except Exception:  # as above
    return False
  return _QUESTION in text and str(part) not in text and "'text'" not in text


def with_system(row: Row, system: str) -> Row:
  """A row of a data set with a system text before its prompt.

  Args:
    row: with a prompt, or with dialogues that begin with theirs.
    system: text; dialogues with a system turn keep their own.
  """
  names = ("prompt",)
  # Role lists of both completions may hold the prompt as well (UltraFeedback).
  if row.get("prompt") is None or (
    isinstance(row["prompt"], str) and isinstance(row.get("chosen"), list)
  ):
    names = ("chosen", "rejected", "messages", "question")
  new: Row = {}
  for name in names if system else ():
    value = row.get(name)
    if isinstance(value, str):
      new[name] = system + value
    elif isinstance(value, dict) and isinstance(value.get("full_text"), str):
      new[name] = value | {"full_text": system + value["full_text"]}  # WebGPT
    elif isinstance(value, list) and value and isinstance(value[0], dict):
      own = value[0].get("role") == "system"
      first = [] if own else [{"role": "system", "content": system}]
      new[name] = first + value
  return row | new


def turns_of(text: str) -> list[Message]:
  """A text as turns: those of a dialogue, or one question."""
  if HUMAN in text:
    return templates.to_messages(text)
  return [{"role": "user", "content": text.strip()}]


def answer_of(text: str) -> list[Message]:
  """A completion as turns: the answer, and what it goes on to say as others."""
  return templates.to_messages(f"{ASSISTANT} {text}")


def in_turns(row: Row, form: PromptFormat) -> Row:
  """A row of a data set with its dialogues as role lists.

  Role lists are what a format writes. Strings become role lists where they are
  a dialogue in the notation of SuperHF or an instruction with its response,
  or where the format takes every string for a turn; others stay.

  Args:
    row: with the columns `prompt, completion`, `[prompt,] chosen, rejected` or
      `instruction, response [, context]`.
    form: the format that will write them.
  """
  keeps = form.name == "human_assistant" and not form.plain
  if keeps or form.name == "raw":
    return row
  asked, answer = row.get("instruction"), row.get("response")
  context = row.get("context") or ""
  # Values that are not text are refused later.
  if (
    isinstance(asked, str)
    and isinstance(answer, str)
    and isinstance(context, str)
  ):
    if context.strip():
      asked = f"{asked}\n\nContext: {context}"
    new = {"prompt": turns_of(asked), "completion": answer_of(answer)}
    kept = ("instruction", "response", "context")
    return {k: x for k, x in row.items() if k not in kept} | new
  names = ("chosen", "rejected") if "chosen" in row else ("completion",)
  answers: Sequence[object] = [row.get(name) for name in names]
  prompt = row.get("prompt")
  if not all(isinstance(answer, str) for answer in answers):
    return row
  if prompt is None and len(names) == 2:
    parts = templates.split_pair(*map(str, answers))
    if parts is None:
      return row
    prompt, *answers = parts
  if not isinstance(prompt, str) or not (form.plain or HUMAN in prompt):
    return row
  made = {n: answer_of(str(a)) for n, a in zip(names, answers, strict=True)}
  return row | {"prompt": turns_of(prompt)} | made
