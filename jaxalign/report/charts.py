"""Line charts as inline SVG, drawn from series of steps and values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxalign.runtime.console import block_means

WIDTH, HEIGHT = 460, 236
# Where the axes are in that box; below them stand ticks and the x axis's name.
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 10, 12, HEIGHT - 40
_POINTS = 300  # more cannot be told apart at this width
_SMOOTH_FROM = 40  # shorter curves are drawn as they are

Points = Sequence[tuple[int | float, float]]  # (x, value), x rising


@dataclasses.dataclass(frozen=True)
class Line:
  """What is drawn in one color: a curve, or the mean of several runs."""

  name: str  # for people
  points: Points  # running mean of a long curve; finite values only
  # Drawn thin: the values that `points` is a running mean or a mean of.
  thin: Sequence[Points] = ()
  # Least and greatest value at each of the points; () = no band.
  band: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line as SVG; positions are in a box of WIDTH x HEIGHT."""

  name: str
  path: str  # "" if there are fewer than two points
  thin: list[str]  # paths
  band: str  # a closed path, or ""
  dots: list[tuple[float, float]]  # the value, if there is only one


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn chart; positions are in a box of WIDTH x HEIGHT."""

  title: str
  unit: str
  x_name: str
  curves: list[Curve]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]
  # The data of the page's script: {"x": name of the axis, "curves": [{"name",
  # "at": positions, "x": and "y": values, "band": pairs}]}.
  hover: dict[str, object]


def draw(title: str, unit: str, series: Mapping[str, Points]) -> Chart | None:
  """Draws curves over the steps, on one pair of axes.

  Args:
    title: for people.
    unit: of all curves; "" for none.
    series: {curve's name: (step, value) points}. A curve joins its finite
      values, also those that are measured every N steps only.

  Returns:
    The chart, or None if there is no finite value.
  """
  lines = [line(name, points) for name, points in series.items()]
  return draw_lines(title, unit, "step", lines)


def line(name: str, points: Points) -> Line:
  """One run's curve; a long one is smoothed, its own values drawn thin."""
  known = thinned([(x, v) for x, v in points if math.isfinite(v)])
  smooth = smoothed(known)
  return Line(name, smooth, (known,) if smooth != known else ())


def thinned(points: Points) -> Points:
  """At most 300 points: means of blocks, each at the last x of its block."""
  count = min(len(points), _POINTS)
  means = block_means([v for _, v in points], _POINTS)
  ends = [round((i + 1) * len(points) / count) - 1 for i in range(count)]
  return [
    (points[end][0], mean) for end, mean in zip(ends, means, strict=False)
  ]


def smoothed(points: Points) -> Points:
  """The running mean over some 4 % of a curve of 40 points or more."""
  if len(points) < _SMOOTH_FROM:
    return points
  reach, smooth = max(1, len(points) // 50), []
  for i, (x, _) in enumerate(points):
    near = [v for _, v in points[max(0, i - reach) : i + reach + 1]]
    smooth.append((x, math.fsum(near) / len(near)))
  return smooth


def draw_lines(
  title: str, unit: str, x_name: str, lines: Sequence[Line]
) -> Chart | None:
  """Draws lines over one pair of axes.

  Args:
    title: for people.
    unit: of the values; "" for none.
    x_name: of the horizontal axis.
    lines: in the order of their colors; one without points is left out, but
      keeps its color.

  Returns:
    The chart, or None if there is no point.
  """
  # Everything that has to fit between the axes.
  drawn = [points for item in lines for points in (item.points, *item.thin)]
  xs = [x for points in drawn for x, _ in points]
  values = [v for points in drawn for _, v in points]
  values += [v for item in lines for pair in item.band for v in pair]
  if not values:
    return None
  # A little air above and below; a constant is in the middle.
  low, high = min(values), max(values)
  pad = (high - low) * 0.06 or abs(low) * 0.5 or 1.0
  low, high = low - pad, high + pad
  first, last = min(xs), max(xs)

  def x(value: int | float) -> float:
    share = (value - first) / ((last - first) or 1)
    return round(LEFT + share * (RIGHT - LEFT), 1)

  def y(value: float) -> float:
    return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

  curves, hovers = [], []
  for item in lines:
    places = [(x(at), y(v)) for at, v in item.points]
    # The band: its upper edge to the right, its lower edge back.
    edges = list(zip((px for px, _ in places), item.band, strict=False))
    upper = [(px, y(top)) for px, (_, top) in edges]
    lower = [(px, y(bottom)) for px, (bottom, _) in reversed(edges)]
    curves.append(
      Curve(
        item.name,
        _path(places),
        [_path([(x(at), y(v)) for at, v in points]) for points in item.thin],
        f"{_path([*upper, *lower])}Z" if len(edges) > 1 else "",
        places if len(places) == 1 else [],
      )
    )
    hovers.append(
      {
        "name": item.name,
        "at": [px for px, _ in places],
        "x": [_round(at) for at, _ in item.points],
        "y": [float(f"{v:.6g}") for _, v in item.points],
        "band": [[float(f"{v:.4g}") for v in pair] for pair in item.band],
      }
    )
  whole = all(float(value).is_integer() for value in xs)
  x_marks = nice_ticks(first, last if last > first else first + 1, whole)
  return Chart(
    title=title,
    unit=unit,
    x_name=x_name,
    curves=curves,
    x_ticks=[(x(s), label(s)) for s in x_marks if first <= s <= last],
    y_ticks=[
      (y(v), label(v)) for v in nice_ticks(low, high) if low <= v <= high
    ],
    hover={"x": x_name, "curves": hovers},
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


def _round(x: int | float) -> int | float:
  """A step whole, other places to six digits."""
  return int(x) if float(x).is_integer() else float(f"{x:.6g}")
