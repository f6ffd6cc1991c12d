"""report.html: one page that shows what a run did, from its folder alone.

It needs no network and no server, runs no foreign code and works for every
algorithm: whatever is in metrics.jsonl is plotted. Text from models and data
sets is escaped.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2

from jaxalign.core import best_of
from jaxalign.report import charts, overoptimization, samples
from jaxalign.runtime import environment, files, metrics
from jaxalign.runtime.console import short

NAME = "report.html"

# (title, unit, {metric: name of its curve}); any other metric gets a chart of
# its own. Only metrics of one unit share axes.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
  (
    "Reward",
    "reward model's logit",
    {
      "score/mean": "train",
      "test_score/mean": "held-out",
      "score/kept_mean": "train, kept",
    },
  ),
  ("Divergence from the reference", "nats a token", {"kl/mean": "KL"}),
  ("Length", "tokens", {"completion/tokens_mean": "mean of completions"}),
  (
    "Similarity of completions of different prompts",
    "0 = nothing in common, 1 = the same",
    {"diversity/overlap": "word overlap", "diversity/meteor": "METEOR, kept"},
  ),
  ("Loss", "", {"loss/total": "total", "loss/nll": "negative log-likelihood"}),
  (
    "Throughput",
    "sampled tokens a second",
    {"throughput/sampled_tokens_per_s": "sampled tokens"},
  ),
  (
    "Implicit rewards of pairs",
    "",
    {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
  ),
  (
    "Log-probabilities of pairs",
    "nats",
    {"logps/chosen": "chosen", "logps/rejected": "rejected"},
  ),
)
# Metric -> (title, whether a rise is good; None: neither).
_TILES = {
  "score/mean": ("Train reward", True),
  "test_score/mean": ("Held-out reward", True),
  "kl/mean": ("KL, nats a token", None),
  "diversity/overlap": ("Word overlap of completions", False),
  "completion/tokens_mean": ("Tokens a completion", None),
  "rewards/accuracies": ("Accuracy on pairs", True),
  "rewards/margins": ("Margin", True),
  "eval_accuracy": ("Held-out accuracy on pairs", True),
  "accuracy": ("Accuracy on pairs", True),
  "margin": ("Margin", True),
  "eval_loss/nll": ("Held-out loss", False),
  "objective/rlhf_reward": ("Reward", True),
  "objective/kl": ("KL", None),
  "loss/total": ("Loss", False),
}
_MOST_TILES = 5


class Tile(NamedTuple):
  """A headline metric: its first against its last quarter."""

  metric: str
  title: str
  first: float  # mean over the finite values of the first quarter of steps
  last: float  # and of the last
  good: bool | None  # None: no judgement


class BestOf(NamedTuple):
  """Rewards of the best of n completions, after `step` steps."""

  n: int
  step: int
  kl: float  # at most, nats a completion
  train: float
  held_out: float | None  # None without a held-out reward model


def write_report(folder: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into a run's folder.

  A function of the folder's files alone: the same run gives the same page.

  Args:
    folder: a run's folder, finished or not; the page leaves out whatever is
      missing in it.

  Returns:
    The page's path.
  """
  folder = pathlib.Path(folder)
  rows = metrics.read_jsonl(folder / metrics.METRICS)
  config, machine = (
    json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for path in (folder / "config.json", folder / environment.NAME)
  )

  # The head of the page. The folder is marked as finished after the report.
  names = [str(config[k]) for k in ("algorithm", "policy") if config.get(k)]
  done, steps = rows[-1]["step"] if rows else 0, config.get("steps") or 0
  if (folder / "finished.json").exists() or done == steps > 0:
    status = f"finished after {done} steps"
  else:
    status = f"{done} of {steps} steps so far" if steps else f"{done} steps"

  # What the rows hold, then the template.
  series = metric_series(rows)
  tiles = summary(series)
  turn = overoptimization.find_turn(overoptimization.validations(rows))
  panels, others = draw_charts(series)
  # Foreign text is escaped; a misspelt name in the template is an error.
  loader = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  loader.filters["short"] = short
  page = loader.get_template("page.html.j2").render(
    title=" · ".join(names) or folder.absolute().name,
    status=status,
    tiles=tiles,
    remarks=remarks(tiles, turn),
    panels=panels,
    others=others,
    best_of=best_of_table(series),
    samples=samples.pick_samples(folder / metrics.SAMPLES),
    config={k: json.dumps(v) for k, v in files.flatten(config).items()},
    environment=files.flatten(machine),
    width=charts.WIDTH,
    height=charts.HEIGHT,
  )
  files.write_atomic(folder / NAME, page)
  return folder / NAME


def metric_series(
  rows: Sequence[metrics.LogRow],
) -> dict[str, list[tuple[int, float]]]:
  """{metric: [(step, value), ...]} of metrics.jsonl; numbers only."""
  series: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    for name, value in row.items():
      if name != "step" and (number := metrics.number(value)) is not None:
        series.setdefault(name, []).append((row["step"], number))
  return series


def summary(series: Mapping[str, charts.Points]) -> list[Tile]:
  """First against last quarter of the headline metrics that a run has."""
  tiles = []
  for name, (title, rise_is_good) in _TILES.items():
    values = [v for _, v in series.get(name, ()) if math.isfinite(v)]
    if not values:
      continue
    quarter = max(1, len(values) // 4)
    first = math.fsum(values[:quarter]) / quarter
    last = math.fsum(values[-quarter:]) / quarter
    good = None
    if rise_is_good is not None and first != last:
      good = (last > first) == rise_is_good
    tiles.append(Tile(name, title, first, last, good))
  return tiles[:_MOST_TILES]


def remarks(
  tiles: Sequence[Tile], turn: overoptimization.Turn | None = None
) -> list[str]:
  """Sentences about what a reader should not overlook in tiles and curves."""
  by_name = {tile.metric: tile for tile in tiles}
  sentences = []
  train, test = by_name.get("score/mean"), by_name.get("test_score/mean")
  # The test with standard errors, or else first against last quarters.
  if turn:
    sentences.append(overoptimization.message(turn))
  elif train and test and train.good and test.good is False:
    sentences.append(
      "The train reward rose while the held-out reward fell: the policy may be "
      "learning the reward model's mistakes."
    )
  alike = by_name.get("diversity/overlap")
  if alike and alike.first > 0 and alike.last >= 1.5 * alike.first:
    sentences.append(
      "Completions of different prompts have become "
      f"{alike.last / alike.first:.1f} times as alike: the policy may have "
      "collapsed to a few completions. Read the samples."
    )
  return sentences


def best_of_table(series: Mapping[str, charts.Points]) -> list[BestOf]:
  """Reward against n at the last evaluation, n rising; [] if there is none."""
  matches = [re.fullmatch(r"eval_score/best_of_(\d+)", name) for name in series]
  rows = []
  for n in sorted(int(match[1]) for match in matches if match):
    step, train = series[f"eval_score/best_of_{n}"][-1]
    held_out = series.get(f"eval_test_score/best_of_{n}", [(step, None)])[-1][1]
    rows.append(BestOf(n, step, best_of.kl_bound(n), train, held_out))
  return rows


def draw_charts(
  series: Mapping[str, charts.Points],
) -> tuple[list[charts.Chart], list[charts.Chart]]:
  """The charts to look at first, and one for each of the other metrics.

  The times of a step's stages share a chart.
  """
  panels = []
  for title, unit, names in _PANELS:
    part = {names[n]: series[n] for n in names if n in series}
    panels.append(charts.draw(title, unit, part))
  used = {name for _, _, names in _PANELS for name in names}
  others, times = [], {}
  for name in sorted(series.keys() - used):
    if name.startswith("time/"):
      stage = name.removeprefix("time/").removesuffix("_s")
      times[stage] = series[name]
    else:
      others.append(charts.draw(name, "", {name: series[name]}))
  others.append(charts.draw("Time a step", "seconds", times))
  return [c for c in panels if c], [c for c in others if c]
