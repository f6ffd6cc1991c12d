"""Rows of a data set, as the methods that learn from one read them."""

import math
from typing import Any, NamedTuple

from jaxalign.config.supervised import SupervisedConfig
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.setup.models import locate


class Source(NamedTuple):
  """Where rows come from, and how `data.formats` is to read them."""

  name: str  # hub id, file or glob; several with commas
  options: dict[str, Any]  # keywords of `formats.load_...`


def source_of(
  config: SupervisedConfig, tokenizer: Tokenizer, validation: bool, lab: str
) -> Source:
  """A run's source of rows.

  Args:
    config: names the source in `data` and `validation_data`.
    tokenizer: renders role lists.
    validation: the held-out rows.
    lab: file that `lab` stands for, alone or among others.
  """
  source = config.validation_data if validation else config.data
  names = [name.strip() for name in source.split(",")]
  return Source(
    ",".join(locate(name, lab) for name in names),
    {
      "tokenizer": tokenizer,
      "split": "test" if validation else "train",
      "max_bad_share": config.max_bad_share,
    },
  )


def fits(config: SupervisedConfig, prompt: str, *completions: str) -> bool:
  """Whether a prompt is within `max_example_chars` with each completion."""
  limit = config.max_example_chars or math.inf
  return len(prompt) + max(map(len, completions)) <= limit


def check_rows_left(
  config: SupervisedConfig, source: str, length: int, counts: tuple[int, ...]
) -> None:
  """A UserError if no row is left.

  Args:
    config: of the run.
    source: of the rows, for the message.
    length: tokens of a text at most.
    counts: rows that were read, that are short enough, that are left.
  """
  read, short, left = counts
  if not left:
    raise UserError(
      f"{source}: no row is left of {read}: {short} are within "
      f"config.max_example_chars={config.max_example_chars}, none of these has "
      f"a prompt below {length} tokens; raise it or config.max_length"
    )
