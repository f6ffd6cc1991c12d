"""How reward models are named: `a*0.5, b[alice=0.7, bob=0.3]`."""

import re

from jaxalign.config.fields import Rule

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MODEL = re.compile(rf"(.+?)\s*\*\s*({_NUMBER})")
_WEIGHED = re.compile(r"(.+?)\s*\[([^\[\]]*)\]")
_GROUP = re.compile(rf"\s*([^=]*[^=\s])\s*=\s*({_NUMBER})\s*")


def parse_models(text: str) -> tuple[tuple[str, float], ...]:
  """`a*0.5, b` -> (("a", 0.5), ("b", 1.0)); a `*` in a path stays in it.

  What stands in brackets behind a name is part of it, see `parse_groups`.
  """
  models = []
  for part in re.split(r",(?![^\[]*\])", text):
    name, weight = part.strip(), 1.0
    if found := _MODEL.fullmatch(name):
      name, weight = found[1], float(found[2])
    if name:
      models.append((name, weight))
  return tuple(models)


def parse_groups(name: str) -> tuple[str, dict[str, float]]:
  """`a[alice=0.7, bob=0.3]` -> ("a", {"alice": 0.7, "bob": 0.3})."""
  found = _WEIGHED.fullmatch(name)
  if found is None:
    return name, {}
  pairs = [_GROUP.fullmatch(part) for part in found[2].split(",")]
  return found[1], {pair[1]: float(pair[2]) for pair in pairs if pair}


def weighs_groups(field: str, *names: str) -> Rule:
  """The rule for what stands in brackets behind a model's name."""
  holds = all(name.count("[") == name.count("]") for name in names)
  for name in names:
    if found := _WEIGHED.fullmatch(name):
      holds &= len(parse_groups(name)[1]) == found[2].count(",") + 1
  return Rule(
    field,
    holds,
    "must give each group in brackets one weight",
    "write folder[alice=0.7,bob=0.3], without the brackets all count alike",
  )
