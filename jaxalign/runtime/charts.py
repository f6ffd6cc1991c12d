"""Line charts as inline SVG, drawn from a table of steps and values."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 24
_POINTS = 300  # more cannot be told apart at this width
_SMOOTH_FROM = 40  # shorter curves are drawn as they are
_GAP = math.nan


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line of a chart."""

  name: str  # for people
  values: list[float]  # one a step of the chart; NaN = none
  faint: str  # SVG path of the values, "" if `path` is of the values
  path: str  # SVG path of the values or of their running mean
  dots: list[tuple[float, float]]  # a value that is the only one


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn chart; positions are in a box of WIDTH x HEIGHT."""

  title: str
  unit: str
  steps: list[float]
  positions: list[float]  # x of each step
  curves: list[Curve]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]

  @property
  def hover(self) -> dict[str, Any]:
    """What the page's script needs: JSON, NaN as None."""
    return {
      "x": self.positions,
      "step": self.steps,
      "curves": [
        {"name": c.name, "y": [_or_none(v) for v in c.values]}
        for c in self.curves
      ],
    }


def draw(
  title: str,
  unit: str,
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> Chart | None:
  """Draws curves over one pair of axes.

  Args:
    title: for people.
    unit: of all curves; "" for none.
    series: {curve's name: [(step, value), ...]}, steps rising; values that are
      not finite leave gaps.

  Returns:
    The chart, or None if there is no finite value.
  """
  steps, columns = _table(series)
  finite = [v for column in columns for v in column if math.isfinite(v)]
  if not finite:
    return None
  low, high = _padded(min(finite), max(finite))
  y_marks = [v for v in nice_ticks(low, high) if low <= v <= high]
  first, last = steps[0], steps[-1]
  x_span, y_span = (last - first) or 1, high - low

  def x(step: float) -> float:
    share = (step - first) / x_span
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(value: float) -> float:
    share = (value - low) / y_span
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

  positions = [x(step) for step in steps]
  curves = [
    _curve(name, column, positions, y)
    for name, column in zip(series, columns, strict=True)
  ]
  x_marks = nice_ticks(first, max(last, first + 1), whole=True)
  return Chart(
    title=title,
    unit=unit,
    steps=steps,
    positions=positions,
    curves=curves,
    x_ticks=[(x(s), label(s)) for s in x_marks if first <= s <= last],
    y_ticks=[(y(v), label(v)) for v in y_marks],
  )


def nice_ticks(low: float, high: float, whole: bool = False) -> list[float]:
  """Some three to seven round numbers from at most `low` to at least `high`.

  Args:
    low: least value.
    high: greatest value, > low.
    whole: whole numbers only.

  Returns:
    Rising multiples of 1, 2 or 5 times a power of ten.
  """
  raw = (high - low) / 5.5
  power = 10.0 ** math.floor(math.log10(raw))
  gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  if whole:
    gap = max(1.0, gap)
  begin, end = math.floor(low / gap), math.ceil(high / gap)
  return [float(f"{i * gap:.12g}") for i in range(begin, end + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
  """A little air above and below; a constant in the middle of its own size."""
  pad = (high - low) * 0.06 or abs(low) * 0.5 or 1.0
  return low - pad, high + pad


def label(value: float) -> str:
  """A tick's text: 12000 -> "12k", 0.25 -> "0.25", 3e-06 -> "3e-6"."""
  size = abs(value)
  for unit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= unit:
      unit = 1e3 if sign == "k" else unit
      return f"{value / unit:.4g}{sign}"
  if 0 < size < 1e-3:
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:.6g}"


def _table(
  series: Mapping[str, Sequence[tuple[int, float]]],
) -> tuple[list[float], list[list[float]]]:
  """Steps, and a column of values for each curve, means of blocks if many."""
  steps = sorted({step for points in series.values() for step, _ in points})
  tables = [dict(points) for points in series.values()]
  columns = [[table.get(step, _GAP) for step in steps] for table in tables]
  count = min(len(steps), _POINTS)
  edges = (
    [round(i * len(steps) / count) for i in range(count + 1)] if count else []
  )
  blocks = list(itertools.pairwise(edges))
  return (
    [float(steps[end - 1]) for _, end in blocks],
    [[_mean(column[b:e]) for b, e in blocks] for column in columns],
  )


def _curve(
  name: str,
  values: list[float],
  positions: Sequence[float],
  y: Callable[[float], float],
) -> Curve:
  """Joins the known values, those measured every N steps too.

  A missing value and a NaN that was measured are both jumped over.
  """
  known = [
    (px, v) for px, v in zip(positions, values, strict=True) if math.isfinite(v)
  ]
  raw = _path([(px, y(v)) for px, v in known])
  if len(known) < _SMOOTH_FROM:
    dots = [(px, y(v)) for px, v in known] if len(known) == 1 else []
    return Curve(name, values, "", raw, dots)
  reach = max(1, len(known) // 50)
  ys = [v for _, v in known]
  means = [_mean(ys[max(0, i - reach) : i + reach + 1]) for i in range(len(ys))]
  smooth = [(px, y(m)) for (px, _), m in zip(known, means, strict=True)]
  return Curve(name, values, raw, _path(smooth), [])


def _path(points: Sequence[tuple[float, float]]) -> str:
  if len(points) < 2:
    return ""
  return "M" + "L".join(f"{px:g},{py:g}" for px, py in points)


def _mean(values: Iterable[float]) -> float:
  known = [v for v in values if math.isfinite(v)]
  return math.fsum(known) / len(known) if known else _GAP


def _or_none(value: float) -> float | None:
  return float(f"{value:.6g}") if math.isfinite(value) else None
