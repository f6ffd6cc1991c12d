"""The prompts of online methods: SuperHF's sets by hub id, or any source.

Differs from SuperHF: repeated prompts are dropped by default (WebGPT asks
each question several times); `unique=False` keeps them, as the paper did.
"""

import dataclasses
import random
from collections.abc import Sequence

from jaxalign.data import sources
from jaxalign.data.columns import lacking_columns
from jaxalign.data.fields import (
  BadRow,
  messages_of,
  noting,
  render,
  settings_of,
  text_of,
)
from jaxalign.data.prompt_format import DIALOGUE, turns_of
from jaxalign.data.rows import LoadedRows, PromptRow
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.text import templates

HOLDOUT = 2300  # last rows of a set without a test split of its own


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """One of SuperHF's prompt sets."""

  name: str  # as in its result files
  own_test: bool  # False: the test split is the last HOLDOUT rows
  answer_mark: str = ""  # in a text field the completion begins with this


PROMPT_SETS = {
  "Anthropic/hh-rlhf:harmless-base": PromptSet("anthropic-harmless-base", True),
  "Anthropic/hh-rlhf:helpful-base": PromptSet("anthropic-helpful-base", True),
  "Anthropic/hh-rlhf:red-team-attempts": PromptSet("anthropic-red-team", False),
  "openai/webgpt_comparisons": PromptSet("openai/webgpt_comparisons", False),
  "yizhongw/self_instruct": PromptSet("self_instruct", False, "Output:"),
}
# Where a row's question is looked for, in this order.
COLUMNS = ("prompt", "chosen", "transcript", "question", "messages", "text")


def load_prompts(
  source: str,
  *,
  split: str = "train",
  max_chars: int = 1024,
  unique: bool = True,
  seed: int = 66,
  limit: int = 0,
  limit_per_set: int = 0,
  holdout: int | None = None,
  system: str = "",
  tokenizer: Tokenizer | None = None,
  max_bad_share: float = 0.01,
  columns: Sequence[str] | None = None,
) -> LoadedRows[PromptRow]:
  """Questions in the format of the policy, filtered and shuffled.

  Only the first human question of a dialogue is used, with what stands before
  it. Without a chat template, a string is put between the role delimiters
  unless it already is; with one, every prompt becomes a role list. Under the
  format `raw` strings stay as they are.

  Args:
    source: see `sources.read`; columns as in COLUMNS.
    split: `train` or `test`.
    max_chars: of a prompt as it is written, with `system`, inclusive: pass
      1023 for "fewer than 1024".
    unique: keep the first of equal prompts only.
    seed: of the shuffle over all sets.
    limit: prompts to return at most; 0 = all.
    limit_per_set: the first so many of each set after the length filter,
      before the shuffle (SuperHF's later runs); 0 = all.
    holdout: the last rows of each set, for `test` only; 0 = the same rows in
      both splits (the paper's). By default HOLDOUT for the sets without a test
      split in PROMPT_SETS, 0 for others.
    system: text directly before every prompt; with a chat template the system
      turn of dialogues that have none.
    tokenizer: the policy's, which has the format.
    max_bad_share: unusable rows are skipped up to this share.
    columns: prompts of equal text that differ in one of these are not the
      same; rows then carry all of their columns. None = they carry none.

  Raises:
    UserError: a bad source, no usable column, nothing left after filtering.
  """
  if split not in ("train", "test"):
    raise UserError(f"split must be train or test, got {split!r}")
  # Reading every set, so that their order below is that of the source.
  found = [
    _questions(
      table,
      PROMPT_SETS.get(part),
      tokenizer,
      system,
      max_bad_share,
      columns is not None,
    )
    for part in sources.part_names(source)
    for table in _read_set(part, split, holdout)
  ]
  # Filtering: by length, then repeats over all sets.
  sets, dropped = _filter(
    [rows for rows, _ in found], max_chars, unique, columns or ()
  )
  rows = [row for one in sets for row in one[: limit_per_set or None]]
  bad = tuple(problem for _, problems in found for problem in problems)
  read = len(bad) + sum(len(rows) for rows, _ in found)
  if not rows:
    (_, long), _ = dropped
    # As the config counts them.
    most = f"{max_chars - len(system)} characters"
    if system:
      most += " without the system text"
    raise UserError(
      f"prompts {source}: none of {read} rows can be used ({long} longer than "
      f"{most}, {len(bad)} bad); raise config.max_prompt_chars or repair them"
    )
  # Shuffling over all sets; Python keeps this stream stable over versions.
  random.Random(seed).shuffle(rows)
  return LoadedRows(tuple(rows[: limit or None]), read, bad, dropped)


def _read_set(
  part: str, split: str, holdout: int | None
) -> list[sources.Table]:
  """The rows of one part of a source that belong to a split."""
  # Without a test split of its own, the last rows of `train` are held out.
  known = PROMPT_SETS.get(part)
  only_train = known is not None and not known.own_test
  if holdout is None:
    holdout = HOLDOUT if only_train else 0
  asked = "train" if only_train or holdout else split
  tables = sources.read(part, split=asked)
  return [_split_off(table, split, holdout) for table in tables]


def _filter(
  sets: list[list[PromptRow]],
  max_chars: int,
  unique: bool,
  columns: Sequence[str],
) -> tuple[list[list[PromptRow]], tuple[tuple[str, int], ...]]:
  """Drops long and, over all sets, repeated prompts; counts both."""
  fitting = [
    [row for row in rows if len(row.prompt) <= max_chars] for rows in sets
  ]
  # Length first: a long repeat counts as too long, not as repeated.
  seen: set[tuple[str, ...]] = set()
  kept = fitting
  if unique:
    kept = [_new_ones(rows, seen, columns) for rows in fitting]
  total, short, new = (sum(map(len, x)) for x in (sets, fitting, kept))
  return kept, (
    (f"longer than {max_chars} characters", total - short),
    ("repeated", short - new),
  )


def _new_ones(
  rows: list[PromptRow], seen: set[tuple[str, ...]], columns: Sequence[str]
) -> list[PromptRow]:
  """The rows whose prompt and columns are not in `seen`, where they are put."""
  new = []
  for row in rows:
    # As text: a column may hold lists, which have no hash.
    key = (row.prompt, *[repr(row.columns.get(name)) for name in columns])
    if key not in seen:
      seen.add(key)
      new.append(row)
  return new


def question_of(
  row: sources.Row,
  tokenizer: Tokenizer | None = None,
  answer_mark: str = "",
  system: str = "",
) -> tuple[str, tuple[templates.Message, ...]]:
  """The prompt in one row of any known format, and its messages if it has any.

  Args:
    row: with one of the columns that `load_prompts` names.
    tokenizer: has the format; None = role delimiters.
    answer_mark: the question ends before the first occurrence of this text.
    system: what stands before it.

  Raises:
    BadRow: no known column, or no text in it.
  """
  # The first known column decides, whatever else the row has.
  column = next((name for name in COLUMNS if name in row), "")
  if not column:
    raise BadRow(f"has none of the columns {', '.join(COLUMNS)}")
  value = row[column]
  if column == "question" and isinstance(value, dict):  # WebGPT, nested
    value = value.get("full_text")
  form = DIALOGUE if tokenizer is None else tokenizer.format
  if not isinstance(value, list):
    text = text_of(value, column, tokenizer)
    text = text.partition(answer_mark)[0] if answer_mark else text
    if not text.strip():
      raise BadRow("asks nothing")
    if form.name == "raw":
      return system + text, ()
    if form.name == "human_assistant":
      return system + wrap(text), ()
    # Reward models and functions would not find the question in it.
    if templates.HUMAN not in text and text.startswith(form.opens):
      raise BadRow(
        f"is in the chat template's own words in {column}; write the bare "
        "question or a role list"
      )
    value = turns_of(text)
  first = first_turn(value, column, tokenizer)
  if system and first[0]["role"] != "system":
    first = [{"role": "system", "content": system}, *first]
  return render(first, tokenizer, True, settings_of(row)), tuple(first)


def wrap(text: str) -> str:
  """A dialogue's first question, or a bare question put into the template."""
  # A dialogue whose question is cut off gets its assistant delimiter here.
  if templates.HUMAN in text:
    return templates.first_question(text) or text.rstrip() + templates.ASSISTANT
  return templates.build_prompt(text.strip())


def first_turn(
  value: object, column: str, tokenizer: Tokenizer | None
) -> list[templates.Message]:
  """The messages of a role list up to its first question."""
  messages = messages_of(value, column, tokenizer)
  roles = [turn["role"] for turn in messages]
  if "user" not in roles:
    raise BadRow("has no user turn")
  return messages[: roles.index("user") + 1]


def _split_off(table: sources.Table, split: str, tail: int) -> sources.Table:
  if not tail:
    return table
  if tail >= len(table.rows):
    raise UserError(
      f"prompts {table.name}: holdout={tail} leaves nothing of "
      f"{len(table.rows)} rows; lower holdout"
    )
  start = len(table.rows) - tail
  # Which part an unreadable line is in is not known: each gets its share.
  bad = len(table.bad) * start // len(table.rows)
  if split == "test":
    rows, lines = slice(start, None), slice(bad, None)
  else:
    rows, lines = slice(start), slice(bad)
  return sources.Table(
    table.name, table.rows[rows], table.places[rows], table.bad[lines]
  )


def _questions(
  table: sources.Table,
  known: PromptSet | None,
  tokenizer: Tokenizer | None,
  system: str,
  max_bad_share: float,
  carry: bool,
) -> tuple[list[PromptRow], list[str]]:
  lacking_columns(table, COLUMNS)
  name, mark = (known.name, known.answer_mark) if known else ("", "")
  # Those that could not be read count with those that are not usable.
  rows, problems = [], [*table.bad]
  for row, place in zip(table.rows, table.places, strict=True):
    # A known set has SuperHF's name; other rows may name theirs.
    group = name or str(row.get("prompt_set") or row.get("group") or "")
    with noting(problems, place):
      text, messages = question_of(row, tokenizer, mark, system)
      rows.append(PromptRow(text, group, messages, row if carry else {}))
  sources.check_bad(table.name, tuple(problems), len(rows), max_bad_share)
  return rows, problems
