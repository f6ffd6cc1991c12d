"""Bytes that a compiled program moves between chips, by mesh axis."""

import collections
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from jaxalign.parallel.mesh import AnyMesh
from jaxalign.plan import hlo

# Opcodes, also of TPU fusions, that exchange data.
KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
)

_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=\S+")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one kind of exchange moves over one axis in a run of a program.

  Attributes:
    kind: one of `KINDS`.
    axis: names of the mesh's axes, joined by "+".
    bytes: that each chip sends.
    part: chips of a group that stand in one slice or node.
    size: chips of a group.
    count: how often it runs.
  """

  kind: str
  axis: str
  bytes: int
  part: int
  size: int
  count: int

  @property
  def crosses(self) -> bool:
    """Whether it leaves the slice or node."""
    return self.part < self.size


def of_module(module: hlo.Module, mesh: AnyMesh, part: int) -> list[Traffic]:
  """What a compiled program exchanges, added up by kind and axis.

  Args:
    module: the program.
    mesh: that it was compiled for.
    part: chips of a slice or node, which stand next to each other in the mesh.
  """
  sent: collections.Counter[tuple] = collections.Counter()
  runs: collections.Counter[tuple] = collections.Counter()
  for line, times in exchanges(module):
    kind, most = kind_and_bytes(module, line)
    if kind == "collective-permute":
      groups = _pairs(line.line)
      n, share = 2, 1.0
      if not len(groups):
        continue
    else:
      groups = _groups(line.line, mesh.size)
      n = groups.shape[1]
      if n == 1:
        continue
      share = (n - 1) / n * (2 if kind == "all-reduce" else 1)
    axis = _axis(groups, mesh)
    parts = groups // part
    inside = int((parts == parts[:, :1]).sum(axis=1).min())
    key = kind, axis, inside, n
    sent[key] += round(share * most) * times
    runs[key] += times
  return [
    Traffic(kind, axis, sent[key], inside, size, runs[key])
    for key in sorted(sent)
    for kind, axis, inside, size in [key]
  ]


def by_axis(found: list[Traffic]) -> dict[str, int]:
  """Bytes that a chip sends over each axis."""
  total: collections.Counter[str] = collections.Counter()
  for traffic in found:
    total[traffic.axis] += traffic.bytes
  return dict(total)


def exchanges(
  module: hlo.Module,
) -> Iterator[tuple[hlo.Instruction, int]]:
  """Every exchange once a run, wherever the compiler has put it.

  A TPU's compiler spreads one exchange over several fusions, to overlap it
  with arithmetic; they share a channel. The first of them counts: the others
  may stand in a loop, which the exchange runs next to.
  """
  seen: set[tuple[str, str, int]] = set()
  started = {
    channel[1]
    for computation in module.computations.values()
    if any("AsyncCollectiveStart" in x.line for x in computation.values())
    for x in computation.values()
    if _base(x.opcode) and (channel := _CHANNEL.search(x.line))
  }
  for line, _, times in module.runs():
    inner, begins = [line], False
    if line.opcode == "fusion":
      inner = list(_nested(module, line.called))
      begins = any("AsyncCollectiveStart" in x.line for x in inner)
    for each in inner:
      if not _base(each.opcode):
        continue
      channel = _CHANNEL.search(each.line)
      if channel and channel[1] in started and not begins:
        continue
      # The same channel in another loop, or of other groups of chips, is
      # another exchange: those that a program writes out all have channel 1.
      groups = _GROUPS.search(each.line)
      key = (
        channel[1] if channel else each.name,
        groups[0] if groups else "",
        times,
      )
      if key not in seen:
        seen.add(key)
        yield each, times


def _nested(module: hlo.Module, name: str) -> Iterator[hlo.Instruction]:
  for line in module.computations[name].values():
    yield line
    if line.opcode == "fusion":
      yield from _nested(module, line.called)


def _base(opcode: str) -> str:
  """The kind of an opcode; "" if it exchanges nothing, or ends an exchange."""
  kind = opcode.removesuffix("-start")
  return kind if kind in KINDS else ""


def kind_and_bytes(
  module: hlo.Module, line: hlo.Instruction
) -> tuple[str, int]:
  """The kind, and the bytes of its largest side: gathered, or to be reduced."""
  kind = _base(line.opcode)
  type_ = line.type
  # A `-start` has its operands and its results; its larger half counts.
  if line.opcode.endswith("-start") and type_.startswith("("):
    halves = hlo.halves(type_)
    most = max(hlo.whole_size(half) for half in halves)
  else:
    most = hlo.whole_size(type_)
  if kind == "reduce-scatter" and not line.opcode.endswith("-start"):
    # The result is a part; the whole is what every chip has brought.
    most *= _groups(line.line, 0).shape[1]
  # A TPU has no reduce-scatter of its own: it is an all-reduce in a fusion of
  # that name, whose result is a part.
  if kind == "all-reduce":
    owner = _owner(module, line)
    if "reduce-scatter" in owner or "all-reduce-scatter" in owner:
      kind = "reduce-scatter"
  return kind, most


def _owner(module: hlo.Module, line: hlo.Instruction) -> str:
  return next(
    name
    for name, lines in module.computations.items()
    if lines.get(line.name) is line
  )


def _pairs(line: str) -> np.ndarray:
  """Source and target of a permutation, `[pairs, 2]`; those to oneself not."""
  match = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
  numbers = [int(x) for x in re.findall(r"\d+", match[1] if match else "")]
  pairs = np.array(numbers).reshape(-1, 2)
  return pairs[pairs[:, 0] != pairs[:, 1]]


def _groups(line: str, devices: int) -> np.ndarray:
  """The chips that exchange with each other, `[groups, chips]`.

  Three ways to write them: {{0,1},{2,3}}; [2,2]<=[4] with a transposition;
  mesh['a'=2,'b'=2] {'a'}.
  """
  if match := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
    rows = match[1].split("},{")
    return np.array([[int(x) for x in row.split(",")] for row in rows])
  iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if match := re.search(iota, line):
    shape, dims, order = (
      [int(x) for x in part.split(",")] if part else []
      for part in match.groups()
    )
    ids = np.arange(np.prod(dims)).reshape(dims)
    return ids.transpose(order or range(len(dims))).reshape(shape)
  named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}"
  if match := re.search(named, line):
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", match[1])}
    used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[2])
    return _named_groups(sizes, used)
  return np.arange(devices).reshape(1, -1)  # all of them


def _named_groups(
  sizes: dict[str, int], used: list[tuple[str, str, str]]
) -> np.ndarray:
  """Groups over some axes of a mesh, or over parts of axes.

  Args:
    sizes: axis -> size; chips are numbered row by row.
    used: axis, and where a part of it is meant, the factor before the part and
      the part's size.
  """
  dims: list[int] = []
  inside: list[bool] = []
  for axis, size in sizes.items():
    parts = [(int(a), int(b)) for name, a, b in used if name == axis and b]
    if parts:
      ((before, part),) = parts
      dims += [before, part, size // (before * part)]
      inside += [False, True, False]
    else:
      dims.append(size)
      inside.append(any(name == axis for name, _, _ in used))
  ids = np.arange(np.prod(dims)).reshape(dims)
  kept = [i for i, yes in enumerate(inside) if not yes]
  taken = [i for i, yes in enumerate(inside) if yes]
  width = int(np.prod([dims[i] for i in taken]))
  return ids.transpose(kept + taken).reshape(-1, width)


def _axis(groups: np.ndarray, mesh: AnyMesh) -> str:
  """The mesh's axes along which the members of a group differ."""
  sizes = mesh.shape
  places = np.unravel_index(groups, tuple(sizes.values()))
  varying = [
    name
    for name, place in zip(sizes, places, strict=True)
    if (place != place[:, :1]).any()
  ]
  return "+".join(varying)
