"""How reward models are named: `a*0.5, b[alice=0.7, bob=0.3]`."""

import re

from jaxalign.config.rules import Rule

# A model `a*0.5`, a weighed one `a[...]`, and in its brackets `alice=0.7`.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MODEL = re.compile(rf"(.+?)\s*\*\s*({_NUMBER})")
_WEIGHED = re.compile(r"(.+?)\s*\[([^\[\]]*)\]")
_GROUP = re.compile(rf"\s*([^=]*[^=\s])\s*=\s*({_NUMBER})\s*")


def parse_models(text: str) -> tuple[tuple[str, float], ...]:
  """`a*0.5, b` -> (("a", 0.5), ("b", 1.0)); a `*` in a path stays in it.

  Brackets after a name are part of it, see `parse_groups`.
  """
  models = []
  # A comma inside brackets separates groups, not models.
  for part in re.split(r",(?![^\[]*\])", text):
    name, weight = part.strip(), 1.0
    if match := _MODEL.fullmatch(name):
      name, weight = match[1], float(match[2])
    if name:
      models.append((name, weight))
  return tuple(models)


def parse_groups(name: str) -> tuple[str, dict[str, float]]:
  """`a[alice=0.7, bob=0.3]` -> ("a", {"alice": 0.7, "bob": 0.3})."""
  match = _WEIGHED.fullmatch(name)
  if match is None:
    return name, {}
  pairs = [_GROUP.fullmatch(part) for part in match[2].split(",")]
  return match[1], {pair[1]: float(pair[2]) for pair in pairs if pair}


def weighs_groups(field: str, *names: str) -> Rule:
  """The rule for the brackets after a model's name."""
  holds = all(name.count("[") == name.count("]") for name in names)
  for name in names:
    # A group without a weight, or given twice, is missing from the dict.
    if match := _WEIGHED.fullmatch(name):
      holds &= len(parse_groups(name)[1]) == match[2].count(",") + 1
  return Rule(
    holds,
    f"{field} must give each group in brackets one weight",
    "write folder[alice=0.7,bob=0.3], without the brackets all count alike",
  )
