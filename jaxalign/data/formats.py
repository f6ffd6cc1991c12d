"""TRL's data set formats to typed rows.

| row            | columns it is made from                                    |
|----------------|------------------------------------------------------------|
| CompletionRow  | `prompt, completion` [`label`, `reward`]; `messages`;      |
|                | `instruction, response` [`context`], Dolly's; `text`; a    |
|                | preference (its chosen completion)                         |
| PreferenceRow  | `prompt, chosen, rejected`; `chosen, rejected`; WebGPT's    |

Values are strings or lists of `{"role", "content"}`. Optional everywhere:
`group` (annotators, subsets); on preferences `margin`. The format is decided
row by row, so one odd row loses itself and not the data set.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from jaxalign.data import sources
from jaxalign.data.columns import lacking_columns
from jaxalign.data.fields import (
  answers_of,
  group_of,
  instruction_of,
  noting,
  number_of,
  preference_of,
  prompt_completion_of,
  truth_of,
)
from jaxalign.data.prompt_format import DIALOGUE, in_turns, with_system
from jaxalign.data.rows import (
  CompletionRow,
  LoadedRows,
  PreferenceRow,
)
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError

Made = TypeVar("Made", bound=CompletionRow | PreferenceRow)


def load_completions(
  source: str,
  *,
  need: str = "",
  tokenizer: Tokenizer | None = None,
  split: str = "train",
  max_bad_share: float = 0.01,
  part: str = "all",
  columns: Mapping[str, str] | None = None,
  group: str = "",
  every_turn: bool = False,
  system: str = "",
) -> LoadedRows[CompletionRow]:
  """Prompts with completions, for SFT (`need=""`), KTO or distillation.

  Args:
    source: see `sources.read`.
    need: `label` or `reward`: a column every row must have. With `label` a
      preference gives two rows, a desirable and an undesirable one, or none
      where `load_preferences` would drop it.
    tokenizer: renders role lists with its chat template, if it has one.
    split: of a hub set or folder.
    max_bad_share: unusable rows are skipped up to this share.
    part: `all`, or the `first` or `second` half by index of every source.
    columns: our name -> the source's, e.g. `{"reward": "train_reward"}`.
    group: the column of a row's `group`, which every row then must have; empty
      = the column `group` where there is one.
    every_turn: of role lists all assistant turns are marked in `turns`, not
      only the last.
    system: text before every prompt, or a system turn; see `with_system`.

  Raises:
    UserError: see `sources.read`; missing columns; nothing left.
  """
  split_up = 0  # dialogues that gave several rows
  form = DIALOGUE if tokenizer is None else tokenizer.format

  def build(row: sources.Row) -> list[CompletionRow | PreferenceRow]:
    row = with_system(in_turns(row, form), system)
    who = _group(row, group) or str(row.get("category") or "")
    # Dolly.
    if "instruction" in row and "response" in row and not need:
      texts = instruction_of(row, form.name == "raw")
      return [CompletionRow(*texts, group=who)]
    # A preference: for SFT its chosen completion, for KTO both.
    if "chosen" in row and not need:
      prompt, chosen, _ = preference_of(row, tokenizer)
      return [CompletionRow(prompt, chosen, group=who)]
    # As one row for now, because its halves are checked together.
    if "chosen" in row and need == "label":
      return [PreferenceRow(*preference_of(row, tokenizer), group=who)]
    # Anything else: prompt and completion, messages, or text.
    if every_turn:
      nonlocal split_up
      made = answers_of(row, tokenizer)
      split_up += len(made) > 1
      return [
        CompletionRow(x.prompt, x.completion, group=who, turns=x.turns)
        for x in made
      ]
    prompt, completion = prompt_completion_of(row, tokenizer)
    reward = number_of(row, "reward", need == "reward")
    label = truth_of(row, "label", need == "label")
    return [CompletionRow(prompt, completion, reward, label, who)]

  # The sets of columns of which a source must have one.
  wanted = {
    "": (
      "prompt, completion",
      "messages",
      "instruction, response",
      "text",
      "chosen, rejected",
    ),
    "label": (
      "prompt, completion, label",
      "messages, label",
      "chosen, rejected",
    ),
    "reward": ("prompt, completion, reward", "messages, reward"),
  }[need]
  tables = _tables(source, split, part, columns or {})
  found = _load(tables, build, _with(wanted, group), max_bad_share)
  rows = tuple(made for row in found.rows for made in _completions_of(row))
  return LoadedRows(rows, found.read, found.bad, found.dropped, split_up)


def load_preferences(
  source: str,
  *,
  tokenizer: Tokenizer | None = None,
  split: str = "train",
  max_bad_share: float = 0.01,
  part: str = "all",
  columns: Mapping[str, str] | None = None,
  group: str = "",
  system: str = "",
) -> LoadedRows[PreferenceRow]:
  r"""Pairs of completions, for reward models and DPO.

  Without a `prompt` column two dialogues are split at the last
  `\n\nAssistant:` they share, two role lists after their common turns. Rows
  with an empty completion, and those whose completions are equal or tie, are
  dropped and counted.

  Args and raises: as `load_completions`.
  """
  form = DIALOGUE if tokenizer is None else tokenizer.format

  def build(row: sources.Row) -> list[PreferenceRow]:
    row = with_system(in_turns(row, form), system)
    prompt, chosen, rejected = preference_of(row, tokenizer)
    margin = number_of(row, "margin") or 0.0
    who = _group(row, group)
    return [PreferenceRow(prompt, chosen, rejected, margin, who)]

  tables = _tables(source, split, part, columns or {})
  wanted = (
    "prompt, chosen, rejected",
    "chosen, rejected",
    "question, answer_0, answer_1, score_0, score_1",
  )
  return _load(tables, build, _with(wanted, group), max_bad_share)


def _group(row: sources.Row, column: str) -> str:
  return group_of(row, column) if column else str(row.get("group") or "")


def _with(wanted: tuple[str, ...], column: str) -> tuple[str, ...]:
  """The alternatives, each with one more column."""
  return tuple(f"{w}, {column}" for w in wanted) if column else wanted


def half(rows: tuple, part: str) -> tuple:
  """The `first` or `second` half of rows by index, or `all` of them.

  SuperHF trains its two reward models on the two halves of each data set, so
  that the training reward never saw the data of the held-out reward.
  """
  # By index, before any filter, so both halves stay the same for all runs.
  cut = len(rows) // 2
  halves = {"all": rows, "first": rows[:cut], "second": rows[cut:]}
  if part not in halves:
    raise UserError(f"part must be one of {', '.join(halves)}, got {part!r}")
  return halves[part]


def _tables(
  source: str,
  split: str,
  part: str,
  columns: Mapping[str, str],
) -> list[sources.Table]:
  tables = sources.read(source, split=split)
  # `columns` maps our names to theirs; rows are renamed the other way.
  ours = {theirs: name for name, theirs in columns.items()}
  return [
    dataclasses.replace(
      table,
      rows=tuple(
        {ours.get(name, name): value for name, value in row.items()}
        for row in half(table.rows, part)
      ),
      places=half(table.places, part),
      bad=half(table.bad, part),  # which half they are in is not known
    )
    for table in tables
  ]


def _completions_of(row: CompletionRow | PreferenceRow) -> list[CompletionRow]:
  """The row itself, or a preference as a desirable and an undesirable row."""
  if isinstance(row, CompletionRow):
    return [row]
  return [
    CompletionRow(row.prompt, row.chosen, label=True, group=row.group),
    CompletionRow(row.prompt, row.rejected, label=False, group=row.group),
  ]


def _useless(row: CompletionRow | PreferenceRow) -> str:
  """Why nothing can be learned from a valid row, or ""."""
  if isinstance(row, CompletionRow):
    return "" if row.completion.strip() else "empty"
  chosen, rejected = row.chosen.strip(), row.rejected.strip()
  if not chosen or not rejected:
    return "empty"
  return "without a preference" if chosen == rejected else ""


def _load(
  tables: list[sources.Table],
  build: Callable[[sources.Row], list[Made]],
  wanted: tuple[str, ...],
  max_bad_share: float,
) -> LoadedRows[Made]:
  """Builds the rows of every table; bad ones are counted by table."""
  rows: list[Made] = []
  bad: list[str] = []
  dropped: collections.Counter[str] = collections.Counter()
  # Building the rows; each table has its own limit of bad ones.
  for table in tables:
    lacking_columns(table, wanted)
    # Bad rows of this table: those not readable, then those not usable.
    made, problems = [], [*table.bad]
    for row, place in zip(table.rows, table.places, strict=True):
      with noting(problems, place):
        made += build(row)
    reasons = [_useless(row) for row in made]
    dropped.update(filter(None, reasons))
    rows += [r for r, why in zip(made, reasons, strict=True) if not why]
    # Rows that are dropped are valid, so they count as good.
    good = len(table.rows) + len(table.bad) - len(problems)
    sources.check_bad(table.name, tuple(problems), good, max_bad_share)
    bad.extend(problems)
  # Refusing a source of which nothing is left.
  read = sum(len(table.rows) + len(table.bad) for table in tables)
  if not rows:
    names = ",".join(table.name for table in tables)
    counts = [f"{n} {why}" for why, n in [*dropped.items(), ("bad", len(bad))]]
    raise UserError(
      f"{names}: nothing is left of {read} rows ({', '.join(counts)}); give a "
      "source with usable rows"
    )
  return LoadedRows(
    tuple(rows), read, tuple(bad), tuple(sorted(dropped.items()))
  )
