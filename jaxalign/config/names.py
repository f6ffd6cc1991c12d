"""How rewards are named: `a*0.5, b[alice=0.7, bob=0.3], FILE.py:FUNCTION`."""

import re

from jaxalign.config.rules import Rule

# A model `a*0.5`, a weighed one `a[...]`, and in its brackets `alice=0.7`.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MODEL = re.compile(rf"(.+?)\s*\*\s*({_NUMBER})")
_WEIGHED = re.compile(r"(.+?)\s*\[([^\[\]]*)\]")
_FUNCTION = re.compile(r".+\.py:\w+")
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


def is_function(name: str) -> bool:
  """Whether a name is `FILE.py:FUNCTION`, a function of the user."""
  return _FUNCTION.fullmatch(name) is not None


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


def names_function(field: str, *names: str) -> Rule:
  """The rule for a Python file in the place of a model."""
  # A missing function is not to be looked up as a model on the hub.
  bare = [name for name in names if re.search(r"\.py(:|$)", name)]
  return Rule(
    all(map(is_function, bare)),
    f"{field} must name a reward function as FILE.py:FUNCTION",
    "write my_rewards.py:correct for the function correct in my_rewards.py, "
    "my_rewards.py:correct*0.5 with a weight",
  )
