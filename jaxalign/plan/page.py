"""A plan as text of a screen, several of them side by side, or as JSON."""

from collections.abc import Sequence

from jaxalign.core.types import JsonObject
from jaxalign.plan import collectives
from jaxalign.plan.measure import RunPlan
from jaxalign.plan.targets import GIB

Rows = list[list[str]]


def text(plan: RunPlan) -> str:
  """A plan for people."""
  target = plan.target
  lines = [_machine(plan)]
  if plan.estimate:
    lines.append(plan.estimate)
  kept = [
    f"{name} {size / GIB:.2f}" for name, size in plan.resident.items() if size
  ]
  total = sum(plan.resident.values()) / GIB
  lines += ["", f"in memory all the time, GiB a chip: {total:.2f}"]
  lines.append("  " + ", ".join(kept))
  if plan.process:
    lines.append(
      f"and {plan.process / GIB:.2f} of the process itself: Python, XLA, and "
      "what compiling takes"
    )

  # The programs: memory, then arithmetic and traffic, then time.
  axes = sorted({a for p in plan.programs for a in _by_axis(p.exchanged)})
  head = ["program", "a step", "cache", "temporary", "peak GiB", "TFLOP"]
  head += ["memory GB", *(f"{axis} GB" for axis in axes), "ms", "bound by"]
  rows = [head]
  for program in plan.programs:
    sent = _by_axis(program.exchanged)
    rows.append(
      [
        program.name,
        f"{program.calls:.3g}x",
        _number(program.cache / GIB),
        _number(program.temporary / GIB),
        f"{program.peak / GIB:.2f}",
        _number(program.flops.total() / 1e12),
        _number(program.moved / 1e9),
        *(_number(sent.get(axis, 0) / 1e9) for axis in axes),
        _number(program.seconds * 1e3),
        program.bound,
      ]
    )
  lines += ["", "by program and chip (temporary: activations, gradients)"]
  lines += table(rows)

  # Verdict.
  peak, given = plan.needed / GIB, target.memory / GIB
  says = "fits" if plan.fits else "does not fit"
  lines += ["", f"{says}: {plan.peak.name} needs {peak:.2f} of {given:.2f} GiB"]
  lines.append(
    f"a step takes {_duration(plan.step_seconds)} or more, {plan.steps} steps "
    f"{_duration(plan.hours * 3600)} or more (roofline; real runs take two to "
    "three times as long)"
  )
  tokens = []
  if plan.sampled:
    tokens.append(f"{plan.steps * plan.sampled / 1e6:.3g} M tokens sampled")
  tokens.append(f"{plan.steps * plan.trained / 1e6:.3g} M trained")
  lines.append("at most " + ", ".join(tokens) + ", padding included")
  lines += _first_step(plan)
  lines += [f"note: {note}" for note in plan.notes]
  return "\n".join(lines)


def _first_step(plan: RunPlan) -> list[str]:
  """When the first step begins, and how many programs may be compiled later."""
  spent = plan.first_step
  lines = [
    f"first step after about {_duration(sum(spent.values()))}: "
    f"{_duration(spent['compile'])} of compiling as measured here, less with a "
    f"warm cache; {_duration(spent['start'])} to start and "
    f"{_duration(spent['read'])} to read weights are estimates"
  ]
  several = [
    f"{program.name} {program.shapes}"
    for program in plan.programs
    if program.shapes > 1
  ]
  if several:
    total = sum(program.shapes for program in plan.programs)
    lines.append(
      f"at most {total} programs over the run, each compiled once, as texts "
      f"are padded to a few lengths: {', '.join(several)}"
    )
  return lines


def side_by_side(plans: Sequence[RunPlan]) -> str:
  """Several plans of one run, a row each."""
  rows = [
    [
      "target",
      "chips",
      "mesh",
      "state GiB",
      "peak GiB",
      "of",
      "fits",
      "step",
      "hours",
      "chip hours",
      "bound by",
    ]
  ]
  for plan in plans:
    longest = max(plan.programs, key=lambda p: p.calls * p.seconds)
    mark = "*" if plan.estimate else ""
    rows.append(
      [
        plan.target.name + mark,
        str(plan.target.chips),
        _mesh(plan),
        f"{sum(plan.resident.values()) / GIB:.2f}",
        f"{plan.needed / GIB:.2f}",
        f"{plan.target.memory / GIB:.2f}",
        "yes" if plan.fits else "no",
        _duration(plan.step_seconds),
        f"{plan.hours:.3g}",
        f"{plan.hours * plan.target.chips:.3g}",
        f"{longest.name}, {longest.bound}",
      ]
    )
  lines = table(rows)
  lines.append("per chip; times are rooflines, real runs take longer")
  for why in sorted({plan.estimate for plan in plans if plan.estimate}):
    lines.append(f"* {why}")
  return "\n".join(lines)


def as_json(plan: RunPlan) -> JsonObject:
  """A plan for programs; bytes, seconds and operations are of one chip."""
  return {
    "target": plan.target.name,
    "chip": plan.target.chip.name,
    "chips": plan.target.chips,
    "mesh": plan.mesh,
    "memory_bytes": plan.target.memory,
    "resident_bytes": plan.resident,
    "peak_bytes": plan.needed,
    "process_bytes": plan.process,
    "fits": plan.fits,
    "steps": plan.steps,
    "rows": plan.rows,
    "sampled_tokens": plan.steps * plan.sampled,
    "trained_tokens": plan.steps * plan.trained,
    "step_seconds": plan.step_seconds,
    "hours": plan.hours,
    "first_step_seconds": plan.first_step,
    "remat": plan.remat,
    "estimate": plan.estimate,
    "notes": list(plan.notes),
    "programs": [
      {
        "name": program.name,
        "calls_a_step": program.calls,
        "arguments_bytes": program.arguments,
        "cache_bytes": program.cache,
        "temporary_bytes": program.temporary,
        "other_resident_bytes": program.other_resident,
        "peak_bytes": program.peak,
        "flops": dict(program.flops),
        "memory_traffic_bytes": program.moved,
        "exchanged_bytes": _by_axis(program.exchanged),
        "exchanges": [
          {
            "kind": each.kind,
            "axis": each.axis,
            "bytes": each.bytes,
            "chips": each.size,
            "runs": each.count,
          }
          for each in program.exchanged
        ],
        "seconds": program.times,
        "bound_by": program.bound,
        "compiled_seconds": program.compiled_s,
        "shapes": program.shapes,
      }
      for program in plan.programs
    ],
  }


def table(rows: Rows) -> list[str]:
  """Rows as columns; the first is left-aligned, as is the last."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  last = len(widths) - 1
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i in (0, last) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append(("  " + "  ".join(cells)).rstrip())
  return lines


def _machine(plan: RunPlan) -> str:
  target = plan.target
  whole = target.chip.memory / GIB
  given = f"{target.memory / GIB:.2f} GiB each"
  if target.share < 1:
    given += f", {target.share:g} of {whole:.2f}"
  count = f"{target.chips} x {target.chip.name}"
  return f"{target.name}: {count}, {given}; mesh {_mesh(plan)}"


def _mesh(plan: RunPlan) -> str:
  used = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
  return ", ".join(used) or "one chip"


def _by_axis(exchanged: Sequence[collectives.Traffic]) -> dict[str, int]:
  return collectives.by_axis(list(exchanged))


def _number(value: float) -> str:
  """Three digits; a dash for zero."""
  return f"{value:.3g}" if value else "-"


def _duration(seconds: float) -> str:
  if seconds < 1:
    return f"{seconds * 1e3:.3g} ms"
  if seconds < 120:
    return f"{seconds:.3g} s"
  if seconds < 7200:
    return f"{seconds / 60:.3g} min"
  return f"{seconds / 3600:.3g} h"
