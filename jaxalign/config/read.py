"""Mapping -> frozen dataclass: the one place where a config is validated.

Every mistake is a `UserError` of one line: the full path, the rule, the value,
the remedy.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, get_type_hints

from jaxalign.config.fields import (
  convert,
  fits,
  in_range,
  parse_text,
  type_name,
)
from jaxalign.errors import UserError


def read(
  cls: type, mapping: Any, path: str = "config", root: Any = None
) -> Any:
  """Builds `cls` from a mapping, checking names, types, ranges and rules.

  Args:
    cls: a config dataclass; nested dataclasses are its sections.
    mapping: anything with `items()`: a dict, a ConfigDict, parsed JSON.
    path: name of this section in messages.
    root: the whole config's class, searched for the nearest names.

  Raises:
    UserError: the first mistake found.
  """
  root = root or cls
  kinds = get_type_hints(cls)
  if not hasattr(mapping, "items"):
    raise UserError(
      f"{path} must be a section of fields, got {mapping!r}; "
      f"set one of {path}.{{{', '.join(kinds)}}}"
    )
  values = {}
  for name, value in mapping.items():
    where = f"{path}.{name}"
    if name not in kinds:
      raise UserError(unknown_field(root, where))
    if dataclasses.is_dataclass(kinds[name]):
      values[name] = read(kinds[name], value, where, root)
    else:
      values[name] = read_value(cls, name, kinds[name], value, where)
  config = cls(**values)
  for rule in config.rules() if hasattr(config, "rules") else ():
    if not rule.holds:
      got = config
      for part in rule.field.split("."):
        got = getattr(got, part)
      raise UserError(
        f"{path}.{rule.field} {rule.must}, got {got!r}; {rule.remedy}"
      )
  return config


def read_value(cls: type, name: str, kind: Any, value: Any, where: str) -> Any:
  """One field's value, of its type and within its range or choices."""
  field = next(f for f in dataclasses.fields(cls) if f.name == name)
  choices, rule = field.metadata["choices"], field.metadata["rule"]
  if not fits(kind, value):
    remedy = f"write it like the default {field.default!r}"
    if meant := run_together(cls, where, value):
      remedy = f"did you mean {meant}?"
    raise UserError(
      f"{where} must be {type_name(kind)}, got {value!r} "
      f"({type(value).__name__}); {remedy}"
    )
  if choices and value not in choices:
    near = difflib.get_close_matches(value, choices, 1) or [field.default]
    raise UserError(
      f"{where} must be one of {', '.join(choices)}, got {value!r}; "
      f"did you mean {near[0]!r}?"
    )
  numbers = value if isinstance(value, list | tuple) else [value]
  numeric = all(isinstance(x, int | float) for x in numbers)
  if numeric and not all(in_range(rule, x) for x in numbers):
    must = f"be {rule}".replace("be [", "be in [").replace("be (", "be in (")
    raise UserError(
      f"{where} must {must if rule else 'be finite'}, got {value!r}; "
      f"the default is {field.default!r}"
    )
  return convert(kind, value)


def run_together(cls: type, where: str, value: Any) -> str:
  """`keep` = best_held_out -> `keep_best=held_out`; "" if no field is meant."""
  section, _, name = where.rpartition(".")
  for f in dataclasses.fields(cls):
    start = f.name.removeprefix(f"{name}_") + "_"
    if f.name.startswith(f"{name}_") and str(value).startswith(start):
      return f"{section}.{f.name}={str(value).removeprefix(start)}"
  return ""


def override(cls: type, mapping: Any, flags: Sequence[tuple[str, str]]) -> dict:
  """A mapping with `--config.path=text` flags put in, typed as their fields.

  Args:
    cls: the config's class, which knows the types.
    mapping: what the config file gave.
    flags: (path below `config`, text) pairs; of equal paths the last counts.

  Raises:
    UserError: a path that is no field.
  """
  result = plain(mapping)
  for path, text in flags:
    value = parse_text(kind_at(cls, path), text)
    *sections, last = path.split(".")
    inner = result
    for name in sections:
      inner = inner.setdefault(name, {})
      if not isinstance(inner, dict):  # `read` says what it has to be
        return result
    inner[last] = value
  return result


def kind_at(cls: type, path: str) -> Any:
  """The type of the field at a path below `config`."""
  kind, where = cls, "config"
  for name in path.split("."):
    if not dataclasses.is_dataclass(kind):
      raise UserError(
        f"config.{path} is not a field, because {where} is a single value; "
        f"set {where} itself"
      )
    kinds, where = get_type_hints(kind), f"{where}.{name}"
    if name not in kinds:
      raise UserError(unknown_field(cls, f"config.{path}"))
    kind = kinds[name]
  return kind


def plain(mapping: Any) -> Any:
  """Nested mappings (ConfigDict included) as nested dicts, a copy."""
  if not hasattr(mapping, "items"):
    return mapping
  return {name: plain(value) for name, value in mapping.items()}


def unknown_field(root: type, where: str) -> str:
  """The message for a name that is no field, with the nearest that are."""
  near = nearest_fields(root, where)
  if near:
    return f"{where} is not a field; did you mean {' or '.join(near)}?"
  section = where.rpartition(".")[0] + "."
  paths = all_paths(root)
  if not any(path.startswith(section) for path in paths):
    section = "config."
  names = [p.removeprefix(section) for p in paths if p.startswith(section)]
  here = ", ".join(name for name in names if "." not in name)
  return f"{where} is not a field; the fields of {section[:-1]} are {here}"


def nearest_fields(root: type, where: str) -> list[str]:
  """Up to three field paths that a mistyped path may have meant.

  A name that is right in another section, and a name that other programs use
  (`also`), count as much as a typing mistake in the right place.
  """
  section, _, name = where.rpartition(".")
  scores = {}
  for path, also in all_paths(root).items():
    home, _, leaf = path.rpartition(".")
    alike = max(likeness(name.lower(), word) for word in (leaf, *also))
    scores[path] = alike + (0.15 if home == section else 0.0)
  best = sorted(scores, key=lambda path: -scores[path])[:3]
  # A near-certain match stands alone; doubtful ones are offered together.
  if scores[best[0]] >= 1.0:
    return best[:1]
  return [path for path in best if scores[path] >= 0.72]


def likeness(name: str, word: str) -> float:
  """In [0, 1]; `kl` is much like `kl_coefficient`, if not the same."""
  alike = difflib.SequenceMatcher(None, name, word).ratio()
  return max(alike, 0.75) if name in word.split("_") else alike


def all_paths(cls: type, path: str = "config") -> dict[str, tuple[str, ...]]:
  """Every field and section of a config, with its names elsewhere."""
  kinds, found = get_type_hints(cls), {}
  for f in dataclasses.fields(cls):
    where = f"{path}.{f.name}"
    found[where] = f.metadata["also"]
    if dataclasses.is_dataclass(kinds[f.name]):
      found |= all_paths(kinds[f.name], where)
  return found
