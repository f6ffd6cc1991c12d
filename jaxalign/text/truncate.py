"""Cuts off further turns of the dialogue that a model writes itself.

The patterns of the SuperHF and CS224N code are kept as named options because
the scores they report depend on them. They cut much more than turns: `[^:]+`
crosses newlines, so under `simple` and `medium` a blank line ends the
completion if a colon follows *anywhere* later, `medium` also cuts at every word
that contains "Human" or "Assistant", and `complex` keeps one line without
double quotes or hyphens. The default cuts at real turns only: those of the
dialogue's own format.
"""

import re
from collections.abc import Sequence

from jaxalign.errors import UserError
from jaxalign.text.templates import ASSISTANT, HUMAN

# In the order of how much they cut off.
TRUNCATIONS: dict[str, re.Pattern | None] = {
  "none": None,
  "delimiters": None,  # at the texts that open a turn
  "simple": re.compile(r"\n\n[^:]+:"),
  "medium": re.compile(r"\n\n[^:]+:|Human|Assistant"),
  "complex": re.compile(r"\n\n[^:]+:|Human|Assistant|\n|\"|-"),
}


def truncate(
  completion: str,
  how: str = "delimiters",
  turns: Sequence[str] = (HUMAN, ASSISTANT),
) -> str:
  """The completion up to the first extra turn, stripped.

  Args:
    completion: the decoded text after the prompt.
    how: `none`, `delimiters`, or one of the released patterns: `simple`,
      `medium` (runs after April 2023), `complex` (the CS224N paper's).
    turns: the texts at which `delimiters` cuts; see `PromptFormat.turns`.

  Returns:
    The part before the cut, stripped; may be empty.

  Raises:
    UserError: an unknown `how`.
  """
  if how not in TRUNCATIONS:
    raise UserError(
      f"truncation must be one of {', '.join(TRUNCATIONS)}, got {how!r}"
    )
  pattern = TRUNCATIONS[how]
  if how == "delimiters" and turns:
    pattern = re.compile("|".join(map(re.escape, turns)))
  if pattern is not None and (found := pattern.search(completion)):
    completion = completion[: found.start()]
  return completion.strip()
