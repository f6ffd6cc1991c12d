"""Checks a data set's columns; where they do not fit, says what to rename."""

import difflib

from jaxalign.data.converters import CONVERTERS
from jaxalign.data.sources import Table
from jaxalign.errors import UserError

# Other formats in use, and how to convert them.
CONVERSIONS = (
  (
    {"instruction", "output"},
    "Alpaca: write @alpaca after the source's name",
  ),
  (
    {"conversations"},
    "ShareGPT: write @sharegpt after the source's name",
  ),
  (
    {"messages"},
    "messages: put the last assistant message into completion (or chosen and "
    "rejected), the ones before into prompt",
  ),
)
ALIASES = {
  "prompt": ("question", "instruction", "query", "input", "context"),
  "completion": ("response", "answer", "output", "reply"),
  "chosen": ("winner", "preferred", "better", "accepted"),
  "rejected": ("loser", "dispreferred", "worse"),
  "label": ("desirable", "thumbs", "good"),
  "reward": ("score", "rating", "train_reward", "logit"),
  "messages": ("conversations", "dialogue", "dialog"),
  "text": ("content", "document"),
}
# A converter whose columns others have as well.
_GENERAL = ("ultrafeedback_binarized",)
MEANING = {"label": " (true = desirable, false = not)"}


def lacking_columns(table: Table, wanted: tuple[str, ...]) -> None:
  """Checks that a table has one of the wanted sets of columns.

  Args:
    table: its rows may differ in columns; the union of them counts.
    wanted: alternatives, each `a, b, c`.

  Raises:
    UserError: none fits. It names the columns found, those needed, the nearest
      known format and how to convert to it.
  """
  # An empty table passes: that it has no rows is reported elsewhere.
  found = {column for row in table.rows for column in row}
  options = [set(option.split(", ")) for option in wanted]
  if any(option <= found for option in options) or not table.rows:
    return
  need = " or ".join(f"({option})" for option in wanted)
  raise UserError(
    f"{table.name} has the columns ({', '.join(sorted(found))}), need {need}; "
    f"{_conversion(found, options)}"
  )


def _conversion(found: set[str], options: list[set[str]]) -> str:
  """How to convert the columns: a known recipe, else to the nearest format."""
  # No recipe adds a label, a reward or the column of groups, which is in every
  # option.
  added = {"label", "reward"}.union(set.intersection(*options))
  near = [option for option in options if option - found <= added]
  for columns, advice in CONVERSIONS:
    if columns <= found and not near:
      return advice
  for name, converter in CONVERTERS.items():
    if set(converter.needs) <= found and name not in _GENERAL and not near:
      return (
        f"its columns are those of a known set: write @{name} after its name"
      )
  plans = [_renames(found, option) for option in near or options]
  # Fewest columns to invent, then fewest to rename.
  renames, absent = min(plans, key=lambda plan: (len(plan[1]), len(plan[0])))
  steps = [f"rename {old} to {new}" for old, new in renames]
  steps += [f"add the column {name}{MEANING.get(name, '')}" for name in absent]
  return "nearest format: " + ", ".join(steps)


def _renames(
  found: set[str], option: set[str]
) -> tuple[list[tuple[str, str]], list[str]]:
  """The `(old, new)` renames that lead to an option, and what stays absent."""
  renames, absent = [], []
  for column in sorted(option - found):
    free = sorted(found - option)
    # Known other names first, then names that are merely spelt alike.
    known = [name for name in ALIASES.get(column, ()) if name in free]
    known += difflib.get_close_matches(column, free, n=1)
    if known:
      renames.append((known[0], column))
    else:
      absent.append(column)
  return renames, absent
