"""A run as its folder's files tell it: settings, machine and metrics."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re

from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.runtime import environment, metrics
from jaxalign.runtime.console import duration

# What a page says of a run first: title -> fields of its config, the first that
# has a value.
_FACTS = {
  "Model": ("policy",),
  "Data": ("data", "prompts"),
  "Reward model": ("reward_model",),
  "Held-out reward model": ("test_reward_model",),
}


@dataclasses.dataclass(frozen=True)
class LoggedRun:
  """What a run's folder says."""

  folder: pathlib.Path
  config: JsonObject  # {} without config.json
  machine: JsonObject  # environment.json, or {}
  rows: list[metrics.LogRow]  # of metrics.jsonl, steps rising

  @functools.cached_property
  def series(self) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value), ...]}; numbers only, NaN and infinities too."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in self.rows:
      for name, value in row.items():
        if name != "step" and (number := metrics.number(value)) is not None:
          series.setdefault(name, []).append((row["step"], number))
    return series

  def summed(self, metric: str) -> list[tuple[int, float]]:
    """(step, sum since the beginning) of what a metric says of each step.

    A line stands for the steps since the line before it, of which
    `metrics.every_steps` may have left out some.
    """
    total, before, sums = 0.0, 0, []
    for step, value in self.series.get(metric, ()):
      if math.isfinite(value):
        total += value * (step - before)
        before = step
        sums.append((step, total))
    return sums

  @property
  def status(self) -> str:
    """How far the run is, such as "40 of 80 steps so far"."""
    done = self.rows[-1]["step"] if self.rows else 0
    steps = self.config.get("steps") or 0
    # The folder is marked as finished after its report is written.
    if (self.folder / "finished.json").exists() or done == steps > 0:
      return f"finished after {done} steps"
    return f"{done} of {steps} steps so far" if steps else f"{done} steps"

  def facts(self) -> dict[str, str]:
    """What a reader asks first: command, model, data, date and duration."""
    facts = {"Command": str(self.machine.get("command") or "")}
    for title, fields in _FACTS.items():
      values = [str(self.config[f]) for f in fields if self.config.get(f)]
      facts[title] = values[0] if values else ""
    facts["Started"] = str(self.machine.get("started_at") or "")
    if seconds := self.summed("time/step_s"):
      facts["Duration"] = f"{duration(seconds[-1][1])} in steps"
    facts["Machine"] = str(self.machine.get("devices") or "")
    return {title: text for title, text in facts.items() if text}


def read_run(folder: str | os.PathLike, *, empty: bool = False) -> LoggedRun:
  """Reads a run's folder, while it runs or later.

  Args:
    folder: a run's `--workdir`.
    empty: whether it may lack metrics.

  Returns:
    The run. Of a step that stands in two lines the later one counts.

  Raises:
    UserError: no such folder, no metrics in it, or a damaged file.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    state = "is a file" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {state}; name the folder of a run (--workdir)")
  log = folder / metrics.METRICS
  rows: dict[int, metrics.LogRow] = {}
  lines = metrics.iterate_jsonl(log)
  for count in itertools.count(1):
    try:
      row = next(lines, None)
    except ValueError as error:  # neither JSON nor UTF-8
      raise UserError(
        f"{log} line {count} is not JSON ({error}); take the line out"
      ) from error
    if row is None:
      break
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
      raise UserError(f"{log} line {count} has no step; take the line out")
    rows[row["step"]] = row
  if not rows and not empty:
    inside = sorted(str(p.parent) for p in folder.glob(f"*/{metrics.METRICS}"))
    hint = f"did you mean {' '.join(inside[:3])}?" if inside else "is it a run?"
    raise UserError(f"{folder} has no metrics in {metrics.METRICS}; {hint}")
  return LoggedRun(
    folder,
    _read_object(folder / "config.json"),
    _read_object(folder / environment.NAME),
    [rows[step] for step in sorted(rows)],
  )


def metric_order(name: str) -> list[tuple[str, int]]:
  """A key that sorts `best_of_2` before `best_of_16`."""
  parts = re.findall(r"(\D*)(\d*)", name, re.ASCII)
  return [(words, int(digits or -1)) for words, digits in parts]


def _read_object(path: pathlib.Path) -> JsonObject:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); fix it") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object; fix it")
  return value
