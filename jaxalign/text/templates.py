r"""The wire strings of SuperHF and HH-RLHF dialogues.

A dialogue is one string: every turn opens with a blank line and its role,
`\n\nHuman: question\n\nAssistant: answer`. A prompt ends right after the
last `\n\nAssistant:`, with no trailing space; one space joins it to a
completion. Models were trained on exactly these bytes.
"""

import re
from typing import Any

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# Ends in a full stop in SuperHF's runs and in a colon in its PPO baseline.
SYSTEM_CS224N = (
  "A human user asks a question or says a statement, and a helpful, polite, "
  "honest, sophisticated, emotionally aware, and humble-but-knowledgeable AI "
  "assistant responds."
)
SYSTEM_CS224N_RLHF = SYSTEM_CS224N[:-1] + ":"
SYSTEM_LATER = (
  "A human user sends a message, and a helpful and harmless AI assistant "
  "responds."
)

# Role lists use other names for the two speakers.
_TURN = re.compile(r"\n\n(Human|Assistant):")
_DELIMITER = {"user": HUMAN, "assistant": ASSISTANT}
_ROLE = {"Human": "user", "Assistant": "assistant"}

# {"role": "system"|"user"|"assistant", "content": text}, and what else a chat
# template reads.
Message = dict[str, Any]


def build_prompt(question: str, system: str = "") -> str:
  r"""`{system}\n\nHuman: {question}\n\nAssistant:`, as SuperHF writes it."""
  return f"{system}{HUMAN} {question}{ASSISTANT}"


def is_prompt(text: str) -> bool:
  """Whether `text` is a dialogue in which the assistant speaks next."""
  return HUMAN in text and text.endswith(ASSISTANT)


def join(prompt: str, completion: str) -> str:
  """Joins prompt and completion to the text that is scored and trained on.

  After a role delimiter come one space and the stripped completion. Any other
  prompt (plain text, or a chat template's) is followed by the completion as it
  is: only its writer knows what belongs between the two.

  Args:
    prompt: with its system text.
    completion: whitespace around it is dropped after a role delimiter.

  Returns:
    The joined text; it always begins with `prompt`.
  """
  if prompt.endswith(ASSISTANT):
    return f"{prompt} {completion.strip()}"
  return prompt + completion


def join_words(prompt: str, completion: str) -> str:
  """`join`, but with a space where two words would run together.

  SuperHF feeds its reward models so: prompt, one space, stripped completion.
  """
  runs_on = prompt and not (prompt[-1].isspace() or prompt.endswith(ASSISTANT))
  if runs_on and not completion[:1].isspace():
    completion = f" {completion}"
  return join(prompt, completion).rstrip()


def split_first(text: str) -> tuple[str, str] | None:
  r"""Splits after the first `\n\nAssistant:`; None where there is none.

  The completion keeps its leading space, so the two parts add up to `text`.
  """
  at = text.find(ASSISTANT)
  cut = at + len(ASSISTANT)
  return (text[:cut], text[cut:]) if at >= 0 else None


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str] | None:
  r"""Splits two dialogues at the last `\n\nAssistant:` that both share.

  That is the last one of each, unless a completion plays further turns itself
  (some 0.2% of HH-RLHF): then those turns belong to the completion.

  Returns:
    `(prompt, chosen, rejected)`, or None where no delimiter follows the same
    text in both.
  """
  # From the last delimiter backwards, until the text before it is shared.
  end = len(chosen)
  while (at := chosen.rfind(ASSISTANT, 0, end)) >= 0:
    cut = at + len(ASSISTANT)
    if rejected.startswith(chosen[:cut]):
      return chosen[:cut], chosen[cut:], rejected[cut:]
    end = cut - 1  # the next search must not find this delimiter again
  return None


def first_question(text: str) -> str | None:
  """The prompt made of a dialogue's first human turn; None without one."""
  parts = split_first(text)
  return parts[0] if parts and HUMAN in parts[0] else None


def bare_question(prompt: str) -> str:
  """What the human says, without delimiters and system text.

  Reward models that take a (question, answer) pair read this. A longer dialogue
  keeps the delimiters between its turns.
  """
  # System text comes before the first delimiter.
  at = prompt.find(HUMAN)
  body = prompt[at + len(HUMAN) :] if at >= 0 else prompt
  return body.removesuffix(ASSISTANT).strip()


def from_messages(messages: list[Message], reply: bool = False) -> str:
  r"""Writes a role list as a dialogue: `\n\nHuman: …\n\nAssistant: …`.

  Args:
    messages: turns in order; a `system` turn is its text alone, unchanged.
    reply: append `\n\nAssistant:` so that the model answers next.

  Raises:
    KeyError: a role other than system, user or assistant.
    TypeError: a content that is not text.
  """
  text = ""
  for turn in messages:
    if turn["role"] == "system":
      text += turn["content"]
    else:
      # Added, not formatted: a list of parts would be written as Python does.
      text += _DELIMITER[turn["role"]] + " " + turn["content"]
  return text + (ASSISTANT if reply else "")


def to_messages(text: str) -> list[Message]:
  r"""Reads a dialogue into a role list; the inverse of `from_messages`.

  Text before the first delimiter becomes a `system` turn. A final
  `\n\nAssistant:` without text is not a turn.
  """
  # The pattern has a group, so `rest` alternates roles and contents.
  head, *rest = _TURN.split(text)
  turns = [{"role": "system", "content": head}] if head else []
  for role, content in zip(rest[::2], rest[1::2], strict=True):
    turns.append({"role": _ROLE[role], "content": content.strip()})
  # A prompt ends in an open turn.
  if turns and turns[-1] == {"role": "assistant", "content": ""}:
    turns.pop()
  return turns
