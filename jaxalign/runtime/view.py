"""What a person sees while a run goes on: a live panel, or lines for a log."""

import collections
import itertools
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich import console as rich_console
from rich import live, panel, progress_bar, table, text

# Metric -> its short name; shown in this order where a run has them.
HEADLINES = {
  "score/mean": "score",
  "test_score/mean": "held-out score",
  "objective/rlhf_reward": "reward",
  "rewards/margins": "margin",
  "rewards/accuracies": "accuracy",
  "accuracy": "accuracy",
  "margin": "margin",
  "loss/total": "loss",
  "kl/mean": "KL",
  "kl": "KL",
  "objective/kl": "KL",
  "completion/tokens_mean": "tokens",
  "diversity/overlap": "overlap",
}
_RAMP = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 32
_TURN_SECONDS = 6.0  # how long the best, then the worst sample is shown
_PLAIN_SECONDS = 2.0  # a log gets at most a line in this time
_PACE = 20  # steps that the speed is taken over


class View:
  """Progress, speed, headline metrics and a sample of the last step.

  A context manager: `with View(200, "superhf-lab") as view: view.update(...)`.
  """

  def __init__(
    self,
    steps: int,
    title: str,
    *,
    console: rich_console.Console | None = None,
  ):
    """Prepares the view.

    Args:
      steps: steps of the whole run, >= 1.
      title: shown on top; plain text.
      console: where to; stdout by default. A terminal gets the live panel,
        anything else plain lines.
    """
    self._steps, self._title = steps, clean(title)
    self._console = console or rich_console.Console()
    plain = not self._console.is_terminal or self._console.is_dumb_terminal
    self._step = 0
    self._times: collections.deque[float] = collections.deque(maxlen=_PACE + 1)
    self._printed = -math.inf
    self._history: dict[str, list[float]] = {}
    self._values: dict[str, float] = {}
    self._samples: list[tuple[str, Mapping[str, Any]]] = []
    self._live = (
      None
      if plain
      else live.Live(
        console=self._console, get_renderable=self._render, refresh_per_second=4
      )
    )

  def __enter__(self) -> "View":
    """Shows the panel, if there is a terminal."""
    self._times.append(time.monotonic())
    if self._live is not None:
      self._live.start()
    return self

  def __exit__(self, *exc: object) -> None:
    """Leaves the last state of the panel on the screen."""
    if self._live is not None:
      self._live.stop()

  def update(
    self,
    step: int,
    values: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Takes in a step's results.

    Args:
      step: steps done, >= 1.
      values: metrics by `group/name`; all but the headlines and
        `throughput/` are ignored.
      rows: rows of samples.jsonl; those with a score are shown.
    """
    self._step = step
    self._times.append(time.monotonic())
    for name, value in values.items():
      self._values[name] = float(value)
      if name in HEADLINES:
        self._history.setdefault(name, []).append(float(value))
    self._samples = best_and_worst(rows) or self._samples
    if self._live is None:
      self._print_line()

  def _print_line(self) -> None:
    now = self._times[-1]
    if self._step < self._steps and now - self._printed < _PLAIN_SECONDS:
      return
    self._printed = now
    words = [f"step {self._step}/{self._steps}", *self._pace()]
    words += [
      f"{HEADLINES[name]} {short(self._values[name])}" for name in self._shown()
    ]
    line = "  ".join(words)
    self._console.print(line, markup=False, highlight=False, soft_wrap=True)
    self._console.file.flush()  # a log that is piped should not lag behind

  def _pace(self) -> list[str]:
    if len(self._times) < 2:
      return []
    spent = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
    left = spent * (self._steps - self._step)
    words = [f"{short(spent)} s/step"]
    if left > 0:
      words.append(f"{duration(left)} left")
    return words

  def _shown(self) -> list[str]:
    return [name for name in HEADLINES if name in self._history]

  def _render(self) -> panel.Panel:
    grid = table.Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(justify="right")
    grid.add_column(style="cyan")
    bar = progress_bar.ProgressBar(self._steps, self._step, width=_SPARK_WIDTH)
    grid.add_row("step", f"{self._step}/{self._steps}", bar)
    speeds = [
      f"{short(value)} {name.removeprefix('throughput/').replace('_', ' ')}"
      for name, value in sorted(self._values.items())
      if name.startswith("throughput/")
    ]
    grid.add_row("speed", "", text.Text(", ".join(self._pace() + speeds)))
    for name in self._shown():
      spark = sparkline(self._history[name], _SPARK_WIDTH)
      if "utf" not in self._console.encoding:
        spark = ""
      grid.add_row(HEADLINES[name], short(self._values[name]), spark)
    outer = table.Table.grid()
    outer.add_row(grid)
    if self._samples:
      turn = int(time.monotonic() / _TURN_SECONDS) % len(self._samples)
      outer.add_row(_sample(*self._samples[turn]))
    return panel.Panel(outer, title=text.Text(self._title), title_align="left")


def best_and_worst(
  rows: Sequence[Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
  """[("best", row), ("worst", row)] by finite `score`; [] if none has one."""
  scored = [
    row
    for row in rows
    if isinstance(row.get("score"), int | float) and math.isfinite(row["score"])
  ]
  if not scored:
    return []
  by_score = sorted(scored, key=lambda row: row["score"])
  return [("best", by_score[-1]), ("worst", by_score[0])]


def clean(value: str) -> str:
  """One line that no terminal will take for commands.

  Control and format characters (escape sequences, direction overrides, lone
  surrogates) are dropped, line ends become a visible sign.
  """
  value = value.replace("\r\n", "\n").replace("\n", " ⏎ ").replace("\t", " ")
  return "".join(c for c in value if unicodedata.category(c)[0] != "C")


def sparkline(values: Sequence[int | float], width: int) -> str:
  """The course of `values` in at most `width` blocks, each a mean.

  Values that are not finite leave a gap if a block has no others.
  """
  count = max(1, min(width, len(values)))
  edges = [round(i * len(values) / count) for i in range(count + 1)]
  blocks = []
  for begin, end in itertools.pairwise(edges):
    finite = [v for v in values[begin:end] if math.isfinite(v)]
    blocks.append(sum(finite) / len(finite) if finite else math.nan)
  known = [b for b in blocks if math.isfinite(b)]
  if not known:
    return " " * count
  low, span = min(known), max(known) - min(known)
  top = len(_RAMP) - 1
  return "".join(
    " "
    if math.isnan(b)
    else _RAMP[round((b - low) / span * top) if span else 0]
    for b in blocks
  )


def short(value: int | float) -> str:
  """Three to four significant digits, without exponents where it can be."""
  if not math.isfinite(value):
    return str(value)
  size = abs(value)
  if size >= 1e6 or 0 < size < 1e-3:
    return f"{value:.2e}"
  if size >= 1000:
    return f"{value:.0f}"
  return f"{value:.1f}" if size >= 100 else f"{value:.3g}"


def duration(seconds: int | float) -> str:
  """45 -> "45s", 754 -> "12m 34s", 7500 -> "2h 05m"."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m {whole % 60:02d}s"
  return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _sample(which: str, row: Mapping[str, Any]) -> text.Text:
  shown = text.Text("\n")
  shown.append(f"{which} sample, score {short(row['score'])}\n", style="bold")
  shown.append(_cut(clean(str(row.get("prompt", ""))), 240), style="dim")
  shown.append("\n")
  shown.append(_cut(clean(str(row.get("completion", ""))), 480))
  return shown


def _cut(value: str, limit: int) -> str:
  return value if len(value) <= limit else f"{value[:limit]}…"
