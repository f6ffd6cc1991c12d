"""Line charts as inline SVG, drawn from series of steps and values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxalign.runtime.console import block_means

WIDTH, HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 24
_POINTS = 300  # more cannot be told apart at this width
_SMOOTH_FROM = 40  # shorter curves are drawn as they are

Points = Sequence[tuple[int, float]]  # (step, value), steps rising


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line of a chart."""

  name: str  # for people
  values: list[float]  # one for each step of the chart; NaN = none
  faint: str  # SVG path of the values, "" if `path` is of the values
  path: str  # SVG path of the values or of their running mean
  dots: list[tuple[float, float]]  # the value, if there is only one


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn chart; positions are in a box of WIDTH x HEIGHT."""

  title: str
  unit: str
  steps: list[int]
  positions: list[float]  # x of each step
  curves: list[Curve]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]

  @property
  def hover(self) -> dict[str, list]:
    """The data of the page's script: JSON, NaN as None."""
    curves = []
    for curve in self.curves:
      values = [float(f"{v:.6g}") for v in curve.values]
      y = [v if math.isfinite(v) else None for v in values]
      curves.append({"name": curve.name, "y": y})
    return {"x": self.positions, "step": self.steps, "curves": curves}


def draw(title: str, unit: str, series: Mapping[str, Points]) -> Chart | None:
  """Draws curves over one pair of axes.

  Args:
    title: for people.
    unit: of all curves; "" for none.
    series: {curve's name: points}; values that are not finite leave gaps.

  Returns:
    The chart, or None if there is no finite value.
  """
  # A column of values for each curve, thinned to means of blocks of steps.
  steps = sorted({step for points in series.values() for step, _ in points})
  columns = {}
  for name, points in series.items():
    table = dict(points)
    values = [table.get(step, math.nan) for step in steps]
    columns[name] = block_means(values, _POINTS)
  finite = [v for c in columns.values() for v in c if math.isfinite(v)]
  if not finite:
    return None
  # A block is drawn at its last step.
  count = min(len(steps), _POINTS)
  ends = [round((i + 1) * len(steps) / count) - 1 for i in range(count)]
  steps = [steps[end] for end in ends]

  # The axes: a little air above and below; a constant is in the middle.
  low, high = min(finite), max(finite)
  pad = (high - low) * 0.06 or abs(low) * 0.5 or 1.0
  low, high = low - pad, high + pad
  first, last = steps[0], steps[-1]

  def x(step: int | float) -> float:
    share = (step - first) / ((last - first) or 1)
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(value: float) -> float:
    share = (value - low) / (high - low)
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

  # A curve joins its known values, also those measured every N steps only: a
  # missing value and a NaN are both skipped.
  curves = []
  for name, column in columns.items():
    known = [
      (x(s), v) for s, v in zip(steps, column, strict=True) if not math.isnan(v)
    ]
    path, faint = _path([(px, y(v)) for px, v in known]), ""
    # A long curve is smoothed over some 4 % of it; its values stay, faint.
    if len(known) >= _SMOOTH_FROM:
      reach = max(1, len(known) // 50)
      smooth = []
      for i, (px, _) in enumerate(known):
        near = [v for _, v in known[max(0, i - reach) : i + reach + 1]]
        smooth.append((px, y(math.fsum(near) / len(near))))
      path, faint = _path(smooth), path
    dots = [(px, y(v)) for px, v in known] if len(known) == 1 else []
    curves.append(Curve(name, column, faint, path, dots))
  x_marks = nice_ticks(first, max(last, first + 1), whole=True)
  return Chart(
    title=title,
    unit=unit,
    steps=steps,
    positions=[x(step) for step in steps],
    curves=curves,
    x_ticks=[(x(s), label(s)) for s in x_marks if first <= s <= last],
    y_ticks=[
      (y(v), label(v)) for v in nice_ticks(low, high) if low <= v <= high
    ],
  )


def nice_ticks(
  low: int | float, high: int | float, whole: bool = False
) -> list[float]:
  """Some three to seven round numbers from at most `low` to at least `high`.

  Args:
    low: least value.
    high: greatest value, > low.
    whole: whole numbers only.

  Returns:
    Rising multiples of 1, 2 or 5 times a power of ten.
  """
  # 1, 2, 5 or 10 times a power of ten; 0.999 forgives rounding.
  raw = (high - low) / 5.5
  power = 10.0 ** math.floor(math.log10(raw))
  gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  if whole:
    gap = max(1.0, gap)
  begin, end = math.floor(low / gap), math.ceil(high / gap)
  return [float(f"{i * gap:.12g}") for i in range(begin, end + 1)]


def label(value: float) -> str:
  """A tick's text: 12000 -> "12k", 0.25 -> "0.25", 3e-06 -> "3e-6"."""
  size = abs(value)
  # Below 10,000 a number is written out.
  for unit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if size >= max(unit, 1e4):
      return f"{value / unit:.4g}{sign}"
  if 0 < size < 1e-3:
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:.6g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
  if len(points) < 2:
    return ""
  return "M" + "L".join(f"{px:g},{py:g}" for px, py in points)
