"""What a compiled program moves between devices, read from its HLO."""

import dataclasses
import re
from collections.abc import Iterator

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLS = re.compile(r"(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    dtype: of its largest array.
    shape: of its largest array, on one device.
    size: bytes that the device holds of it when it is whole: what an
      all-gather gives, what a reduce-scatter takes.
    loops: how often the loops around it run, outermost first; 0 = unknown,
      as in a `while_loop` that ends by its data.
    line: its line of HLO.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  size: int
  loops: tuple[int, ...]
  line: str


def collectives(hlo: str) -> list[Collective]:
  """The collective operations of a program, in the order of its text.

  Args:
    hlo: `compiled.as_text()`.
  """
  found, entry = _computations(hlo)
  # An operation that runs in the background of others stands with each of them.
  unique = {}
  for one in _walk(found, entry, ()):
    channel = _CHANNEL.search(one.line)
    unique.setdefault(channel[1] if channel else one.line, one)
  return list(unique.values())


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Lines of each computation, and the name of the first to run."""
  found: dict[str, list[str]] = {}
  name = entry = ""
  for line in hlo.splitlines():
    if head := _COMPUTATION.match(line):
      name = head[1]
      found[name] = []
      if line.startswith("ENTRY"):
        entry = name
    elif name:
      found[name].append(line)
  return found, entry


def _walk(
  found: dict[str, list[str]], name: str, loops: tuple[int, ...]
) -> Iterator[Collective]:
  for line in found.get(name, ()):
    if one := _INSTRUCTION.match(line):
      yield _collective(one, loops, line.strip())
    if loop := _WHILE.search(line):
      inside = (*loops, _trips(line, found[loop[1]]))
      yield from _walk(found, loop[2], inside)
      continue
    inner = _CALLS.findall(line)
    for names in _BRANCHES.findall(line):
      inner += [part.strip().lstrip("%") for part in names.split(",")]
    for called in inner:
      yield from _walk(found, called, loops)


def _trips(line: str, condition: list[str]) -> int:
  """How often a loop runs; 0 = unknown."""
  if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
    return int(trips[1])
  # A loop that counts compares its counter with a constant.
  limits = [one[1] for one in map(_CONSTANT.search, condition) if one]
  return int(limits[0]) if len(limits) == 1 else 0


def _collective(one: re.Match, loops: tuple[int, ...], line: str):
  # The result, and the operands with their shapes where the text has them. The
  # whole is the larger side: an all-gather's result, a reduce-scatter's input.
  arrays = []
  for dtype, sizes in _ARRAY.findall(one[1]):
    shape = tuple(int(size) for size in sizes.split(",") if size)
    arrays.append((_bytes(dtype, shape), dtype, shape))
  size, dtype, shape = max(arrays)
  if one[2] == "all-reduce":  # of several arrays at once
    starts = "-start(" in line
    size = sum(a[0] for a in arrays) if not starts else size
  return Collective(one[2], dtype, shape, size, loops, line)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
  size = _SIZES.get(dtype, 4)
  for axis in shape:
    size *= axis
  return size
