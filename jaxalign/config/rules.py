"""A config field with its rule and documentation, and rules between fields.

`jaxalign.config.read` checks them, docs/configuration_reference.md lists them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

# What a field's text ends in where its default has a source: a program or
# Author Year.
SOURCE = re.compile(
  r" \(([^()]*(?:\bSuperHF|\bTRL|\btorch|\b[A-Z]\w+ \d{4})\b[^()]*)\)$"
)


def field(
  default: object,
  doc: str,
  rule: str = "",
  *,
  choices: tuple[str, ...] = (),
  also: tuple[str, ...] = (),
  alias: tuple[str, ...] = (),
  values: Mapping[object, object] | None = None,
) -> Any:  # as `dataclasses.field`: the field's annotation is its type
  """A dataclass field that carries its own rule and documentation.

  Args:
    default: the value where a config does not set the field.
    doc: one line, with the unit, and in parentheses where the default is from.
    rule: range of a number: `>= 1`, `> 0` or an interval such as `[0, 1)`.
    choices: the strings that are allowed.
    also: names of the same thing in other programs; they only give a hint.
    alias: earlier names of the field; they keep working.
    values: earlier values of the field, and what they are now.
  """
  known = {"doc": doc, "rule": rule, "choices": choices}
  known |= {"also": also, "alias": alias, "values": values or {}}
  return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule between fields."""

  holds: bool
  must: str  # path and rule, "superbatch.keep must be in [1, prompts=32]"
  remedy: str  # "lower keep or raise samples_per_prompt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A config, or a section of one: fields, and rules between them."""

  @classmethod
  def of_word(cls, word: str) -> Mapping[str, object] | None:
    """The fields that a word in place of the section stands for, if any."""
    del word
    return None

  def rules(self) -> Iterator[Rule]:
    """The rules, in the order in which they are checked."""
    yield from ()


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the config reference."""

  path: str  # "config.superbatch.keep"
  type: str  # "int"
  default: object  # of the field's type
  rule: str  # ">= 1"; "" = anything of the type
  doc: str  # what it means
  source: str  # where the default is from, "SuperHF Table 2"; "" = ours
  also: str  # "(formerly keep_n)" or ""


def in_range(rule: str, value: int | float) -> bool:
  """Whether `value` is finite and satisfies `>= 1`, `> 0` or `[0, 1)`."""
  # NaN differs from itself.
  if value != value or abs(value) == math.inf:
    return False
  if rule.startswith(">="):
    return value >= float(rule[2:])
  if rule.startswith(">"):
    return value > float(rule[1:])
  if not rule:
    return True
  low, high = (float(x) for x in rule[1:-1].split(","))
  above = value >= low if rule[0] == "[" else value > low
  return above and (value <= high if rule[-1] == "]" else value < high)


def describe(cls: type[Section], path: str = "config") -> list[Row]:
  """The reference of a config class: a row for each field, sections opened."""
  kinds, rows = get_type_hints(cls), []
  for f in dataclasses.fields(cls):
    kind, where, known = kinds[f.name], f"{path}.{f.name}", f.metadata
    if dataclasses.is_dataclass(kind):
      rows += describe(kind, where)
      continue
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    rule = " | ".join(known["choices"]) or known["rule"]
    source = SOURCE.search(known["doc"])
    meaning = known["doc"].removesuffix(source[0] if source else "")
    also = "".join(f" (formerly {x})" for x in known["alias"])
    found = source[1] if source else ""
    rows.append(Row(where, name, f.default, rule, meaning, found, also.strip()))
  return rows
