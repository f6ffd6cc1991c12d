"""What a mistyped name may have meant."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar, get_type_hints

from jaxalign.errors import UserError

P = TypeVar("P")


def nearest(name: str, names: Iterable[str]) -> list[str]:
  """Up to two names that a mistyped one may have meant."""
  return difflib.get_close_matches(name, list(names), 2, 0.6)


def choose_preset(presets: Mapping[str, P], name: str, file: str) -> P:
  """The preset of that name, or a UserError of that file's nearest names."""
  if name in presets:
    return presets[name]
  near = nearest(name, presets)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  raise UserError(
    f"{file} has no preset {name!r}; {hint}it has {', '.join(presets)}"
  )


def unknown_field(root: type, where: str) -> str:
  """The message for a path that is no field of the config class `root`."""
  section, _, name = where.rpartition(".")
  paths, scores = all_paths(root), {}
  for path, others in paths.items():
    home, _, leaf = path.rpartition(".")
    alike = max(likeness(name.lower(), word) for word in (leaf, *others))
    # The right name in the wrong section, and the name that another program
    # has, count as much as a typing mistake in the right section.
    scores[path] = alike + (0.15 if home == section else 0.0)
  best = sorted(scores, key=lambda path: -scores[path])[:3]
  # A near-certain match stands alone; doubtful ones are offered together.
  certain = scores[best[0]] >= 1.0
  best = best[:1] if certain else [p for p in best if scores[p] >= 0.72]
  if best:
    return f"{where} is not a field; did you mean {' or '.join(best)}?"
  section = section if section in paths else "config"
  split = [path.rpartition(".") for path in paths]
  here = ", ".join(leaf for home, _, leaf in split if home == section)
  return f"{where} is not a field; the fields of {section} are {here}"


def likeness(name: str, word: str) -> float:
  """In [0, 1]; `kl` is much like `kl_coefficient`, if not the same."""
  alike = difflib.SequenceMatcher(None, name, word).ratio()
  return max(alike, 0.75) if name in word.split("_") else alike


def all_paths(cls: type, path: str = "config") -> dict[str, tuple[str, ...]]:
  """Every field and section of a config class, with its other names."""
  kinds, paths = get_type_hints(cls), {}
  for f in dataclasses.fields(cls):
    where, known = f"{path}.{f.name}", f.metadata
    paths[where] = (*known.get("also", ()), *known.get("alias", ()))
    if dataclasses.is_dataclass(kinds[f.name]):
      paths |= all_paths(kinds[f.name], where)
  return paths


def run_together(cls: type, where: str, value: object) -> str:
  """`keep` = best_held_out -> `keep_best=held_out`; "" if no field is meant."""
  section, _, name = where.rpartition(".")
  for f in dataclasses.fields(cls):
    start = f.name.removeprefix(f"{name}_") + "_"
    if f.name.startswith(f"{name}_") and str(value).startswith(start):
      return f"{section}.{f.name}={str(value).removeprefix(start)}"
  return ""
