"""A compiled program as text, and how often each of its instructions runs.

XLA's own counts take a loop's body once; here a loop counts its turns.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from jaxalign.plan.flops import turns_of

BYTES = {
  **dict.fromkeys(("pred", "s4", "u4", "s8", "u8"), 1),
  **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4),
  **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
  "c128": 16,
}
# `bf16[6,256]{1,0:T(8,128)S(1)}`: a type, its layout, and the memory it is in.
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
# What moves no bytes, or whose bytes are those of something else.
FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "iota", "opt-barrier"),
  *("while", "conditional", "call", "async-start", "async-update"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  line: str
  is_root: bool

  @functools.cached_property
  def bytes(self) -> int:
    """Of the result."""
    return size(self.type)

  @property
  def called(self) -> str:
    """The computation that it calls; "" if none."""
    match = _CALLED.search(self.line)
    return match[1] if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: by name.
    entry: the name of the first.
    trips: turns of a loop whose number the program does not say; of such loops
      in each other, those of the outermost.
  """

  computations: dict[str, Computation]
  entry: str
  trips: int

  def runs(self) -> Iterator[tuple[Instruction, Computation, int]]:
    """Every instruction outside fusions, with its computation and its runs.

    Of a conditional the branch with most instructions counts.
    """
    yield from self._runs(self.entry, 1, self.trips)

  def _runs(self, name: str, times: int, trips: int):
    computation = self.computations[name]
    for line in computation.values():
      yield line, computation, times
      if line.opcode == "while":
        turns = self.turns(line)
        # The caller's count is of the outermost loop that says none.
        inner = 1 if turns is None else trips
        turns = trips if turns is None else turns
        yield from self._runs(_after(line.line, "body"), times * turns, inner)
      elif line.opcode == "conditional":
        branches = _branches(line.line)
        sizes = {b: sum(1 for _ in self._runs(b, 1, 1)) for b in branches}
        dearest = max(branches, key=sizes.__getitem__)
        yield from self._runs(dearest, times, trips)
      elif line.opcode in ("call", "async-start") and line.called:
        yield from self._runs(line.called, times, trips)

  def turns(self, loop: Instruction) -> int | None:
    """How often a loop runs, if it or its scope says so."""
    match = _TURNS.search(loop.line)
    if match:
      return int(match[1])
    scope = re.search(r'op_name="([^"]*)"', loop.line)
    turns = turns_of(scope[1]) if scope else None
    if turns is not None:
      return turns
    limit = self._limit(_after(loop.line, "condition"))
    return None if limit is None else -(-limit // self._stride(loop))

  def _limit(self, name: str) -> int | None:
    """The constant that a condition compares its counter with."""
    lines = self.computations[name].values()
    constants = {
      line.name: int(match[1])
      for line in lines
      if (match := re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line.line))
    }
    for line in lines:
      if line.opcode == "compare" and "direction=LT" in line.line:
        for operand in line.operands:
          if operand in constants:
            return constants[operand]
      if line.opcode == "fusion":
        found = self._limit(line.called)
        if found is not None:
          return found
        # The counter's limit may be handed to the fusion.
        given = [constants[x] for x in line.operands if x in constants]
        body = self.computations[line.called].values()
        if given and any("direction=LT" in x.line for x in body):
          return max(given)
    return None

  def _stride(self, loop: Instruction) -> int:
    """What a turn adds to the counter: 2 where two were made one."""
    condition = self.computations[_after(loop.line, "condition")]
    body = self.computations[_after(loop.line, "body")]
    (root,) = (x for x in body.values() if x.is_root)
    (end,) = (x for x in condition.values() if x.is_root)
    counters = [
      match[1]
      for name in end.operands
      if (match := re.search(r", index=(\d+)", condition[name].line))
    ]
    if not counters or root.opcode != "tuple":
      return 1
    # Back from what the body gives to what it was given.
    place, stride = root.operands[int(counters[0])], 0
    while body[place].opcode == "add":
      place, *added = body[place].operands
      value = re.search(r" constant\((\d+)\)", body[added[0]].line)
      if not value:
        return 1
      stride += int(value[1])
    return max(stride, 1)

  def traffic(self) -> int:
    """Bytes that the program moves to and from a chip's memory, in one run."""
    return sum(
      times * self._moved(line, computation)
      for line, computation, times in self.runs()
    )

  def _moved(self, line: Instruction, computation: Computation) -> int:
    opcode = line.opcode
    if opcode in FREE or opcode.endswith("-done") or "AsyncColl" in line.line:
      return 0
    if opcode.endswith("slice-start"):
      # (source, slice, ...): the slice is read, and written where it counts.
      slice_ = halves(line.type)[1]
      return whole_size(slice_) + size(slice_)
    if opcode.endswith("-start"):  # a pair of what goes in and what comes out
      return line.bytes
    operands = [computation[x] for x in line.operands if x in computation]
    if opcode == "custom-call":  # a library's scratch space is not traffic
      result = re.sub(r", s8\[\d+\]\S*", "", line.type)
      return size(result) + sum(x.bytes for x in operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
      return 2 * line.bytes
    if opcode in ("dynamic-update-slice", "scatter"):  # in place
      return 2 * operands[-1 if opcode == "scatter" else 1].bytes
    if opcode == "fusion":
      return self._fused(line, operands)
    return line.bytes + sum(x.bytes for x in operands)

  def _fused(self, line: Instruction, operands: list[Instruction]) -> int:
    """Of a fusion: what it reads of its operands, and what it writes."""
    total = 0
    for number, operand in enumerate(operands):
      read = self._read(line.called, number, operand.bytes)
      total += min(operand.bytes, read)
    # Less where the result is kept in another memory.
    return total + min(self._written(line.called), line.bytes)

  def _read(self, called: str, number: int, whole: int) -> int:
    """Bytes of a parameter that a fusion reads, of `whole` ones."""
    body = self.computations[called]
    wanted = f" parameter({number})"
    names = [x.name for x in body.values() if wanted in x.line]
    total = 0
    while names:
      name = names.pop()
      for user in body.values():
        if name not in user.operands:
          continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
          total += user.bytes
        elif user.opcode in ("bitcast", "reshape"):
          names.append(user.name)
        elif user.opcode == "fusion":  # fusions nest on TPUs
          for inner, operand in enumerate(user.operands):
            if operand == name:
              total += self._read(user.called, inner, whole)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
          return whole  # such an update leaves the rest of the array as it is
    return total

  def _written(self, called: str) -> int:
    """Bytes that a fusion writes; of a slice in place the slice alone."""
    body = self.computations[called]
    (root,) = (x for x in body.values() if x.is_root)
    parts = [root]
    if root.opcode == "tuple":
      parts = [body[x] for x in root.operands]
    total = 0
    for part in parts:
      while part.opcode in ("bitcast", "convert", "copy") and part.operands:
        part = body[part.operands[0]]
      if part.opcode == "dynamic-update-slice":
        total += body[part.operands[1]].bytes
      elif part.opcode == "fusion":
        total += self._written(part.called)
      elif part.opcode != "parameter":
        total += part.bytes
    return total


def parse(text: str, trips: int) -> Module:
  """Reads the text of `jax.stages.Compiled.as_text()`.

  Args:
    text: of a scheduled module.
    trips: turns of a loop whose number the text does not say.
  """
  computations: dict[str, Computation] = {}
  current: Computation = {}
  entry = ""
  for line in text.splitlines():
    head = _INSTRUCTION.match(line)
    if head:
      rest = line[head.end() :]
      end = _closing(rest) if rest.startswith("(") else rest.index(" ")
      type_, rest = rest[:end], rest[end:].lstrip()
      opcode, _, rest = rest.partition("(")
      inside = rest[: _closing("(" + rest) - 2]
      name = head[2]
      current[name] = Instruction(
        name,
        type_,
        opcode,
        tuple(_NAME.findall(inside)),
        line,
        bool(head[1]),
      )
    elif started := _COMPUTATION.match(line):
      current = computations[started[1]] = {}
      if line.startswith("ENTRY"):
        entry = started[1]
  return Module(computations, entry, trips)


def size(type_: str) -> int:
  """Bytes of a type in a chip's main memory; of a tuple their sum."""
  return sum(
    _elements(dims) * BYTES.get(kind, 0)
    for kind, dims, layout in _ARRAY.findall(type_)
    if "S(" not in layout  # other memories: a TPU's own, the host's
  )


def whole_size(type_: str) -> int:
  """As `size`, whichever memory it is in."""
  return sum(
    _elements(dims) * BYTES.get(kind, 0)
    for kind, dims, _ in _ARRAY.findall(type_)
  )


def halves(type_: str) -> list[str]:
  """The parts of a tuple type: `((a, b), c)` -> `(a, b)` and `c`."""
  parts, depth, start = [], 0, 1
  for i, c in enumerate(type_):
    depth += (c in "([{") - (c in ")]}")
    if (c == "," and depth == 1) or (depth == 0 and c == ")"):
      parts.append(type_[start:i])
      start = i + 1
  return parts


def _elements(dims: str) -> int:
  return math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)


def _closing(text: str) -> int:
  """The place after the parenthesis that closes the first one."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth == 0:
      return i + 1
  return len(text)


def _after(line: str, name: str) -> str:
  match = re.search(rf"{name}=%?([\w.\-]+)", line)
  assert match, (name, line)
  return match[1]


def _branches(line: str) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", line)
  if listed:
    return [name.strip().lstrip("%") for name in listed[1].split(",")]
  return [
    _after(line, side) for side in ("true_computation", "false_computation")
  ]
