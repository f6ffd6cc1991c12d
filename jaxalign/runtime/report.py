"""report.html: one page that tells what a run did, from its folder alone.

It needs no network and no server, runs no code of anybody else's, and works
for every algorithm: what is in metrics.jsonl is plotted. Text from models and
data sets is escaped.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jaxalign.core import best_of
from jaxalign.runtime import charts, environment, files, gallery, metrics, watch
from jaxalign.runtime.view import short

NAME = "report.html"

# (title, unit, {metric: name of its curve}); what is not here gets a chart of
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
  ("Divergence from the start", "nats a token", {"kl/mean": "KL"}),
  ("Length", "tokens", {"completion/tokens_mean": "mean of completions"}),
  (
    "Likeness of answers to different prompts",
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
    "Rewards of pairs",
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
  "diversity/overlap": ("Word overlap of answers", False),
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


def write_report(folder: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into a run's folder.

  A function of the folder's files alone: the same run gives the same page.

  Args:
    folder: a run's folder, finished or not; whatever is missing in it is left
      out of the page.

  Returns:
    The page's path.
  """
  folder = pathlib.Path(folder)
  rows = metrics.read_jsonl(folder / metrics.METRICS)
  config = _json(folder / "config.json")
  series = metric_series(rows)
  tiles = summary(series)
  environment_ = files.flatten(_json(folder / environment.NAME))
  page = _template().render(
    title=_title(folder, config),
    status=_status(rows, config, (folder / "finished.json").exists()),
    tiles=tiles,
    remarks=remarks(tiles, watch.find_turn(watch.validations(rows))),
    panels=draw_panels(series),
    others=draw_others(series),
    best_of=best_of_table(series),
    samples=gallery.pick_samples(folder / metrics.SAMPLES),
    config={k: json.dumps(v) for k, v in files.flatten(config).items()},
    environment=environment_,
    width=charts.WIDTH,
    height=charts.HEIGHT,
  )
  files.write_atomic(folder / NAME, page)
  return folder / NAME


def metric_series(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[int, float]]]:
  """{metric: [(step, value), ...]}; what is no number is left out."""
  series: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    for name, value in row.items():
      if name != "step" and (number := metrics.number(value)) is not None:
        series.setdefault(name, []).append((row["step"], number))
  return series


def summary(
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> list[dict[str, Any]]:
  """First against last quarter of the headline metrics a run has.

  Returns:
    Tiles {"metric", "title", "first", "last" (means over the quarters'
    finite values), "good" (True, False, or None: no judgement)}.
  """
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
    tiles.append(
      {
        "metric": name,
        "title": title,
        "first": first,
        "last": last,
        "good": good,
      }
    )
  return tiles[:_MOST_TILES]


def remarks(
  tiles: Sequence[Mapping[str, Any]], turn: watch.Turn | None = None
) -> list[str]:
  """What a reader should not overlook in `summary`'s numbers and the curves."""
  by_name = {tile["metric"]: tile for tile in tiles}
  found = []
  train, test = by_name.get("score/mean"), by_name.get("test_score/mean")
  if turn:
    found.append(watch.told(turn))
  elif train and test and train["good"] and test["good"] is False:
    found.append(
      "The train reward rose while the held-out reward fell: the policy may be "
      "learning the reward model's mistakes."
    )
  alike = by_name.get("diversity/overlap")
  if alike and alike["first"] > 0 and alike["last"] >= 1.5 * alike["first"]:
    found.append(
      f"Answers to different prompts have become "
      f"{alike['last'] / alike['first']:.1f} times as alike: the policy may "
      "have collapsed to a few answers. Read the samples."
    )
  return found


def best_of_table(
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> list[dict[str, Any]]:
  """Reward against N at the last evaluation, N rising; [] if there is none.

  Returns:
    Rows {"n", "step", "kl" (at most, nats an answer), "train", "held_out"
    (None without a held-out reward model)}.
  """
  sizes = [re.fullmatch(r"eval_score/best_of_(\d+)", name) for name in series]
  rows = []
  for n in sorted(int(found[1]) for found in sizes if found):
    step, train = series[f"eval_score/best_of_{n}"][-1]
    held_out = series.get(f"eval_test_score/best_of_{n}")
    rows.append(
      {
        "n": n,
        "step": step,
        "kl": best_of.kl_bound(n),
        "train": train,
        "held_out": held_out[-1][1] if held_out else None,
      }
    )
  return rows


def draw_panels(
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> list[charts.Chart]:
  """The charts that a reader looks at first."""
  drawn = [
    charts.draw(title, unit, part)
    for title, unit, names in _PANELS
    if (part := {names[n]: series[n] for n in names if n in series})
  ]
  return [chart for chart in drawn if chart is not None]


def draw_others(
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> list[charts.Chart]:
  """A chart for every other metric; the stages' times share one."""
  used = {name for _, _, names in _PANELS for name in names}
  rest = {name: series[name] for name in sorted(series.keys() - used)}
  times = {
    name.removeprefix("time/").removesuffix("_s"): rest.pop(name)
    for name in list(rest)
    if name.startswith("time/")
  }
  drawn = [charts.draw(name, "", {name: part}) for name, part in rest.items()]
  if times:
    drawn.append(charts.draw("Time a step", "seconds", times))
  return [chart for chart in drawn if chart is not None]


def _title(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
  words = [str(config[k]) for k in ("algorithm", "policy") if config.get(k)]
  return " · ".join(words) or folder.absolute().name


def _status(
  rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], finished: bool
) -> str:
  done = rows[-1]["step"] if rows else 0
  planned = config.get("steps") or 0
  if finished or done == planned > 0:  # the mark is set after the report
    return f"finished after {done} steps"
  return f"{done} of {planned} steps so far" if planned else f"{done} steps"


def _json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _template() -> jinja2.Template:
  loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
  made = jinja2.Environment(
    loader=loader,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  made.filters["short"] = short
  return made.get_template("report.html.j2")
