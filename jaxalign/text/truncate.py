"""Cutting the turns that a model plays on by itself.

The seeds' patterns are kept as named options because their reported scores
depend on them. They cut much more than turns: `[^:]+` crosses newlines, so
under `simple` and `medium` a blank line that is followed *anywhere* later by a
colon ends the answer, `medium` also cuts at every word that holds "Human" or
"Assistant", and `complex` leaves one line without double quotes or hyphens.
The default cuts at the real role delimiters and nowhere else.
"""

import re

from jaxalign.errors import UserError

TRUNCATIONS: dict[str, re.Pattern | None] = {
  "none": None,
  "delimiters": re.compile(r"\n\n(?:Human|Assistant):"),
  "simple": re.compile(r"\n\n[^:]+:"),
  "medium": re.compile(r"\n\n[^:]+:|Human|Assistant"),
  "complex": re.compile(r"\n\n[^:]+:|Human|Assistant|\n|\"|-"),
}


def truncate(completion: str, how: str = "delimiters") -> str:
  """The completion up to the first extra turn, stripped.

  Args:
    completion: decoded text behind the prompt.
    how: `none`, `delimiters`, or one of the seeds' patterns: `simple`,
      `medium` (runs after April 2023), `complex` (the CS224N paper's).

  Returns:
    The part in front of the cut without surrounding blanks; may be empty.

  Raises:
    UserError: an unknown `how`.
  """
  if how not in TRUNCATIONS:
    raise UserError(
      f"truncation must be one of {', '.join(TRUNCATIONS)}, got {how!r}"
    )
  pattern = TRUNCATIONS[how]
  if pattern is not None and (found := pattern.search(completion)):
    completion = completion[: found.start()]
  return completion.strip()
