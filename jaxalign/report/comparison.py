"""Several runs on one page: their settings, their numbers, their curves.

Runs that differ in nothing but their seed are one group: one color, the mean
as a line, and a band from the least to the greatest seed.
"""

import fnmatch
import json
import math
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.config.changes import MAY_CHANGE, may_change
from jaxalign.errors import UserError
from jaxalign.report import charts, logged, page
from jaxalign.runtime import files

_UNITS = ((3 * 3600, 3600, "hours"), (600, 60, "minutes"), (0, 1, "seconds"))
_ABSENT = "–"
# Name of an x axis, and the metric whose sum it is.
_COUNTED = {"tokens": "num_tokens", "sampled tokens": "num_sampled_tokens"}

# Step -> (x, finite value) of a run, steps rising.
Track = dict[int, tuple[int | float, float]]
# Name of an x axis -> run's folder -> step -> x.
Axes = dict[str, dict[pathlib.Path, dict[int, int | float]]]


class Group(NamedTuple):
  """Runs of one config, their seeds aside."""

  name: str  # no other group has it
  runs: list[logged.LoggedRun]
  config: dict[str, object]  # dotted name -> value, without the seed


class Cell(NamedTuple):
  """What a group reached in a metric."""

  last: float  # mean over the last quarter of the steps, and over the runs
  spread: float | None  # standard deviation over the runs, if they are several
  best: float | None  # of the runs' means; None where neither end is better
  step: int | None  # of `best`


class Panel(NamedTuple):
  """A metric's chart over each of the x axes that its runs have."""

  title: str
  curves: list[str]  # names of the groups; "" where a group lacks the metric
  plots: dict[str, charts.Chart]  # by x axis


def write_comparison(
  runs: Sequence[logged.LoggedRun],
  out: pathlib.Path,
  patterns: Sequence[str] = (),
) -> None:
  """Writes a page that compares runs.

  Args:
    runs: at least one.
    out: the page, replaced if it is there.
    patterns: of metrics, such as `eval_*`; () = all.

  Raises:
    UserError: no run has a metric that a pattern fits.
  """
  groups = group_runs(runs)
  series = {run.folder: run.series for run in runs}
  names = {name for metrics in series.values() for name in metrics}
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      known = ", ".join(sorted(names, key=logged.metric_order))
      raise UserError(
        f"--metrics {pattern}: no run has such a metric; they have {known}"
      )
  if patterns:
    names = {
      name
      for name in names
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
  # The metrics of the report's head come first, in its order.
  headlines = [name for name in page.HEADLINES if name in names]
  rest = sorted(names - set(headlines), key=logged.metric_order)

  axes = x_axes(runs)
  panels = {
    name: draw_panel(name, groups, axes) for name in (*headlines, *rest)
  }
  shared, partial = differing_fields(groups)
  html = page.render(
    "compare.html.j2",
    groups=groups,
    facts=[group_facts(group) for group in groups],
    shared=shared,
    partial=partial,
    results={
      name: cells
      for name in headlines
      if any(cells := [result(name, group) for group in groups])
    },
    axes=list(axes),
    panels=[panels[name] for name in headlines if panels[name].plots],
    others=[panels[name] for name in rest if panels[name].plots],
    shown=bool(patterns),
    bands=any(len(group.runs) > 1 for group in groups),
    # Their difference to the other runs may be chance.
    single=len(groups) > 1 and any(len(group.runs) == 1 for group in groups),
  )
  out.write_bytes(html)


def group_runs(runs: Sequence[logged.LoggedRun]) -> list[Group]:
  """Puts runs together that differ in nothing but their seed.

  Args:
    runs: distinct folders. A run without a config.json stays alone.

  Returns:
    The groups in the order of their first runs.
  """
  by_config: dict[str, list[logged.LoggedRun]] = {}
  configs = {}
  for run in runs:
    # Other values of what a run may change on the way make no other curve.
    flat = {
      name: value
      for name, value in files.flatten(run.config).items()
      if name != "seed" and not may_change(name, value, 1, MAY_CHANGE)
    }
    key = json.dumps(flat, sort_keys=True) if flat else str(run.folder)
    by_config.setdefault(key, []).append(run)
    configs[key] = flat
  names = group_names([[r.folder for r in part] for part in by_config.values()])
  return [
    Group(name, part, configs[key])
    for name, (key, part) in zip(names, by_config.items(), strict=True)
  ]


def group_names(groups: Sequence[Sequence[pathlib.Path]]) -> list[str]:
  """Short names for groups of folders, each another one.

  One folder gives its own name, several what their names begin with. Groups
  of one name get as many folders above as tell them apart.
  """
  parts = [[folder.absolute().parts for folder in group] for group in groups]
  deepest = max(len(folder) for group in parts for folder in group)
  first: list[str] = []
  for depth in range(1, deepest + 1):
    names = []
    for group in parts:
      tails = ["/".join(folder[-depth:]) for folder in group]
      common = tails[0]
      if len(tails) > 1:
        # What is left of "run-seed-0" and "run-seed-1" is "run".
        while not all(tail.startswith(common) for tail in tails):
          common = common[:-1]
        common = re.sub(r"[-_. /]*(\b|_)(seed|s)?[-_. /=]*$", "", common)
        common = f"{common or tails[0]} ({len(tails)} runs)"
      names.append(common)
    if len(set(names)) == len(names):
      return names
    first = first or names
  # Seeds of two configs side by side, under names that begin alike.
  return [f"{i}: {name}" for i, name in enumerate(first, 1)]


def differing_fields(
  groups: Sequence[Group],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
  """The fields of the config that differ.

  Returns:
    {field: its value in each group}, first those that all groups have, then
    those that only some have, because their methods differ.
  """
  fields = {name: None for group in groups for name in group.config}
  table = {
    name: [
      json.dumps(group.config[name]) if name in group.config else _ABSENT
      for group in groups
    ]
    for name in fields
  }
  table = {name: row for name, row in table.items() if len(set(row)) > 1}
  shared = {name: row for name, row in table.items() if _ABSENT not in row}
  return shared, {n: row for n, row in table.items() if n not in shared}


def group_facts(group: Group) -> list[dict[str, str]]:
  """What the page says of each run of a group."""
  facts = []
  for run in group.runs:
    seed = run.config.get("seed")
    fact = {} if seed is None else {"Seed": str(seed)}
    fact |= {"State": run.status}
    known = run.facts()
    wanted = ("Started", "Duration", "Machine", "Command")
    fact |= {title: known[title] for title in wanted if title in known}
    facts.append({"Folder": str(run.folder), **fact})
  return facts


def result(metric: str, group: Group) -> Cell | None:
  """What the runs of a group reached in a metric; None if none has it."""
  ends, bests, rise_is_good = [], [], page.HEADLINES[metric][1]
  # Next to another loss it is not what is minimized.
  if metric == "loss/nll" and "loss/total" in group.runs[0].series:
    rise_is_good = None
  for run in group.runs:
    points = [
      (v, step) for step, v in run.series.get(metric, ()) if math.isfinite(v)
    ]
    if points:
      quarter = points[-max(1, len(points) // 4) :]
      ends.append(math.fsum(v for v, _ in quarter) / len(quarter))
      bests.append(max(points) if rise_is_good else min(points))
  if not ends:
    return None
  best = step = None
  if rise_is_good is not None:
    best, step = max(bests) if rise_is_good else min(bests)
  spread = statistics.stdev(ends) if len(ends) > 1 else None
  return Cell(math.fsum(ends) / len(ends), spread, best, step)


def x_axes(runs: Sequence[logged.LoggedRun]) -> Axes:
  """The x axes that a run has numbers for, the steps first.

  A folder is absent from an axis where its run does not say.
  """
  axes: Axes = {
    "step": {
      run.folder: {r["step"]: r["step"] for r in run.rows} for run in runs
    }
  }
  for name, metric in _COUNTED.items():
    sums = {run.folder: dict(run.summed(metric)) for run in runs}
    axes[name] = {folder: xs for folder, xs in sums.items() if xs}
  # Time, in a unit that suits the longest run.
  seconds = {run.folder: run.summed("time/step_s") for run in runs}
  seconds = {folder: xs for folder, xs in seconds.items() if xs}
  longest = max((xs[-1][1] for xs in seconds.values()), default=0.0)
  size, unit = next((s, u) for least, s, u in _UNITS if longest >= least)
  axes[f"{unit} in steps"] = {
    folder: {step: x / size for step, x in xs} for folder, xs in seconds.items()
  }
  return {name: axis for name, axis in axes.items() if axis}


def draw_panel(metric: str, groups: Sequence[Group], axes: Axes) -> Panel:
  """A metric of all groups over each axis; `axes` as `x_axes` gives them."""
  plots, curves = {}, [""] * len(groups)
  for axis, xs in axes.items():
    lines = []
    for i, group in enumerate(groups):
      tracks = []
      for run in group.runs:
        at = xs.get(run.folder, {})
        points = run.series.get(metric, ())
        tracks.append(
          {s: (at[s], v) for s, v in points if s in at and math.isfinite(v)}
        )
      tracks = [track for track in tracks if track]
      lines.append(group_line(group.name, tracks))
      curves[i] = group.name if tracks else curves[i]
    chart = charts.draw_lines(metric, "", axis, lines)
    if chart is not None:
      plots[axis] = chart
  return Panel(metric, curves, plots)


def group_line(name: str, tracks: Sequence[Track]) -> charts.Line:
  """The curve of a run, or mean, band and thin curves of several.

  The mean and the band end where the first of the runs does: a mean over
  other runs would jump there.
  """
  if not tracks:
    return charts.Line(name, ())
  if len(tracks) == 1:
    return charts.line(name, list(tracks[0].values()))
  thin = [
    charts.smoothed(charts.thinned(list(track.values()))) for track in tracks
  ]
  # The steps that all have: each run's x and value there, smoothed alike.
  common = sorted(set.intersection(*(set(track) for track in tracks)))
  columns = [
    charts.smoothed(charts.thinned([track[step] for step in common]))
    for track in tracks
  ]
  points, band = [], []
  for places in zip(*columns, strict=True):
    values = [v for _, v in places]
    x = math.fsum(x for x, _ in places) / len(places)
    points.append((x, math.fsum(values) / len(values)))
    band.append((min(values), max(values)))
  return charts.Line(name, points, thin, band)
