"""Mapping and flags -> frozen dataclass: here a config is validated, once.

Every mistake is a `UserError` of one line: the full path, the rule, the value,
the remedy.
"""

import dataclasses
import difflib
import logging
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from jaxalign.config.hints import run_together, unknown_field
from jaxalign.config.rules import Section, in_range
from jaxalign.errors import UserError

S = TypeVar("S", bound=Section)
V = TypeVar("V")

TYPE_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
  tuple[int, ...]: "a list of whole numbers",
  tuple[float, ...]: "a list of numbers",
  tuple[str, ...]: "a list of texts",
}
# How a flag may write a number: Python's own int() would take "1_000" too.
NUMBERS = {
  int: r"[+-]?\d{1,18}",
  float: r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?",
}
_log = logging.getLogger(__name__)


def read(
  cls: type[S],
  mapping: Any,  # a user's: what it holds is checked here
  flags: Sequence[tuple[str, object]] = (),
  path: str = "config",
  root: type[Section] | None = None,
) -> S:
  """Builds a config or one of its sections, and checks everything in it.

  Args:
    cls: the class; fields whose type is a dataclass are its sections.
    mapping: anything with `items()`: a dict, a ConfigDict, parsed JSON.
    flags: (path below this section, text or value) pairs. They win over the
      mapping, later ones over earlier ones.
    path: name of this section in messages.
    root: class of the whole config, searched for the nearest names.

  Raises:
    UserError: the first mistake.
  """
  root, kinds = root or cls, get_type_hints(cls)
  if isinstance(mapping, str):
    mapping = cls.of_word(mapping) or mapping
  if not hasattr(mapping, "items"):
    raise UserError(
      f"{path} must be a section of fields, got {mapping!r}; "
      f"set one of {path}.{{{', '.join(kinds)}}}"
    )
  # The flags of each field: ("", text), or (path below it, text) of a section.
  below: dict[str, list[tuple[str, object]]] = {}
  for name, text in flags:
    first, _, rest = name.partition(".")
    below.setdefault(first, []).append((rest, text))

  # Earlier names: one note for each, wherever it is used.
  given = dict(mapping.items())
  for old, name in aliases(cls).items():
    if old in given or old in below:
      _log.warning("%s.%s is now %s.%s", path, old, path, name)
  given = current_names(cls, given, path)
  below = current_names(cls, below, path)

  # Each field and section by itself.
  values = {}
  for name in given | below:
    where, value = f"{path}.{name}", given.get(name, {})
    if name not in kinds:
      rest = below[name][0][0] if name in below else ""
      raise UserError(unknown_field(root, f"{where}.{rest}".rstrip(".")))
    section = dataclasses.is_dataclass(kinds[name])
    for rest, text in below.get(name, ()):
      if rest and not section:
        raise UserError(
          f"{where}.{rest} is not a field, because {where} is a single value; "
          f"set {where} itself"
        )
      # The call below refuses text in place of a section, but for some words.
      if not rest:
        value = text if section else parse_text(kinds[name], text)
    if section:
      within = [(rest, text) for rest, text in below.get(name, ()) if rest]
      values[name] = read(kinds[name], value, within, where, root)
    else:
      values[name] = read_value(cls, name, kinds[name], value, where)

  # The rules between them.
  config = cls(**values)
  for rule in config.rules():
    if not rule.holds:
      # A rule's text begins with the path of its field.
      got = operator.attrgetter(rule.must.partition(" ")[0])(config)
      raise UserError(f"{path}.{rule.must}, got {got!r}; {rule.remedy}")
  return config


# Untyped below: a type that is looked up, and what a user wrote for it.
def read_value(cls: type, name: str, kind: Any, value: Any, where: str) -> Any:
  """One field's value, of its type and within its range or choices."""
  field = next(f for f in dataclasses.fields(cls) if f.name == name)
  choices, rule = field.metadata["choices"], field.metadata["rule"]
  if isinstance(value, str | bool):
    value = field.metadata["values"].get(value, value)
  try:
    typed = convert(kind, value)
  except (TypeError, OverflowError) as error:
    # A value may hold a part of the name: keep=best_held_out.
    meant = run_together(cls, where, value)
    like = f"write it like the default {field.default!r}"
    raise UserError(
      f"{where} must be {TYPE_NAMES[kind]}, got {value!r} "
      f"({type(value).__name__}); {f'did you mean {meant}?' if meant else like}"
    ) from error
  if choices and typed not in choices:
    near = difflib.get_close_matches(typed, choices, 1) or [field.default]
    raise UserError(
      f"{where} must be one of {', '.join(choices)}, got {value!r}; "
      f"did you mean {near[0]!r}?"
    )
  # The rule is for each number of a list.
  for number in typed if isinstance(typed, tuple) else (typed,):
    if isinstance(number, int | float) and not in_range(rule, number):
      must = f"in {rule}" if rule.startswith(("[", "(")) else rule or "finite"
      raise UserError(
        f"{where} must be {must}, got {value!r}; "
        f"the default is {field.default!r}"
      )
  return typed


def convert(kind: Any, value: Any) -> Any:
  """The value as exactly the field's type, or TypeError if it is another."""
  if inner := get_args(kind):
    if not isinstance(value, list | tuple):
      raise TypeError(value)
    return tuple(convert(inner[0], x) for x in value)
  # A bool is no number, although Python's bool is an int; an int is a float.
  fits = isinstance(value, int | float if kind is float else kind)
  if not fits or isinstance(value, bool) != (kind is bool):
    raise TypeError(value)
  return kind(value)


def parse_text(kind: Any, text: object) -> Any:
  """A flag's text as the field's type, or as it is where it is none."""
  if not isinstance(text, str):
    return text
  if inner := get_args(kind):
    parts = text.strip("()[] ").split(",")
    words = (part.strip().strip("'\"") for part in parts)
    return tuple(parse_text(inner[0], word) for word in words if word)
  if kind is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  if kind in NUMBERS and re.fullmatch(NUMBERS[kind], text):
    return kind(text)
  return text


def aliases(cls: type) -> dict[str, str]:
  """Earlier name -> name of the fields of a section."""
  fields = dataclasses.fields(cls)
  return {old: f.name for f in fields for old in f.metadata.get("alias", ())}


def current_names(
  cls: type, section: Mapping[str, V], path: str = "config"
) -> dict[str, V]:
  """The entries of a section, earlier names replaced by the fields' own."""
  renamed, names = {}, aliases(cls)
  for old, value in section.items():
    name = names.get(old, old)
    # Given by both names, or by two earlier ones.
    if name in renamed or (name != old and name in section):
      old = next(other for other in section if names.get(other) == name)
      raise UserError(
        f"{path}.{old} is now {path}.{name}, and both are given; "
        f"leave out {path}.{old}"
      )
    renamed[name] = value
  return renamed


def rename_aliases(
  cls: type, mapping: Mapping[str, Any], path: str = "config"
) -> dict[str, Any]:
  """A stored config (nested JSON) with today's field names, to compare it."""
  kinds, renamed = get_type_hints(cls), current_names(cls, mapping, path)
  for name, value in renamed.items():
    if dataclasses.is_dataclass(kinds.get(name)) and isinstance(value, Mapping):
      renamed[name] = rename_aliases(kinds[name], value, f"{path}.{name}")
  return renamed
