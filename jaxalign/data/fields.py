"""The values of one row: text, role lists, numbers, truth values."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from jaxalign.core.types import JsonObject
from jaxalign.data.sources import Row
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.text import templates

# JSON may escape half of a surrogate pair, which has no UTF-8 form.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
# What separates groups in flags (a=1,b=2) and in metric names (group/name).
_RESERVED = re.compile(r"[,=/\[\]]")
_CITATION = re.compile(r"\s*\[\d+(?:,\s*\d+)*\]")

Made = TypeVar("Made")
ROLES = ("system", "user", "assistant")  # what the role delimiters can write
# Keys of a message that a model was meant to read or write. Others, such as
# dates, are handed to the template as well, which may leave them out.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAINED = ("train", "training")  # Axolotl's names for a weight of 0 or 1
_READ = (
  "tool_calls",
  "function_call",
  *_REASONING,
  "documents",
  "images",
  "audio",
  "videos",
)
# What `Tokenizer.render_chat` sets itself.
_RESERVED_SETTINGS = ("messages", "reply", "tokenize", "add_generation_prompt")


class Answers(NamedTuple):
  """A text, and what of it the assistant says."""

  prompt: str  # up to the first turn to learn from
  completion: str  # the rest
  turns: tuple[tuple[int, int], ...] = ()  # as `CompletionRow.turns`


class BadRow(UserError):
  """One row cannot be used; the message follows its place."""


@contextlib.contextmanager
def noting(problems: list[str], place: str) -> Iterator[None]:
  """Notes what is wrong with a row, as `file:line what`, and goes on.

  A chat template that refuses one dialogue is a bad row too.
  """
  try:
    yield
  except UserError as err:
    problems.append(f"{place} {err}")


def check_text(value: object, column: str) -> str:
  """The text itself, if it can be tokenised and written to a file."""
  if not isinstance(value, str):
    raise BadRow(f"has {_kind(value)} in {column}, need a string")
  if _SURROGATE.search(value):
    raise BadRow(f"has half a Unicode character in {column}")
  return value


def messages_of(
  value: object, column: str, tokenizer: Tokenizer | None
) -> list[templates.Message]:
  """A role list; other roles and keys are left to a chat template.

  Without one, roles are user, assistant and system. Contents are text; parts of
  text become one, unless the template knows parts.
  """
  has_template = tokenizer is not None and tokenizer.has_chat_template
  if not value:
    raise BadRow(f"has no messages in {column}")
  if not isinstance(value, list):
    raise BadRow(f"has {_kind(value)} in {column}, need a list of messages")
  # A format that is no template knows none.
  parts = tokenizer is not None and tokenizer.format.parts
  value = value if parts else [_join_parts(turn) for turn in value]
  for turn in value:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
      raise BadRow(f"needs role and content in every message of {column}")
    content = turn["content"]
    if isinstance(content, str):
      check_text(content, column)
    elif not parts and _is_parts(content):
      raise BadRow(
        f"has a part in {column} that is no text, which the format of "
        "conversations cannot write"
      )
    elif not (has_template and (content or turn.get("tool_calls"))):
      raise BadRow(f"has a message without text in {column}")
    if turn.get("weight") not in (None, 0, 1):
      raise BadRow(
        f"has the weight {turn['weight']!r:.20} in {column}; a turn is trained "
        "(1) or read alone (0)"
      )
    more = [key for key in turn if key in _READ and turn[key]]
    if not has_template and turn["role"] not in ROLES:
      raise BadRow(
        f"has the role {turn['role']!r} in {column}, need {', '.join(ROLES)}, "
        "or a tokenizer with a chat template"
      )
    if not has_template and more:
      raise BadRow(
        f"has {more[0]} in a message of {column}, which only a tokenizer with "
        "a chat template can write"
      )
  # Tables write None where other rows have a value.
  return [
    {key: x for key, x in turn.items() if x is not None}
    | {"content": turn["content"] or ""}
    | ({"weight": 0} if any(turn.get(x) is False for x in _TRAINED) else {})
    for turn in value
  ]


def _join_parts(turn: Any) -> Any:  # a row of the user's
  """A turn whose parts of text are one; other turns as they are."""
  if not isinstance(turn, dict) or not _is_parts(turn.get("content")):
    return turn
  texts: list[str] = []
  for part in turn["content"]:
    text = part.get("text") if part["type"] == "text" else None
    if not isinstance(text, str):
      return turn
    texts.append(text)
  return turn | {"content": "".join(texts)}


def _is_parts(content: object) -> bool:
  """Whether a content is a list of parts, each of a type."""
  return (
    isinstance(content, list)
    and bool(content)
    and all(isinstance(part, dict) and "type" in part for part in content)
  )


def settings_of(row: Row) -> JsonObject:
  """A row's settings for the chat template: `tools` and the like."""
  settings = dict(_decoded(row, "chat_template_kwargs", dict) or {})
  for name in _RESERVED_SETTINGS:
    if name in settings:
      raise BadRow(f"has {name} in chat_template_kwargs, which is set already")
  if tools := _decoded(row, "tools", list):
    settings["tools"] = tools
  return settings


def _decoded(row: Row, column: str, kind: type[Made]) -> Made | None:
  """A column that holds JSON, decoded or as text; None where it is empty."""
  value = row.get(column)
  if isinstance(value, str) and value.strip():
    try:
      value = json.loads(value)
    except ValueError:
      raise BadRow(f"has {value[:40]!r} in {column}, need JSON") from None
  if not value:
    return None
  if not isinstance(value, kind):
    raise BadRow(f"has {_kind(value)} in {column}, need a {kind.__name__}")
  return value


def render(
  messages: list[templates.Message],
  tokenizer: Tokenizer | None,
  reply: bool = False,
  settings: JsonObject | None = None,
) -> str:
  """A role list as text, by the chat template or the role delimiters."""
  by_template = tokenizer is not None and tokenizer.has_chat_template
  if settings and not by_template:
    raise BadRow(
      f"has {', '.join(settings)}, which only a tokenizer with a chat template "
      "can write"
    )
  if tokenizer is None:
    return templates.from_messages(messages, reply)
  return tokenizer.render_chat(messages, reply, settings)


def text_of(
  value: object, column: str, tokenizer: Tokenizer | None, reply: bool = False
) -> str:
  """A string as it is, or a role list rendered.

  Args:
    value: of the column.
    column: its name, for messages.
    tokenizer: its chat template is used, if any.
    reply: end with the assistant's delimiter, unless the last turn is its own.
  """
  if isinstance(value, str):
    return check_text(value, column)
  if not isinstance(value, list):
    raise BadRow(
      f"has {_kind(value)} in {column}, need a string or a list of messages"
    )
  messages = messages_of(value, column, tokenizer)
  reply = reply and messages[-1]["role"] != "assistant"
  return render(messages, tokenizer, reply)


def _kind(value: object) -> str:
  if isinstance(value, dict) and "from" in value:
    return "a ShareGPT message (write role and content, in a list)"
  return "nothing" if value is None else f"a {type(value).__name__}"


def _without(
  prompt: list[templates.Message],
  completion: list[templates.Message],
  column: str,
) -> list[templates.Message]:
  """A completion's role list without the prompt, which it may repeat."""
  # A system turn may stand before the prompt alone.
  own = prompt[1:] if prompt[0]["role"] == "system" else prompt
  for repeated in (prompt, own):
    if repeated and completion[: len(repeated)] == repeated:
      return completion[len(repeated) :]
  roles = [turn["role"] for turn in (prompt[-1], *completion[:1])]
  if roles == ["user", "user"]:
    raise BadRow(
      f"has a user turn first in {column}, after a prompt that ends with one; "
      "write the prompt into the column prompt alone"
    )
  return completion


def _after(
  prompt: list[templates.Message],
  completion: list[templates.Message],
  tokenizer: Tokenizer | None,
  settings: JsonObject,
) -> tuple[str, str]:
  """Renders two role lists as the prompt's text and the completion's."""
  if not completion:
    raise BadRow("has no message in a completion")
  whole = render(prompt + completion, tokenizer, settings=settings)
  start = _start_of(
    prompt + completion, len(prompt), whole, tokenizer, settings
  )
  _refuse_unwritten(prompt + completion, tokenizer, settings, whole)
  if completion[-1].get("weight") == 0:
    return start, ""  # nothing to learn: it is left out and counted as empty
  if not whole.startswith(start):
    # Some templates rewrite earlier turns (Qwen3 drops their reasoning): cut
    # where the two texts first differ.
    alike = (a == b for a, b in zip(start, whole, strict=False))
    start = start[: sum(itertools.takewhile(bool, alike))]
  return start, whole[len(start) :]


def _start_of(
  messages: list[templates.Message],
  turn: int,
  whole: str,
  tokenizer: Tokenizer | None,
  settings: JsonObject,
) -> str:
  """The text before an answer, as the sampler would read it."""
  if turn:
    return render(messages[:turn], tokenizer, True, settings)
  # Nobody speaks before it; what opens an answer is not the assistant's either.
  first = render(messages[:1], tokenizer, settings=settings)
  header = render(messages[:1], tokenizer, True, settings)[len(first) :]
  before, found, _ = whole.partition(header) if header else ("", "", "")
  return before + found if found else ""


def _refuse_unwritten(
  messages: list[templates.Message],
  tokenizer: Tokenizer | None,
  settings: JsonObject,
  whole: str,
) -> None:
  """A BadRow if the template leaves out what a model was meant to read."""

  def leaves_out(rest: list[templates.Message], settings: JsonObject) -> bool:
    try:
      return render(rest, tokenizer, settings=settings) == whole
    except UserError:  # it cannot do without, so it reads it
      return False

  for key in _READ:
    if any(turn.get(key) for turn in messages):
      rest = [{k: x for k, x in turn.items() if k != key} for turn in messages]
      if leaves_out(rest, settings):
        raise BadRow(
          f"has {key} in a message, which the chat template leaves out"
        )
  if "tools" in settings:
    others = {k: x for k, x in settings.items() if k != "tools"}
    if leaves_out(messages, others):
      raise BadRow("has tools, which the chat template leaves out")


def prompt_completion_of(
  row: Row, tokenizer: Tokenizer | None
) -> tuple[str, str]:
  """`(prompt, completion)` of a row; an empty prompt = train on all of it."""
  settings = settings_of(row)
  # One role list: the last turn is the completion.
  if "messages" in row:
    messages = messages_of(row["messages"], "messages", tokenizer)
    if messages[-1]["role"] != "assistant":
      raise BadRow("has messages that do not end with the assistant")
    return _after(messages[:-1], messages[-1:], tokenizer, settings)
  # Plain text, without a prompt.
  if "text" in row and "completion" not in row:
    return "", text_of(row["text"], "text", tokenizer)
  # Two columns, both text or both role lists.
  for column in ("prompt", "completion"):
    if column not in row:
      raise BadRow(f"has no column {column}")
  prompt, completion = row["prompt"], row["completion"]
  if isinstance(prompt, list) and isinstance(completion, list):
    shared = messages_of(prompt, "prompt", tokenizer)
    answer = messages_of(completion, "completion", tokenizer)
    answer = _without(shared, answer, "completion")
    return _after(shared, answer, tokenizer, settings)
  if isinstance(prompt, list) != isinstance(completion, list):
    raise BadRow("mixes a string and a list of messages")
  return (
    text_of(prompt, "prompt", tokenizer),
    text_of(completion, "completion", tokenizer),
  )


def answers_of(row: Row, tokenizer: Tokenizer | None) -> list[Answers]:
  """Every assistant turn of a row's role list, `messages` or `completion`.

  The parts come from the chat template's `{% generation %}` marks if it has
  them, else from what it writes of the first messages alone. Where it rewrites
  earlier turns once others follow (Qwen3 drops their reasoning), every turn
  becomes a row of its own, written as it would be sampled.

  Returns:
    One row; several where the template rewrites turns. Rows without a role list
    are those of `prompt_completion_of`, and train on all of the completion.
    Without any turn to learn from the completion is empty.
  """
  settings = settings_of(row)
  prompt: list[templates.Message] = []
  # Only the completion's turns count of a row that has both.
  if "messages" in row:
    messages = messages_of(row["messages"], "messages", tokenizer)
  elif all(isinstance(row.get(x), list) for x in ("prompt", "completion")):
    prompt = messages_of(row["prompt"], "prompt", tokenizer)
    completion = messages_of(row["completion"], "completion", tokenizer)
    messages = prompt + _without(prompt, completion, "completion")
  else:
    return [Answers(*prompt_completion_of(row, tokenizer))]
  turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  if not turns or turns[-1] < len(prompt):
    raise BadRow("has no message of the assistant to learn from")
  wanted = [i for i in turns if i >= len(prompt) and _teaches(messages[i])]
  if not wanted:
    return [Answers("", "")]
  # Nothing that is learned reads what comes after the last turn.
  messages = messages[: wanted[-1] + 1]
  if tokenizer is None or not tokenizer.has_chat_template:
    # As `templates.join` writes the last turn.
    messages = [
      m | {"content": m["content"].strip()} if m["role"] == "assistant" else m
      for m in messages
    ]
  whole = render(messages, tokenizer, settings=settings)
  ranges = _marked(messages, wanted, tokenizer, settings)
  if ranges is None:
    ranges = []
    for i in wanted:
      start = _start_of(messages, i, whole, tokenizer, settings)
      end = render(messages[: i + 1], tokenizer, settings=settings)
      if not (end.startswith(start) and whole.startswith(end)):
        break
      ranges.append((len(start), len(end)))
    if len(ranges) < len(wanted):
      return [_last_of(messages[: i + 1], tokenizer, settings) for i in wanted]
  _refuse_unwritten(messages, tokenizer, settings, whole)
  if not ranges:  # the marks leave these turns out
    return [Answers("", "")]
  at = ranges[0][0]
  start, rest = whole[:at], whole[at:]
  # The seam's whitespace may change where the two are joined; then what
  # follows moves by as many characters.
  text = templates.join(start, rest)
  moved = 0 if whole.startswith(text) else len(text) - len(whole.rstrip())
  spans = [(max(a + moved, at), b + moved) for a, b in ranges]
  return [Answers(start, rest, tuple(spans))]


def _teaches(turn: templates.Message) -> bool:
  """Whether a turn says something and is not taken out by its weight."""
  content = turn["content"]
  words = content.strip() if isinstance(content, str) else content
  return bool(words or any(turn.get(key) for key in _READ)) and (
    turn.get("weight") != 0
  )


def _last_of(
  messages: list[templates.Message],
  tokenizer: Tokenizer | None,
  settings: JsonObject,
) -> Answers:
  """The last turn as a row of its own."""
  # That earlier reasoning is left out is what such templates are made for.
  before = [
    {key: x for key, x in m.items() if key not in _REASONING}
    for m in messages[:-1]
  ]
  same = [
    render([*m, messages[-1]], tokenizer, settings=settings)
    for m in (before, messages[:-1])
  ]
  before = before if same[0] == same[1] else messages[:-1]
  start, rest = _after(before, messages[-1:], tokenizer, settings)
  length = len(templates.join(start, rest))
  return Answers(start, rest, ((len(start), length),))


def _marked(
  messages: list[templates.Message],
  wanted: list[int],
  tokenizer: Tokenizer | None,
  settings: JsonObject,
) -> list[tuple[int, int]] | None:
  """The marked parts of the wanted turns; None without marks."""
  found = tokenizer.generation_ranges(messages, settings) if tokenizer else None
  if found is None:
    return None
  ranges = found[1]
  turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  if len(ranges) == len(turns):
    both = zip(turns, ranges, strict=True)
    ranges = [part for i, part in both if i in wanted]
  elif len(wanted) < len(turns):
    raise BadRow(
      f"has {len(turns)} assistant turns of which {len(wanted)} are learned, "
      f"and the chat template marks {len(ranges)} parts, so which are these "
      "turns' is not known"
    )
  return [(start, end) for start, end in ranges if end > start]


def instruction_of(row: Row, raw: bool = False) -> tuple[str, str]:
  r"""Dolly's row as SuperHF reads it: `[\n\nContext: c]\n\nHuman: i…`.

  Under `raw` the texts as they are, the context before the instruction.
  """
  given = check_text(row.get("context") or "", "context")
  asked = check_text(row["instruction"], "instruction")
  answer = check_text(row["response"] or "", "response")
  if raw:
    return given + asked, answer
  # Dolly's context takes the place of the system text.
  system = f"\n\nContext: {given}" if given.strip() else ""
  return templates.build_prompt(asked, system), f" {answer.strip()}"


def preference_of(
  row: Row, tokenizer: Tokenizer | None
) -> tuple[str, str, str]:
  """`(prompt, chosen, rejected)` of a row, the prompt explicit or implied.

  A tie (WebGPT has them) gives two equal completions.
  """
  if "score_0" in row and "chosen" not in row:
    return _preference_of_webgpt(row)
  for column in ("chosen", "rejected"):
    if column not in row:
      raise BadRow(f"has no column {column}")
  prompt, chosen, rejected = (
    row.get("prompt"),
    row["chosen"],
    row["rejected"],
  )
  # Role lists, with or without a prompt of their own.
  if isinstance(chosen, list) and isinstance(rejected, list):
    return _preference_of_lists(
      prompt,
      messages_of(chosen, "chosen", tokenizer),
      messages_of(rejected, "rejected", tokenizer),
      tokenizer,
      settings_of(row),
    )
  # Text: the prompt is a column, or what the two dialogues share.
  if any(isinstance(value, list) for value in (prompt, chosen, rejected)):
    raise BadRow("mixes a string and a list of messages")
  chosen = text_of(chosen, "chosen", tokenizer)
  rejected = text_of(rejected, "rejected", tokenizer)
  if prompt is not None:
    return text_of(prompt, "prompt", tokenizer), chosen, rejected
  parts = templates.split_pair(chosen, rejected)
  if parts is None:
    raise BadRow(
      "has no \\n\\nAssistant: that chosen and rejected share, so no prompt; "
      "write it into a column prompt"
    )
  return parts


def _preference_of_webgpt(row: Row) -> tuple[str, str, str]:
  """WebGPT comparisons as SuperHF's reward models read them.

  `Question: {q} Answer: {a}`, without citation marks such as `[1]`.
  """
  question = row.get("question")
  if isinstance(question, dict):
    question = question.get("full_text")
  question = text_of(question, "question", None)
  # The space after `Answer:` belongs to the completion.
  first, second = (
    " " + _CITATION.sub("", text_of(row.get(name), name, None)).strip()
    for name in ("answer_0", "answer_1")
  )
  # WebGPT's scores are opposite numbers in [-1, 1]; 0 and 0 is a tie.
  lead = (number_of(row, "score_0") or 0) - (number_of(row, "score_1") or 0)
  if lead < 0:
    first, second = second, first
  # Equal completions mark a tie, which `formats` drops.
  return f"Question: {question} Answer:", first, second if lead else first


def _preference_of_lists(
  prompt: object,  # a row's column: text, a role list, or None
  chosen: list[templates.Message],
  rejected: list[templates.Message],
  tokenizer: Tokenizer | None,
  settings: JsonObject,
) -> tuple[str, str, str]:
  if isinstance(prompt, list):
    shared = messages_of(prompt, "prompt", tokenizer)
    chosen = _without(shared, chosen, "chosen")
    rejected = _without(shared, rejected, "rejected")
  else:
    # Also with a string prompt: UltraFeedback repeats it inside the lists.
    shared = _common_turns(chosen, rejected)
    chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    given = bool(shared) or isinstance(prompt, str)
    if not given or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
      raise BadRow(
        "has no turns before the completions that chosen and rejected share, "
        "so no prompt; write it into a column prompt"
      )
    # A system turn alone is no question, so the string is.
    asks = any(turn["role"] != "system" for turn in shared)
    if isinstance(prompt, str) and not asks:
      question = {"role": "user", "content": check_text(prompt, "prompt")}
      shared = [*shared, question]
  # A template may look at the completion, so the prompts may come out unequal.
  start, better = _after(shared, chosen, tokenizer, settings)
  again, worse = _after(shared, rejected, tokenizer, settings)
  if start != again:
    raise BadRow("renders to two different prompts under the chat template")
  return start, better, worse


def _common_turns(
  first: list[templates.Message], second: list[templates.Message]
) -> list[templates.Message]:
  """The turns that both begin with, but never the last turn of either."""

  def compared(turn: templates.Message) -> templates.Message:
    return {k: x for k, x in turn.items() if k not in ("id", "weight")}

  count = 0
  limit = min(len(first), len(second)) - 1
  while count < limit and compared(first[count]) == compared(second[count]):
    count += 1
  return first[:count]


def number_of(row: Row, column: str, needed: bool = False) -> float | None:
  """A finite number, also written as text (CSV); None where it is absent."""
  value = row.get(column)
  if value is None or value == "":
    if needed:
      raise BadRow(f"has no {column}")
    return None
  # float() by itself would also take "nan" and "1_000".
  if not isinstance(value, int | float) and not _NUMBER.fullmatch(str(value)):
    raise BadRow(f"has {value!r} in {column}, need a number")
  if not math.isfinite(float(value)):
    raise BadRow(f"has {value!r} in {column}, need a finite number")
  return float(value)


def group_of(row: Row, column: str) -> str:
  """A row's group (annotator, subset): a text or a whole number, as text."""
  if column not in row:
    raise BadRow(
      f"has no column {column}, which has to say who judged it; it has "
      f"({', '.join(sorted(row))})"
    )
  value = row[column]
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # pandas writes a column with gaps as floats
  # Only NaN differs from itself; pandas writes it into gaps.
  if value is None or value != value or not str(value).strip():
    raise BadRow(f"has no {column}, which has to say who judged it")
  if isinstance(value, bool) or not isinstance(value, str | int):
    raise BadRow(f"has {value!r} in {column}, need a name or a whole number")
  # A group's name becomes part of a flag and of a metric's name.
  name = str(value).strip()
  if not name.isprintable() or _RESERVED.search(name):
    raise BadRow(
      f"has {name!r} in {column}; the name of a group is one line without any "
      "of , = / [ ], which weights and metrics are written with"
    )
  return name


_TRUTH = {
  **dict.fromkeys(("true", "1", "1.0"), True),
  **dict.fromkeys(("false", "0", "0.0"), False),
}


def truth_of(row: Row, column: str, needed: bool = False) -> bool | None:
  """True or false, also as 0/1 or text (CSV); None where it is absent."""
  value = row.get(column)
  if value is None or value == "":
    if needed:
      raise BadRow(f"has no {column}")
    return None
  # An optional column with other values (grades, say) just has no label.
  found = _TRUTH.get(str(value).lower())
  if found is None and needed:
    raise BadRow(
      f"has {value!r} in {column}, need true or false (1 and 0 do as well); "
      f"turn grades into these first, say {column} = grade > 3"
    )
  return found
