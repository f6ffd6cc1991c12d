"""report.html: one page that shows what a run did, from its folder alone.

It needs no network and no server, runs no foreign code and works for every
algorithm: whatever is in metrics.jsonl is plotted. Text from models and data
sets is escaped.
"""

import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2

from jaxalign.core import best_of
from jaxalign.report import charts, logged, overoptimization, samples
from jaxalign.runtime import files, metrics
from jaxalign.runtime.console import short

NAME = "report.html"

# (title, unit, {metric: name of its curve}); any other metric gets a chart of
# its own. Only metrics of one unit share axes.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
  (
    "Reward",
    "reward model's logit",
    {"score/mean": "train", "test_score/mean": "held-out"},
  ),
  (
    "Reward of the completions that are kept",
    "reward model's logit",
    {"score/kept_mean": "train", "test_score/kept_mean": "held-out"},
  ),
  ("Divergence from the reference", "nats a token", {"kl/mean": "KL"}),
  ("Length", "tokens", {"completion/tokens_mean": "mean of completions"}),
  (
    "Similarity of completions of different prompts",
    "0 = nothing in common, 1 = the same",
    {"diversity/overlap": "word overlap", "diversity/meteor": "METEOR, kept"},
  ),
  ("Loss", "", {"loss/total": "total", "eval_loss/total": "held-out"}),
  (
    "Negative log-likelihood",
    "nats a token",
    {"loss/nll": "trained on", "eval_loss/nll": "held-out"},
  ),
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
# Of the completions of held-out prompts: title -> metrics, up to their n.
_BEST_OF = {
  "Reward of the best of n": "eval_score/best_of_",
  "Held-out reward of the best of n": "eval_test_score/best_of_",
}
# Metric -> (title, whether a rise is good; None: neither).
HEADLINES = {
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
  "loss/nll": ("Loss", False),
}
_MOST_TILES = 5
# Standard errors. Of series of noise alone, 4 to 400 values long, 1 to 5 % have
# a change beyond that.
_NOISE = 2.5


class Tile(NamedTuple):
  """A headline metric: its first against its last quarter."""

  metric: str
  title: str
  first: float  # mean over the finite values of the first quarter of steps
  last: float  # and of the last
  change: str  # "better", "worse" or "", for a change beyond the noise
  noise: bool  # whether the change is within the noise


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
  run = logged.read_run(folder, empty=True)
  config = run.config
  names = [str(config[k]) for k in ("algorithm", "policy") if config.get(k)]
  series = run.series
  tiles = summary(series)
  turn = overoptimization.find_turn(overoptimization.validations(run.rows))
  panels, others = draw_charts(series)
  page = render(
    "page.html.j2",
    title=" · ".join(names) or run.folder.absolute().name,
    status=run.status,
    facts=run.facts(),
    tiles=tiles,
    remarks=remarks(tiles, turn),
    panels=panels,
    others=others,
    best_of=best_of_table(series),
    samples=samples.pick_samples(run.folder / metrics.SAMPLES),
    config={k: json.dumps(v) for k, v in files.flatten(config).items()},
    environment=files.flatten(run.machine),
  )
  files.write_atomic(run.folder / NAME, page)
  return run.folder / NAME


def render(template: str, **values: object) -> bytes:
  """A page from a template of this folder, as UTF-8.

  Args:
    template: its file name.
    **values: what the template shows; texts in it are escaped.
  """
  loader = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,  # a misspelt name is an error
  )
  loader.filters["short"] = short
  page = loader.get_template(template).render(values, box=charts)
  # A lone surrogate, in a file's name or a model's text, has no UTF-8 form.
  return page.encode("utf-8", "replace")


def summary(series: Mapping[str, charts.Points]) -> list[Tile]:
  """First against last quarter of the headline metrics that a run has.

  A change is called better or worse if it is more than 2.5 times its standard
  error σ √(2 / n), n the values in a quarter. σ² is half the mean squared step
  from one value to the next, which a trend hardly changes.
  """
  tiles = []
  for name, (title, rise_is_good) in HEADLINES.items():
    values = [v for _, v in series.get(name, ()) if math.isfinite(v)]
    # The tile of the loss shows what is minimized.
    if not values or (name == "loss/nll" and "loss/total" in series):
      continue
    n = max(1, len(values) // 4)
    first = math.fsum(values[:n]) / n
    last = math.fsum(values[-n:]) / n
    steps = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    variance = math.fsum(steps) / (2 * max(1, len(steps)))
    noise = abs(last - first) <= _NOISE * math.sqrt(2 * variance / n)
    # Nor is a change called one that the rounding of both numbers hides.
    noise = noise or short(first) == short(last)
    change = ""
    if rise_is_good is not None and not noise:
      change = "better" if (last > first) == rise_is_good else "worse"
    tiles.append(Tile(name, title, first, last, change, noise))
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
  elif train and test and train.change == "better" and test.change == "worse":
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
    rows.append(BestOf(n, int(step), best_of.kl_bound(n), train, held_out))
  return rows


def draw_charts(
  series: Mapping[str, charts.Points],
) -> tuple[list[charts.Chart], list[charts.Chart]]:
  """The charts to look at first, and one for each of the other metrics.

  The best of 1, 2, 4 ... completions share a chart, and so do the times of a
  step's stages.
  """
  names = sorted(series, key=logged.metric_order)
  panels = []
  for title, unit, curves in _PANELS:
    part = {curves[n]: series[n] for n in curves if n in series}
    panels.append(charts.draw(title, unit, part))
  used = {name for _, _, curves in _PANELS for name in curves}
  for title, prefix in _BEST_OF.items():
    best = {n.removeprefix(prefix): n for n in names if n.startswith(prefix)}
    part = {f"best of {n}": series[name] for n, name in best.items()}
    panels.append(charts.draw(title, "reward model's logit", part))
    used |= set(best.values())
  others, times = [], {}
  for name in names:
    if name.startswith("time/"):
      stage = name.removeprefix("time/").removesuffix("_s")
      times[stage] = series[name]
    elif name not in used:
      others.append(charts.draw(name, "", {name: series[name]}))
  others.append(charts.draw("Time a step", "seconds", times))
  return [c for c in panels if c], [c for c in others if c]
