"""A config field and its rule, side by side; reading checks, docs list them."""

import dataclasses
import math
import re
import types
from typing import Any, get_args, get_type_hints

# How a number may be written in a flag.
NUMBERS = {
  int: r"[+-]?\d{1,18}",
  float: r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?",
}
TYPE_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
}


def field(
  default: Any,
  doc: str,
  *,
  rule: str = "",
  choices: tuple[str, ...] = (),
  source: str = "",
  also: tuple[str, ...] = (),
) -> Any:
  """A dataclass field that carries its own rule and documentation.

  Args:
    default: value where the config says nothing; its type is the field's.
    doc: one line, with the unit.
    rule: range of a number: `>= 1`, `> 0` or an interval such as `[0, 1)`.
    choices: the texts that are allowed.
    source: where the default comes from.
    also: names of the same thing elsewhere, understood when one is mistyped.
  """
  known = {
    "doc": doc,
    "rule": rule,
    "choices": choices,
    "source": source,
    "also": also,
  }
  return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule between fields, as a section's `rules()` gives it."""

  field: str  # path below the section, "superbatch.keep"
  holds: bool
  must: str  # "must be in [1, samples_per_prompt=32]"
  remedy: str  # "lower keep or raise samples_per_prompt"


def divides(name: str, micro: int, of: str, whole: int) -> Rule:
  """The rule for a micro-batch: it divides its batch; 0 = the whole."""
  return Rule(
    name,
    micro == 0 or whole % micro == 0,
    f"must be 0 or divide {of}={whole}",
    "gradients are added up over equal parts",
  )


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the config reference."""

  path: str  # "config.superbatch.keep"
  type: str  # "int"
  default: Any
  rule: str  # ">= 1"; "" = anything of the type
  doc: str


def in_range(rule: str, value: int | float) -> bool:
  """Whether `value` is finite and satisfies `>= 1`, `> 0` or `[0, 1)`."""
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


def is_list(kind: Any) -> bool:
  """Whether a field's type is a tuple of one element type."""
  return isinstance(kind, types.GenericAlias)


def type_name(kind: Any) -> str:
  """`tuple[str, ...]` -> `a list of texts`, for messages."""
  if is_list(kind):
    return f"a list of {TYPE_NAMES[get_args(kind)[0]].split(maxsplit=1)[1]}s"
  return TYPE_NAMES[kind]


def fits(kind: Any, value: Any) -> bool:
  """Whether a value has the field's type: bool is no int, int is a float."""
  if is_list(kind):
    inner = get_args(kind)[0]
    return isinstance(value, list | tuple) and all(
      fits(inner, x) for x in value
    )
  if kind is bool or isinstance(value, bool):
    return kind is bool and isinstance(value, bool)
  return isinstance(value, (int, float) if kind is float else kind)


def convert(kind: Any, value: Any) -> Any:
  """A value that `fits`, as exactly the field's type."""
  if is_list(kind):
    return tuple(convert(get_args(kind)[0], x) for x in value)
  return kind(value)


def parse_text(kind: Any, text: str) -> Any:
  """A flag's text as the field's type, or the text itself where it is not."""
  if is_list(kind):
    inner = get_args(kind)[0]
    parts = text.strip("()[] ").split(",")
    words = (part.strip().strip("'\"") for part in parts)
    return tuple(parse_text(inner, word) for word in words if word)
  if kind is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  if kind in NUMBERS:
    return kind(text) if re.fullmatch(NUMBERS[kind], text) else text
  return text


def describe(cls: type, path: str = "config") -> list[Row]:
  """The reference of a config class, one row a field, sections opened."""
  kinds, rows = get_type_hints(cls), []
  for f in dataclasses.fields(cls):
    kind, where = kinds[f.name], f"{path}.{f.name}"
    if dataclasses.is_dataclass(kind):
      rows += describe(kind, where)
      continue
    rule = " | ".join(f.metadata["choices"]) or f.metadata["rule"]
    source = f.metadata["source"]
    doc = f.metadata["doc"] + (f" ({source})" if source else "")
    default = getattr(kind, "__name__", str(kind))
    name = str(kind) if is_list(kind) else default
    rows.append(Row(where, name, f.default, rule, doc))
  return rows
