"""Rows of a data set, as the methods that learn from one read them."""

import dataclasses
import math
from typing import Any

from jaxalign.config.supervised import SupervisedConfig
from jaxalign.data import sources
from jaxalign.data.rows import LoadedRows
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.setup.models import locate


# The keywords of `formats.load_...`.
def source_of(
  config: SupervisedConfig, tokenizer: Tokenizer, validation: bool, lab: str
) -> tuple[str, dict[str, Any]]:
  """Where a run's rows come from, and how `data.formats` is to read them.

  Args:
    config: names the source in `data` and `validation_data`.
    tokenizer: renders role lists.
    validation: the held-out rows.
    lab: file that `lab` stands for, alone or among others.
  """
  source = config.validation_data if validation else config.data
  names = sources.part_names(source)
  return ",".join(locate(name, lab) for name in names), {
    "tokenizer": tokenizer,
    "split": "test" if validation else "train",
    "max_bad_share": config.max_bad_share,
  }


def fits(config: SupervisedConfig, prompt: str, *completions: str) -> bool:
  """Whether a prompt is within `max_example_chars` with each completion."""
  limit = config.max_example_chars or math.inf
  return len(prompt) + max(map(len, completions)) <= limit


def account(
  config: SupervisedConfig,
  source: str,
  found: LoadedRows,
  left: int,
  length: int,
  *,
  short: int,
  encoded: int,
  cut: int = 0,
) -> dict[str, int]:
  """Prints how many rows are trained on, and why the others are not.

  Args:
    config: of the run.
    source: of the rows.
    found: what was read from it.
    left: rows that are trained on.
    length: tokens of a text at most.
    short: rows of those found that are within `max_example_chars`.
    encoded: of these the ones whose prompt leaves room for a completion; those
      that are not left either are equal after the cut.
    cut: completions that are cut at `length`.

  Returns:
    The same as metrics, `data/...`; those that are 0 are left out.

  Raises:
    UserError: no row is left.
  """
  count = len(found.rows)
  why = (
    ("above max_example_chars", count - short),
    ("without room for a completion", short - encoded),
    ("equal after the cut", encoded - left),
  )
  reasons = (*found.dropped, *why)
  if not left:
    remedies = ["raise config.max_example_chars"] if count > short else []
    if short and length < config.max_length:
      remedies.append("shorten the texts, as the model reads no more")
    elif short:
      remedies.append("raise config.max_length")
    left_out = ", ".join(f"{number} {name}" for name, number in why if number)
    tokens = f", in {length} tokens" if short else ""
    raise UserError(
      f"{source}: no row is left of {count} ({left_out}{tokens}); "
      + " and ".join(remedies)
    )
  rows = dataclasses.replace(found, rows=found.rows[:left], dropped=reasons)
  tail = f", {cut} completions cut at {length} tokens" if cut else ""
  print(f"{source}: {rows}{tail}")
  dropped = dict(reasons)
  counts = {
    "data/rows": left,
    "data/bad": len(found.bad),
    "data/split_up": found.split_up,
    "data/empty": dropped.get("empty", 0),
    "data/no_preference": dropped.get("without a preference", 0),
    "data/too_many_chars": count - short,
    "data/no_room": short - encoded,
    "data/equal_after_cut": encoded - left,
    "data/cut": cut,
  }
  return {name: number for name, number in counts.items() if number}
