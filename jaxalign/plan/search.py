"""The largest pass that fits a target, and the smallest target that fits."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxalign import algorithms
from jaxalign.config import TrainingConfig
from jaxalign.errors import UserError
from jaxalign.models import remat
from jaxalign.parallel import mesh as meshes
from jaxalign.plan import measure
from jaxalign.plan.measure import RunPlan
from jaxalign.plan.targets import GIB, Target
from jaxalign.setup import auto
from jaxalign.setup.spec import RunSpec

MOST = 4096  # rows of a pass that are tried
_TRIES = 6  # compilations


def advise(
  config: TrainingConfig, plan: RunPlan, run: Callable[[Target], RunPlan]
) -> list[str]:
  """What to compute again, the largest pass, and the fewest chips: sentences.

  Args:
    config: of the run.
    plan: of the run on a target.
    run: plans for another target.
  """
  target = plan.target
  lines = other_remat(config, plan) if config.remat == "auto" else []
  rows = largest_rows(config, target, target.memory - plan.process)
  lines += [
    f"largest pass that fits: {rows} rows; this run uses {plan.rows}"
    if rows
    else "no pass fits, however few rows it has"
  ]
  least = smallest(run, plan, target.sizes())
  if least is None:
    lines.append(
      f"no number of {target.chip.name} fits; split rows by micro_batch, set "
      "remat, or use lora"
    )
  else:
    peak, given = least.needed / GIB, least.target.memory / GIB
    lines.append(
      f"smallest that fits: {least.target.name} ({peak:.2f} of {given:.2f} GiB)"
    )
  return lines


def other_remat(config: TrainingConfig, plan: RunPlan) -> list[str]:
  """Where `remat=auto` has misjudged, what fits and computes less again.

  A run chooses by shapes, without compiling; this compiles its update with the
  neighbours of what it takes.

  Args:
    config: of the run, with `remat=auto`.
    plan: of the run.
  """
  target, order = plan.target, list(remat.POLICIES[:-1])
  place, memory = order.index(plan.remat), plan.target.memory - plan.process
  devices, _ = measure.devices_of(target)
  spec = algorithms.describe(
    measure.for_platform(config, target), devices, target.device_memory
  )

  def peak(policy: str) -> int:
    return update_peak(auto.replace_remat(spec, policy), target)

  update = next(p for p in plan.programs if p.name in ("update", "learn"))
  if update.peak > memory:
    for policy in order[place + 1 :]:
      if (needed := peak(policy)) <= memory:
        return [
          f"remat=auto takes {plan.remat}, with which the update does not fit; "
          f"with --config.remat={policy} it needs {needed / GIB:.2f} GiB"
        ]
  elif place and (needed := peak(order[place - 1])) <= memory:
    return [
      f"remat=auto takes {plan.remat}; --config.remat={order[place - 1]} fits "
      f"too, with {needed / GIB:.2f} GiB, and computes less again"
    ]
  return []


def largest_rows(config: TrainingConfig, target: Target, memory: int) -> int:
  """Rows of one pass of the update that fit the target; 0 = none do.

  Memory grows with the rows nearly along a line, so a line through the two
  nearest compilations guesses the next; a sixteenth is close enough.

  Args:
    config: of the run.
    target: the machine.
    memory: bytes of a chip that a program can have.
  """
  devices, _ = measure.devices_of(target)
  spec = algorithms.describe(
    measure.for_platform(config, target), devices, target.device_memory
  )
  parts = meshes.row_count(spec.mesh)
  most = MOST // parts * parts
  # Rows -> bytes in use, of those that fit and of those that do not.
  fit: dict[int, int] = {}
  too_large: dict[int, int] = {}
  rows = -(-spec.batch_shape[1] // parts) * parts
  for _ in range(_TRIES):
    peak = update_peak(with_rows(spec, rows), target)
    (fit if peak <= memory else too_large)[rows] = peak
    low, high = max(fit, default=0), min(too_large, default=most + parts)
    if high - low <= max(parts, low // 16):
      break
    guess = _crossing(fit | too_large, low, high, memory)
    # Strictly between what is known, and no more than eight times as many.
    guess = min(guess // parts * parts, 8 * max(low, parts), high - parts)
    rows = max(guess, low + parts)
  return max(fit, default=0)


def _crossing(known: dict[int, int], low: int, high: int, limit: int) -> int:
  """Rows at which a line through two known points reaches the limit."""
  ends = [n for n in (low, high) if n in known]
  if len(ends) < 2:
    ends = sorted(known)[-2:] if low in known else sorted(known)[:2]
  if len(ends) < 2:  # one point says no slope
    return 2 * low or high // 2
  a, b = ends
  slope = max((known[b] - known[a]) / (b - a), 1)
  return a + int((limit - known[a]) / slope)


def with_rows(
  spec: RunSpec[TrainingConfig], rows: int
) -> RunSpec[TrainingConfig]:
  """The run with other rows in a pass of its update."""
  micros, _, tokens = spec.batch_shape
  return dataclasses.replace(spec, batch_shape=(micros, rows, tokens))


def update_peak(spec: RunSpec[TrainingConfig], target: Target) -> int:
  """Bytes on a chip that a run's update needs, compiled again."""
  programs = algorithms.programs(spec)
  update = next(p for p in programs if measure.state_of(p) is not None)
  compiled = measure.compile_program(update, spec, target)
  resident = measure.residents(programs)
  return measure.measure(compiled, spec, target, resident).peak


def smallest(
  run: Callable[[Target], RunPlan], found: RunPlan, among: Sequence[Target]
) -> RunPlan | None:
  """The plan on the fewest chips that the run fits.

  Args:
    run: plans for a target.
    found: the plan at hand.
    among: the same chips in growing numbers.
  """
  target = found.target
  # State is split over all chips, rows as well where there are enough.
  state = sum(found.resident.values()) * target.chips
  temporary = found.peak.temporary
  for candidate in among:
    if candidate.chips == target.chips:
      if found.fits:
        return found
      continue
    # Too few for the state and, on fewer chips, for as much temporary memory
    # as now: nothing is compiled for them.
    least = state / candidate.chips
    if candidate.chips < target.chips:
      least += temporary
    if least > candidate.memory:
      continue
    # Where the run fits, more chips are no answer.
    if found.fits and candidate.chips > target.chips:
      return found
    try:
      tried = run(candidate)
    except UserError:  # its rows do not divide, say
      continue
    if tried.fits:
      return tried
  return found if found.fits else None
