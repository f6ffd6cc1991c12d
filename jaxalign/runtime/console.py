"""What a person sees during a run: a live panel, or plain lines for a log."""

import collections
import itertools
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence

import jax.monitoring
import rich.console
from rich import live, panel, progress_bar, table, text

from jaxalign.parallel import hosts
from jaxalign.runtime.metrics import LogRow, number
from jaxalign.runtime.signals import STOPPING, Stop

# Short name -> the metrics that it may stand for, of which a run shows the
# first that it has; in the order of the columns.
HEADLINES = {
  "score": ("score/mean",),
  "held-out score": ("test_score/mean",),
  "reward": ("objective/rlhf_reward",),
  "margin": ("rewards/margins", "margin"),
  "accuracy": ("rewards/accuracies", "accuracy"),
  "loss": ("loss/total", "loss/nll"),
  "KL": ("kl/mean", "kl", "objective/kl"),
  "tokens": ("completion/tokens_mean",),
  "overlap": ("diversity/overlap",),
  # Validations and evaluations, which come now and then.
  "held-out loss": ("eval_loss/total", "eval_loss/nll"),
  "held-out margin": ("eval_rewards/margins", "eval_margin"),
  "held-out accuracy": ("eval_rewards/accuracies", "eval_accuracy"),
  "evaluation": ("eval_score/mean",),
  "held-out evaluation": ("eval_test_score/mean",),
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # of the bar and the sparklines
_SAMPLE_SECONDS = 6.0  # the best and the worst sample take turns
_LINE_SECONDS = 2.0  # a log gets at most one line in this time
_PACE_STEPS = 20  # the pace is a mean over so many steps
# JAX's events at the end of what comes before compiling, and of compiling.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Console:
  """Progress, pace, headline metrics and the last step's best and worst sample.

  `with Console(200, "superhf lab") as console: console.update(1, metrics)`.
  """

  def __init__(
    self,
    steps: int,
    title: str,
    *,
    done: int = 0,
    stop: Stop | None = None,
    output: rich.console.Console | None = None,
  ):
    """Prepares the panel.

    Args:
      steps: steps of the whole run, >= 1.
      title: shown on top; plain text.
      done: steps done before this start.
      stop: a request to stop is shown in the panel.
      output: stdout by default. A terminal gets the live panel, anything else
        plain lines.
    """
    self._steps, self._title = steps, clean(title)
    self._output = output or rich.console.Console()
    self._step, self._stop = done, stop or Stop()
    self._begun = self._last = time.monotonic()
    self._line_time = -math.inf
    # Steps that compile are left out of the pace: seconds, and whether so.
    self._programs = self._programs_seen = 0
    self._compiling = False
    self._times: collections.deque[tuple[float, bool]]
    self._times = collections.deque(maxlen=_PACE_STEPS)
    self._pace = ""
    self._shown: dict[str, str] = {}  # short name -> its metric in this run
    self._history: dict[str, list[float]] = {name: [] for name in HEADLINES}
    self._speeds: dict[str, str] = {}
    self._samples: list[LogRow] = []  # scores rise
    self._live = None
    if self._output.is_terminal and not self._output.is_dumb_terminal:
      self._live = live.Live(console=self._output, get_renderable=self._panel)

  def __enter__(self) -> "Console":
    """Shows the panel, or says in a log that the first step compiles."""
    jax.monitoring.register_event_duration_secs_listener(self._watch_compiler)
    if self._live:
      self._stop.on_screen = True
      self._live.start()
    elif hosts.is_lead():
      self._print(f"step {self._step + 1}/{self._steps}  compiling")
    return self

  def __exit__(self, *exc: object) -> None:
    """Leaves the last state of the panel on the screen."""
    jax.monitoring.unregister_event_duration_listener(self._watch_compiler)
    if self._live:
      self._stop.on_screen = False
      self._live.stop()

  def _watch_compiler(
    self, event: str, duration_secs: float, **kwargs: str | int
  ) -> None:
    del duration_secs, kwargs
    if event in (_LOWERED, _COMPILED):
      self._compiling = event == _LOWERED
      self._programs += event == _COMPILED

  def update(
    self,
    step: int,
    values: Mapping[str, int | float],
    rows: Sequence[LogRow] = (),
  ) -> None:
    """Shows the results of a step.

    Args:
      step: steps done, >= 1.
      values: metrics; all but the headlines and `throughput/` are ignored.
      rows: rows of samples.jsonl; those with a finite score are shown.
    """
    # Pace and the time that is left.
    now = time.monotonic()
    compiled = self._programs > self._programs_seen
    # The last one is shown at once, as no step comes after it.
    if step < self._steps:
      self._times.append((now - self._last, compiled))
    self._last, self._programs_seen = now, self._programs
    paced = [seconds for seconds, compiled in self._times if not compiled]
    if not paced and len(self._times) == _PACE_STEPS:
      paced = [seconds for seconds, _ in self._times]  # each step compiles
    self._step, self._pace = (
      step,
      f"{short(now - self._begun)} s with compiling",
    )
    if paced:
      spent = sum(paced) / len(paced)
      self._pace = f"{short(spent)} s/step"
      if step < self._steps:
        self._pace += f"  {duration(spent * (self._steps - step))} left"

    # Metrics and samples.
    for name, metrics in HEADLINES.items():
      metric = next((m for m in metrics if m in values), None)
      if metric and self._shown.setdefault(name, metric) == metric:
        self._history[name].append(float(values[metric]))
    for name, value in values.items():
      if name.startswith("throughput/"):
        unit = name.removeprefix("throughput/").replace("_", " ")
        self._speeds[name] = f"{short(value)} {unit}"
    scored = [
      row
      for row in rows
      if (score := number(row.get("score"))) is not None
      and math.isfinite(score)
    ]
    if scored:
      self._samples = sorted(scored, key=lambda row: row["score"])

    # A log gets a line now and then, and always the last one.
    waited = now - self._line_time
    if not self._live and (waited >= _LINE_SECONDS or step >= self._steps):
      self._line_time = now
      words = [f"step {step}/{self._steps}", self._pace]
      for name, history in self._history.items():
        words += [f"{name} {short(history[-1])}"] if history else []
      self._print("  ".join(words))

  def _print(self, line: str) -> None:
    self._output.print(line, markup=False, highlight=False, soft_wrap=True)
    self._output.file.flush()  # a log that is piped should not lag behind

  def _panel(self) -> panel.Panel:
    # Progress, pace and speeds.
    grid = table.Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(justify="right")
    grid.add_column(style="cyan")
    bar = progress_bar.ProgressBar(self._steps, self._step, width=_WIDTH)
    grid.add_row("step", f"{self._step}/{self._steps}", bar)
    # Until the first results it mostly compiles.
    waiting = f"compiling, {duration(time.monotonic() - self._begun)}"
    pace = self._pace or waiting
    if self._compiling and self._pace:
      pace = f"compiling  {pace}"
    speeds = "  ".join([pace, *self._speeds.values()])
    grid.add_row("speed", "", text.Text(speeds))
    # Headline metrics; their course needs characters beyond ASCII.
    unicode = "utf" in self._output.encoding
    for name, history in self._history.items():
      if history:
        spark = sparkline(history, _WIDTH) if unicode else ""
        grid.add_row(name, short(history[-1]), spark)
    # The best and the worst sample in turn, below a request to stop.
    sample = text.Text()
    if self._stop.requested:
      sample.append(f"\n{STOPPING}\n", "bold yellow")
    if self._samples:
      name, row = "best", self._samples[-1]
      if int(time.monotonic() / _SAMPLE_SECONDS) % 2:
        name, row = "worst", self._samples[0]
      sample.append(f"\n{name} sample, score {short(row['score'])}\n", "bold")
      sample.append(clean(row.get("prompt", ""), 240) + "\n", "dim")
      sample.append(clean(row.get("completion", ""), 480))
    return panel.Panel(
      rich.console.Group(grid, sample),
      title=text.Text(self._title),
      title_align="left",
    )


def clean(value: object, limit: int = 1000) -> str:
  """One line, cut after `limit` characters, that no terminal reads as commands.

  Control and format characters (escape sequences, direction overrides, lone
  surrogates) are dropped; line ends become a visible sign.
  """
  line = str(value).replace("\r\n", "\n").replace("\n", " ⏎ ")
  line = line.replace("\t", " ")
  line = "".join(c for c in line if unicodedata.category(c)[0] != "C")
  return line if len(line) <= limit else f"{line[:limit]}…"


def block_means(values: Sequence[int | float], count: int) -> list[float]:
  """Means of at most `count` even blocks, NaN where no value is finite."""
  count = max(1, min(count, len(values)))
  edges = [round(i * len(values) / count) for i in range(count + 1)]
  means = []
  for begin, end in itertools.pairwise(edges):
    finite = [v for v in values[begin:end] if math.isfinite(v)]
    means.append(math.fsum(finite) / len(finite) if finite else math.nan)
  return means


def sparkline(values: Sequence[int | float], width: int) -> str:
  """The course of `values` in at most `width` blocks, a gap where no number."""
  means = block_means(values, width)
  finite = [m for m in means if not math.isnan(m)]
  low = min(finite, default=0.0)
  scale = (len(_BLOCKS) - 1) / ((max(finite, default=0.0) - low) or 1.0)
  return "".join(
    " " if math.isnan(m) else _BLOCKS[round((m - low) * scale)] for m in means
  )


def short(value: int | float) -> str:
  """At least three significant digits, no exponent from 0.001 to 1e6."""
  size = abs(value)
  if not math.isfinite(value):
    return str(value)
  if size >= 1e6 or 0 < size < 1e-3:
    return f"{value:.2e}"
  if size >= 1000:
    return f"{value:.0f}"
  return f"{value:.1f}" if size >= 100 else f"{value:.3g}"


def duration(seconds: int | float) -> str:
  """45 -> "45s", 754 -> "12m 34s", 7500 -> "2h 05m"."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
  return f"{minutes // 60}h {minutes % 60:02d}m"
