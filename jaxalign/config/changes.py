"""What may differ between two starts of a run, and what names another one."""

import fnmatch
import hashlib
import itertools
import json
import operator
import pathlib
import re

from jaxalign.config.rules import describe
from jaxalign.config.sections import TrainingConfig

# What a later start of a run may change: what is written, what is measured, and
# how the same numbers are computed, up to rounding. Patterns; `>0` = while the
# earlier and the new value are positive, because 0 would set no prompts aside.
# docs/checkpoints.md lists them.
MAY_CHANGE = (
  "checkpoint.*",
  "metrics.*",
  "mesh.*",
  "profile_steps",
  "compilation_cache",
  "remat",
  "attention",
  "micro_batch",
  "optimizer.offload",
  "length_buckets",  # fewer by default on TPUs
  "sampling.batch_prompts",
  "sampling.compact",
  "sampling.length_buckets",
  "scoring.batch_size",
  "scoring.length_buckets",
  "scoring.offload",
  "scoring.function_timeout",
  "max_bad_share",
  "max_exception_count",
  "validation_interval",
  "evaluation.interval>0",
  "evaluation.best_of_n",
)
# What `--extend` may change as well.
LENGTH = ("steps", "epochs")

# What a run is trained on -> what measures it on something held out.
HELD_OUT = {"reward_model": "test_reward_model", "data": "validation_data"}

# Of fields whose last name would say too little.
_SHORT = {
  "optimizer.learning_rate": "lr",
  "optimizer.name": "optimizer",
  "lora.rank": "lora",
}
_LONGEST = 60  # characters of a suffix before its hash
_LONGEST_TEXT = 24  # of a text in it


def may_change(
  name: str, old: object, new: object, rules: tuple[str, ...]
) -> bool:
  """Whether a field of a run may have another value than before.

  Args:
    name: dotted, below `config`.
    old: its value at the earlier start.
    new: its value now.
    rules: such as `MAY_CHANGE`.
  """
  for rule in rules:
    pattern, positive, _ = rule.partition(">0")
    both = bool(old) and bool(new)
    if fnmatch.fnmatchcase(name, pattern) and (both or not positive):
      return True
  return False


def suffix(
  config: TrainingConfig, preset: TrainingConfig, *, extend: bool = False
) -> str:
  """What tells a run's folder from its preset's, as `-lr3e-05-seed2`.

  Fields that a run may change on the way do not count. The same values give
  the same suffix, in whatever order they were set.

  Args:
    config: of the run.
    preset: without the command line's fields.
    extend: whether the run gets a new length, which does not count then.

  Returns:
    "" where nothing differs. Where it does not show all of the values, it ends
    in a hash of them.
  """
  rows = [row.path.removeprefix("config.") for row in describe(type(config))]
  last_names = [path.rpartition(".")[2] for path in rows]
  rules = MAY_CHANGE + (LENGTH if extend else ())
  # Left out where its partner, which is shown, is another one.
  follows = {(held_out, ""): name for name, held_out in HELD_OUT.items()}
  differing, parts, exact = {}, [], True
  for path in sorted(rows):
    new = operator.attrgetter(path)(config)
    try:
      old = operator.attrgetter(path)(preset)
    except AttributeError:  # the command line chose another method
      old = None
    # Steps of 0 follow from the epochs, which are shown.
    if (
      old == new or may_change(path, 1, 1, rules) or (path, new) == ("steps", 0)
    ):
      continue
    other = follows.get((path, new), "")
    if other and getattr(config, other) != getattr(preset, other, None):
      continue
    differing[path] = new
    last = path.rpartition(".")[2]
    clear = "." not in path or last_names.count(last) == 1
    name = _SHORT.get(path, last if clear else path.replace(".", "_"))
    value, whole = _show(new)
    parts.append(f"-{name}{value}")
    exact &= whole
  ends = itertools.accumulate(map(len, parts))
  shown = [
    part for part, end in zip(parts, ends, strict=True) if end <= _LONGEST
  ]
  text = "".join(shown)
  if exact and shown == parts:
    return text
  values = json.dumps(differing, sort_keys=True)
  return f"{text}-{hashlib.sha256(values.encode()).hexdigest()[:6]}"


def _show(value: object) -> tuple[str, bool]:
  """A value in a folder's name, and whether it shows all of it."""
  if isinstance(value, bool):
    return f"-{str(value).lower()}", True
  if isinstance(value, int | float):
    short = f"{value:g}"
    return (short if float(short) == value else repr(value)), True
  words = value if isinstance(value, tuple) else (value,)
  whole = "+".join(map(str, words))
  # Of a path its last name.
  text = "+".join(pathlib.PurePath(str(word)).name for word in words)
  text = re.sub(r"[^\w.+-]+", "_", text)[:_LONGEST_TEXT]
  return f"-{text}", text == whole
