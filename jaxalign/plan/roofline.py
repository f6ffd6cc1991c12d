"""The least time that a program can take on a chip, and what bounds it."""

import math
from collections.abc import Sequence

from jaxalign.plan import flops as arithmetic
from jaxalign.plan.collectives import Traffic
from jaxalign.plan.targets import Target

# What may bound a program.
ARITHMETIC, MEMORY, EXCHANGE = "arithmetic", "memory", "exchange"


def seconds(
  flops: arithmetic.Flops,
  moved: int,
  exchanged: Sequence[Traffic],
  target: Target,
) -> dict[str, float]:
  """Seconds of each resource; they overlap, so the largest is the least time.

  Args:
    flops: of one chip, by kind.
    moved: bytes to and from a chip's memory.
    exchanged: between chips.
    target: the machine.
  """
  chip = target.chip
  rates = {
    arithmetic.BF16: chip.flops,
    arithmetic.F32: chip.flops_f32,
    arithmetic.EXACT: chip.flops_exact,
  }
  return {
    ARITHMETIC: sum(n / rates[kind] for kind, n in flops.items()),
    MEMORY: moved / chip.bandwidth,
    EXCHANGE: sum(exchange_seconds(each, target) for each in exchanged),
  }


def exchange_seconds(traffic: Traffic, target: Target) -> float:
  """Seconds of an exchange: the slower of the links and the network."""
  links = traffic.bytes / link_rate(traffic.part, target)
  if not traffic.crosses:
    return links
  # The chips of a group in one slice or node share their network cards.
  return max(links, traffic.bytes / (traffic.part * target.chip.network))


def link_rate(chips: int, target: Target) -> float:
  """Bytes a second that a chip sends within a group of so many chips.

  A GPU reaches all others at once. On a TPU a group lies along one or more
  dimensions of the slice, and a dimension that closes to a ring is used in
  both directions.
  """
  if target.chip.kind != "tpu":
    return target.chip.link
  rate, covered = 0.0, 1
  for size in sorted(target.shape, reverse=True):
    if covered >= chips:
      break
    covered *= size
    rate += target.chip.link * (2 if _closes(size, target) else 1)
  return rate or target.chip.link


def _closes(size: int, target: Target) -> bool:
  """Whether a dimension of a slice is a ring.

  Flat generations close at 16 chips, cubic ones in slices of whole cubes.
  """
  if len(target.shape) == 2:
    return size == 16
  return all(s % 4 == 0 for s in target.shape) and size >= 4


def bound(times: dict[str, float]) -> tuple[str, float]:
  """What bounds a program, and its least time in seconds."""
  name = max(times, key=times.__getitem__)
  return name, times[name]


def per_chip(flops: arithmetic.Flops, chips: int) -> arithmetic.Flops:
  """A chip's part of a program's arithmetic, rounded up."""
  return arithmetic.Flops({k: math.ceil(n / chips) for k, n in flops.items()})
