"""TRL's data set formats to typed rows.

| row            | columns it is made from                                    |
|----------------|------------------------------------------------------------|
| CompletionRow  | `prompt, completion` [`label`, `reward`]; `messages`;      |
|                | `instruction, response` [`context`], Dolly's; `text`; a    |
|                | preference (its chosen answer)                             |
| PreferenceRow  | `prompt, chosen, rejected`; `chosen, rejected`; WebGPT's    |

Values are strings or lists of `{"role", "content"}`. Optional everywhere:
`group` (annotators, subsets); on preferences `margin`. What a row is, is
decided row by row: one odd row costs itself and not the data set.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.data import sources
from jaxalign.data.columns import lacking_columns
from jaxalign.data.fields import (
  collect,
  instruction_of,
  number_of,
  preference_of,
  prompt_completion_of,
  truth_of,
)
from jaxalign.data.rows import (
  CompletionRow,
  Loaded,
  PreferenceRow,
  Row,
)
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


def load_completions(
  source: str,
  *,
  need: str = "",
  tokenizer: Tokenizer | None = None,
  split: str = "train",
  max_bad_share: float = 0.01,
  part: str = "all",
  columns: Mapping[str, str] | None = None,
) -> Loaded[CompletionRow]:
  """Prompts with answers, for SFT (`need=""`), KTO or distillation.

  Args:
    source: see `sources.read`.
    need: `label` or `reward`: a column every row must have. With `label` a
      preference gives two rows, a desirable and an undesirable one.
    tokenizer: writes role lists with its chat template, if it has one.
    split: of a hub set or folder.
    max_bad_share: unusable rows are skipped up to this share.
    part: `all`, or the `first` or `second` half by index of every source.
    columns: our name -> the source's, e.g. `{"reward": "train_reward"}`.

  Raises:
    UserError: see `sources.read`; missing columns; nothing left.
  """

  def build(row: sources.Row) -> list[CompletionRow]:
    group = str(row.get("group") or row.get("category") or "")
    if "instruction" in row and "response" in row and not need:
      return [CompletionRow(*instruction_of(row), group=group)]
    if "chosen" in row and not need:
      prompt, chosen, _ = preference_of(row, tokenizer)
      return [CompletionRow(prompt, chosen, group=group)]
    if "chosen" in row and need == "label":
      prompt, chosen, rejected = preference_of(row, tokenizer)
      return [
        CompletionRow(prompt, chosen, label=True, group=group),
        CompletionRow(prompt, rejected, label=False, group=group),
      ]
    prompt, completion = prompt_completion_of(row, tokenizer)
    reward = number_of(row, "reward", need == "reward")
    label = truth_of(row, "label", need == "label")
    return [CompletionRow(prompt, completion, reward, label, group)]

  wanted = {
    "": (
      "prompt, completion",
      "messages",
      "instruction, response",
      "text",
      "chosen, rejected",
    ),
    "label": ("prompt, completion, label", "chosen, rejected"),
    "reward": ("prompt, completion, reward",),
  }[need]
  tables = _tables(source, split, max_bad_share, part, columns or {})
  return _load(
    tables, build, wanted, max_bad_share, lambda row: row.completion.strip()
  )


def load_preferences(
  source: str,
  *,
  tokenizer: Tokenizer | None = None,
  split: str = "train",
  max_bad_share: float = 0.01,
  part: str = "all",
  columns: Mapping[str, str] | None = None,
) -> Loaded[PreferenceRow]:
  r"""Pairs of answers, for reward models and DPO.

  Without a `prompt` column two dialogues are split at the last
  `\n\nAssistant:` they share, two role lists behind their common turns.
  Rows whose two answers are equal (or tie) are dropped and counted.

  Args and raises: as `load_completions`.
  """

  def build(row: sources.Row) -> list[PreferenceRow]:
    prompt, chosen, rejected = preference_of(row, tokenizer)
    margin = number_of(row, "margin") or 0.0
    group = str(row.get("group") or "")
    return [PreferenceRow(prompt, chosen, rejected, margin, group)]

  tables = _tables(source, split, max_bad_share, part, columns or {})
  found = _load(
    tables,
    build,
    (
      "prompt, chosen, rejected",
      "chosen, rejected",
      "question, answer_0, answer_1, score_0, score_1",
    ),
    max_bad_share,
    lambda row: True,
  )
  rows = tuple(
    row for row in found.rows if row.chosen.strip() != row.rejected.strip()
  )
  if not rows:
    raise UserError(
      f"{source}: chosen equals rejected in all {len(found.rows)} rows; there "
      "is nothing to prefer"
    )
  equal = ("without a preference", len(found.rows) - len(rows))
  return dataclasses.replace(found, rows=rows, dropped=(equal,))


def half(rows: tuple, part: str) -> tuple:
  """The `first` or `second` half of rows by index, or `all` of them.

  SuperHF trains its two reward models on the two halves of each data set, so
  that the one that is optimised against never saw what the other judges by.
  """
  cut = len(rows) // 2
  halves = {"all": rows, "first": rows[:cut], "second": rows[cut:]}
  if part not in halves:
    raise UserError(f"part must be one of {', '.join(halves)}, got {part!r}")
  return halves[part]


def _tables(
  source: str,
  split: str,
  max_bad_share: float,
  part: str,
  columns: Mapping[str, str],
) -> list[sources.Table]:
  tables = sources.read(source, split=split, max_bad_share=max_bad_share)
  ours = {theirs: name for name, theirs in columns.items()}
  return [
    dataclasses.replace(
      table,
      rows=tuple(
        {ours.get(name, name): value for name, value in row.items()}
        for row in half(table.rows, part)
      ),
      places=half(table.places, part),
    )
    for table in tables
  ]


def _load(
  tables: list[sources.Table],
  build: Callable[[sources.Row], list[Row]],
  wanted: tuple[str, ...],
  max_bad_share: float,
  holds: Callable[[Row], Any],
) -> Loaded[Row]:
  """Builds the rows of every table; bad ones are counted by table."""
  rows: list[Row] = []
  bad: list[str] = []
  empty = 0
  for table in tables:
    lacking_columns(table, wanted)
    made, problems = collect(table, build)
    problems = [*table.bad, *problems]
    kept = [row for row in made if holds(row)]
    empty += len(made) - len(kept)
    rows.extend(kept)
    good = len(table.rows) + len(table.bad) - len(problems)
    sources.check_bad(table.name, tuple(problems), good, max_bad_share)
    bad.extend(problems)
  read = sum(len(table.rows) + len(table.bad) for table in tables)
  if not rows:
    names = ",".join(table.name for table in tables)
    raise UserError(
      f"{names}: nothing is left of {read} rows ({empty} empty, {len(bad)} "
      "bad); give a source with usable rows"
    )
  return Loaded(tuple(rows), read, tuple(bad), (("empty", empty),))
