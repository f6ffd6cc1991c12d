"""A run on a target: every program compiled, its memory and its time.

Each program holds its own arguments and temporary memory while it runs; the
parameters, optimizer state, reference and reward models of the others stay in
memory next to it.
"""

import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from jaxalign import algorithms
from jaxalign.config import TrainingConfig
from jaxalign.config.online import OnlineConfig
from jaxalign.core import memory
from jaxalign.core.types import TrainState
from jaxalign.errors import UserError
from jaxalign.models.config import CausalConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program, device_bytes, fetched_bytes
from jaxalign.plan import collectives, hlo, roofline
from jaxalign.plan import flops as arithmetic
from jaxalign.plan.targets import GIB, Target
from jaxalign.runtime import profile
from jaxalign.sampling.sampler import next_power_of_two
from jaxalign.setup.auto import with_tpu_widths
from jaxalign.setup.spec import RunSpec

IDLE = 0.25  # wasted share of the sampling below which nothing is said
# What stays in memory, in the order it is printed.
PARAMETERS, OPTIMIZER = "parameters", "optimizer"
REFERENCE, REWARDS = "reference", "reward models"
RESIDENT = (PARAMETERS, OPTIMIZER, REFERENCE, REWARDS)

# Of a run's start: importing and opening everything, and what a host reads a
# second from a disk or a bucket.
START, READ_RATE = 10.0, 1e9

# "... total memory required for HLO temporaries (17.55G) exceeds available HBM
# (15.75G)", and other wordings with the two numbers.
_TOO_LARGE = re.compile(r"([\d.]+)([KMG])[^\d]*\)?[^.\d]*?([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """What one program needs; bytes and operations are of one chip.

  Attributes:
    name: of the program.
    calls: in a step of the run.
    arguments: bytes that it is called with and that do not stay in memory.
    cache: bytes of keys and values while it samples, a part of `temporary`.
    temporary: bytes beyond arguments and results: activations, gradients.
    other_resident: bytes of other programs' parameters, which stay in memory.
    peak: bytes in use at most.
    flops: multiplications and additions by kind.
    moved: bytes to and from the chip's memory.
    exchanged: with other chips.
    times: seconds by what takes them, see `roofline.seconds`.
    compiled_s: seconds that it took to compile here.
    shapes: of its arguments that a run may compile it for, as texts are padded
      to a few lengths; this one is the largest.
  """

  name: str
  calls: int | float
  arguments: int
  cache: int
  temporary: int
  other_resident: int
  peak: int
  flops: arithmetic.Flops
  moved: int
  exchanged: tuple[collectives.Traffic, ...]
  times: dict[str, float]
  compiled_s: float
  shapes: int = 1

  @property
  def bound(self) -> str:
    """What takes longest."""
    return roofline.bound(self.times)[0]

  @property
  def seconds(self) -> float:
    """The least time of a call."""
    return roofline.bound(self.times)[1]


@dataclasses.dataclass(frozen=True)
class RunPlan:
  """A run on a target.

  Attributes:
    target: the machine.
    mesh: axis -> size.
    resident: bytes a chip of what stays in memory, by the names of `RESIDENT`.
    programs: in the order of a step.
    steps: of the run.
    sampled: tokens drawn in a step at most.
    trained: tokens of a step's updates at most, padding included.
    rows: of one pass of the update, over all chips.
    process: bytes that a run on this CPU takes besides its arrays: Python, XLA,
      what is compiled and what compiling takes; 0 for other targets.
    remat: what its backward passes compute again, see `models.remat`.
    estimate: why the figures are an estimate; "" = compiled for the target.
    notes: what they stand on, a sentence each.
  """

  target: Target
  mesh: dict[str, int]
  resident: dict[str, int]
  programs: tuple[ProgramPlan, ...]
  steps: int
  sampled: int
  trained: int
  rows: int
  process: int = 0
  remat: str = "none"
  estimate: str = ""
  notes: tuple[str, ...] = ()

  @property
  def peak(self) -> ProgramPlan:
    """The program that needs most memory."""
    return max(self.programs, key=lambda program: program.peak)

  @property
  def needed(self) -> int:
    """Bytes in use at most, those of the process included."""
    return self.peak.peak + self.process

  @property
  def fits(self) -> bool:
    """Whether every program does."""
    return self.needed <= self.target.memory

  @property
  def first_step(self) -> dict[str, float]:
    """Seconds until the first step, by what takes them.

    Compiling was measured here, and a warm compilation cache saves it. The
    others are estimates.
    """
    read = self.resident[PARAMETERS] + self.resident[REWARDS]
    return {
      "start": START,
      "read": read * self.target.host_chips / READ_RATE,
      "compile": sum(program.compiled_s for program in self.programs),
    }

  @property
  def step_seconds(self) -> float:
    """The least time of a step."""
    return sum(p.calls * p.seconds for p in self.programs)

  @property
  def hours(self) -> float:
    """The least time of the run."""
    return self.steps * self.step_seconds / 3600


def for_platform(config: TrainingConfig, target: Target) -> TrainingConfig:
  """The config with what `auto` means on the target: formats and widths.

  A program that is compiled for another platform must have the same.
  """
  if target.chip.kind == "cpu":
    return config
  if target.chip.kind == "tpu":
    config = with_tpu_widths(config)
  if config.precision.compute == "auto":
    precision = dataclasses.replace(config.precision, compute="bfloat16")
    config = dataclasses.replace(config, precision=precision)
  if isinstance(config, OnlineConfig) and config.scoring.dtype == "auto":
    scoring = dataclasses.replace(config.scoring, dtype="bfloat16")
    config = dataclasses.replace(config, scoring=scoring)
  return config


def devices_of(target: Target) -> tuple[Sequence[jax.Device], str]:
  """Devices to compile for, and why the figures are an estimate or "".

  Raises:
    UserError: no compiler is installed, and too few CPU devices were set.
  """
  if not (target.missing or target.estimated):
    return target.devices(), ""
  why = "as asked"
  if target.missing:
    why = (
      f"as no compiler for {target.chip.name} is installed; {target.missing}"
    )
  found = jax.devices("cpu")
  if len(found) < target.chips:
    raise UserError(
      f"--on {target.name}: {len(found)} CPU devices cannot stand for "
      f"{target.chips} chips, {why}"
    )
  return found[: target.chips], f"estimate: compiled for CPUs, {why}"


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program and what its compiler made of it.

  Attributes:
    program: as the run calls it.
    flops: over all chips.
    found: None where the compiler refused it as too large.
    needed: bytes on a chip by that refusal.
    seconds: that it took to trace and compile here.
  """

  program: Program
  flops: arithmetic.Flops
  found: jax.stages.Compiled | None
  needed: int
  seconds: float


def plan(
  config: TrainingConfig, target: Target, notes: tuple[str, ...] = ()
) -> RunPlan:
  """Compiles every program of a run for a target.

  Args:
    config: of the run; its models and data are here, see `standins`.
    target: the machine.
    notes: for the plan.

  Raises:
    UserError: the run cannot start on this machine.
  """
  devices, estimate = devices_of(target)
  spec = algorithms.describe(
    for_platform(config, target), devices, target.device_memory
  )
  programs = algorithms.programs(spec)
  resident = residents(programs)
  compiled = []
  for program in programs:
    if sys.stderr.isatty():  # a TPU's compiler takes minutes
      print(f"{target.name}: compiling {program.name}", file=sys.stderr)
    compiled.append(compile_program(program, spec, target))
  # Before the programs are read as text: up to here the process has done what
  # a run does that finds nothing in the compilation cache, without its arrays.
  process = 0
  if target.chip.kind == "cpu":
    others = [
      compile_program(program, spec, target)
      for program in narrower_updates(spec)
    ]
    process = profile.memory()["memory/peak_bytes"]
    del others  # until here they take memory, as in the run
  measured = [measure(each, spec, target, resident) for each in compiled]
  micros, rows, tokens = spec.batch_shape
  updates = sum(p.calls for p in programs if state_of(p) is not None)
  sampled = 0
  if spec.rollout:
    sampled = spec.rollout.rows * spec.rollout.config.sampling.max_new_tokens
  return RunPlan(
    target=target,
    mesh=dict(spec.mesh.shape),
    resident=_by_class(resident),
    programs=tuple(measured),
    steps=spec.config.steps,
    sampled=sampled,
    trained=round(updates * micros * rows * tokens),
    rows=rows,
    process=process,
    remat=spec.config.remat,
    estimate=estimate,
    notes=notes
    + _filler(spec)
    + _idle(spec)
    + _generation(spec, measured, target.memory),
  )


def _filler(spec: RunSpec[TrainingConfig]) -> tuple[str, ...]:
  """A warning where an update has rows that count for nothing."""
  kept = getattr(getattr(spec.config, "superbatch", None), "kept_rows", 0)
  wanted = min(spec.config.batch_size, kept or spec.config.batch_size)
  note = filler_note(dict(spec.mesh.shape), spec.batch_shape, wanted)
  return (note,) if note else ()


def filler_note(
  mesh: dict[str, int], shape: tuple[int, int, int], wanted: int
) -> str:
  """How many rows of an update are filler, and the remedy; "" = none.

  Args:
    mesh: axis -> size.
    shape: M, B, T of the update.
    wanted: rows that count.
  """
  micros, rows, tokens = shape
  share = 1 - wanted / (micros * rows)
  if share <= 0:
    return ""
  # As many parts of rows as there are rows, and their chips to the tokens.
  fsdp = math.gcd(mesh["fsdp"], max(wanted // micros, 1))
  sequence = mesh["sequence"] * mesh["fsdp"] // fsdp
  others = "give chips to mesh.tensor"
  if sequence > mesh["sequence"] and tokens % sequence == 0:
    others = (
      f"split their tokens by --config.mesh.fsdp={fsdp} "
      f"--config.mesh.sequence={sequence}"
    )
  return (
    f"{share:.0%} of an update's rows are filler: {wanted} of "
    f"{micros * rows} rows count; raise config.batch_size and "
    f"superbatch.prompts, or {others}"
  )


def _idle(spec: RunSpec[TrainingConfig]) -> tuple[str, ...]:
  """A warning where chips sample what others sample too, or nothing."""
  if not spec.rollout:
    return ()
  config = spec.rollout.config
  prompts = config.prompts_per_step or len(spec.rollout.prompts)
  prompts = min(config.sampling.batch_prompts or prompts, prompts)
  note = idle_note(dict(spec.mesh.shape), prompts, config.samples_per_prompt)
  return (note,) if note else ()


def idle_note(mesh: dict[str, int], prompts: int, samples: int) -> str:
  """What share of the sampling is wasted, and the remedy; "" = little.

  Args:
    mesh: axis -> size.
    prompts: of a call of the sampler.
    samples: of each.
  """
  rows = next_power_of_two(prompts) * samples
  axes = meshes.fitting(meshes.SHORT_ROWS, rows, mesh)
  names = (axes,) if isinstance(axes, str) else axes or ()
  parts = math.prod(mesh[name] for name in names)
  chips = math.prod(mesh[name] for name in meshes.SHORT_ROWS)
  share = 1 - prompts * samples / rows * parts / chips
  if share < IDLE:
    return ""
  return (
    f"{share:.0%} of the sampling is wasted: {prompts} x {samples} "
    f"completions are drawn as {rows} rows, which divide over {parts} of "
    f"{chips} parts of the mesh; take prompts in powers of two whose "
    "completions divide over all of them (sampling.batch_prompts), or give "
    "chips to mesh.tensor"
  )


def _generation(
  spec: RunSpec[TrainingConfig], measured: Sequence[ProgramPlan], memory: int
) -> tuple[str, ...]:
  """Where layers are that stay split while a policy samples, or should."""
  sizes = spec.mesh.shape
  parts = sizes["fsdp"] * sizes["sequence"]
  if not spec.rollout or parts == 1:
    return ()
  if not spec.config.mesh.gather_for_generation:
    return (
      f"while it samples, layers stay split over {parts} chips and are "
      "gathered at each token, during other computation as far as there is "
      "any (mesh.gather_for_generation)",
    )
  most = max(measured, key=lambda program: program.peak)
  if most.peak <= memory or not most.name.startswith("sample"):
    return ()
  return (
    "sampling needs most memory, as each chip then has all layers; "
    "--config.mesh.gather_for_generation=false leaves them split",
  )


# A leaf that stays in memory: its class and its bytes on a chip.
Residents = dict[int, tuple[str, int]]


def residents(programs: Sequence[Program]) -> Residents:
  """Everything that stays in memory over a step, each array once.

  An array that two programs share is the same object in their arguments.
  """
  found: Residents = {}
  for program in sorted(programs, key=lambda p: state_of(p) is None):
    for kind, leaf in _resident_leaves(program):
      found.setdefault(id(leaf), (kind, device_bytes(leaf)))
  return found


def _resident_leaves(
  program: Program,
) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
  """The arrays among a program's arguments that stay in memory.

  Parameters are nested dicts and a run's state has a type of its own; batches,
  keys and settings are neither.
  """
  scores = "score" in program.name
  for place, argument in enumerate(program.arguments):
    if isinstance(argument, TrainState):
      for kind, part in (
        (PARAMETERS, argument.params),
        (OPTIMIZER, (argument.opt_state, argument.ema, argument.extra_state)),
      ):
        for leaf in jax.tree.leaves(part):
          yield kind, leaf
    elif isinstance(argument, dict):
      # (state, frozen, reference, batch, key) of an update.
      kind = REWARDS if scores else PARAMETERS
      if state_of(program) is not None and place == 2:
        kind = REFERENCE
      for leaf in jax.tree.leaves(argument):
        yield kind, leaf


def state_of(program: Program) -> TrainState | None:
  """The run's state among a program's arguments, which an update has."""
  for argument in program.arguments:
    if isinstance(argument, TrainState):
      return argument
  return None


def _by_class(found: Residents) -> dict[str, int]:
  total = dict.fromkeys(RESIDENT, 0)
  for kind, size in found.values():
    total[kind] += size
  return total


def compile_program(
  program: Program, spec: RunSpec[TrainingConfig], target: Target
) -> Compiled:
  """Compiles a program for its devices."""
  start = time.monotonic()
  traced = program.trace()
  flops = arithmetic.count_jaxpr(traced.jaxpr.jaxpr, max(program.iterations, 1))
  on_cpu = meshes.platform(spec.mesh) == "cpu"
  options = None if on_cpu else target.compiler_options
  found, needed = None, 0
  try:
    found = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    # A TPU's compiler refuses what is too large; its figures say by how much.
    needed = too_large(str(error))
    if needed is None:
      raise
  return Compiled(program, flops, found, needed, time.monotonic() - start)


def measure(
  compiled: Compiled,
  spec: RunSpec[TrainingConfig],
  target: Target,
  resident: Residents,
) -> ProgramPlan:
  """Reads what a compiled program needs."""
  program = compiled.program
  flops = roofline.per_chip(compiled.flops, spec.mesh.size)
  own = {id(leaf) for _, leaf in _resident_leaves(program)}
  others = sum(size for key, (_, size) in resident.items() if key not in own)
  kept = sum(size for key, (_, size) in resident.items() if key in own)
  # An array may be passed twice, as the base under adapters that is the
  # reference too; in memory it is once.
  leaves = jax.tree.leaves(program.arguments)
  unique = {id(leaf): leaf for leaf in leaves}
  passed = sum(device_bytes(x) for key, x in unique.items() if key not in own)
  twice = sum(map(device_bytes, leaves))
  twice -= sum(map(device_bytes, unique.values()))
  if compiled.found is None:
    moved, exchanged, peak = 0, (), compiled.needed + others
    temporary = max(compiled.needed - kept - passed, 0)
  else:
    stats = compiled.found.memory_analysis()
    text = compiled.found.as_text()
    assert stats is not None  # every compiler of a target tells both
    assert text is not None
    given = stats.argument_size_in_bytes - twice
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    waiting = sum(fetched_bytes(x) for x in leaves if memory.is_on_host(x))
    # Without its device only a TPU's compiler knows the host's memory. Others
    # take what waits there for arguments on the chip.
    if waiting and not stats.host_argument_size_in_bytes:
      given -= waiting
      # PPO fetches once, before its epochs.
      late = state_of(program) if program.name == "update" else None
      temporary = _with_fetched(temporary, waiting, late)
    # What a program does not read is no argument to XLA, and in memory too.
    given = max(given, kept + passed)
    code = stats.generated_code_size_in_bytes
    peak = given + made + temporary + code + others
    module = hlo.parse(text, max(program.iterations, 1))
    moved = module.traffic()
    exchanged = tuple(
      collectives.of_module(module, spec.mesh, target.part_chips)
    )
  return ProgramPlan(
    name=program.name,
    calls=program.calls,
    arguments=passed,
    cache=cache_bytes(program, spec),
    temporary=temporary,
    other_resident=others,
    peak=peak,
    flops=flops,
    moved=moved,
    exchanged=exchanged,
    times=roofline.seconds(flops, moved, exchanged, target),
    compiled_s=compiled.seconds,
    shapes=shape_count(program, spec),
  )


def _with_fetched(
  temporary: int, waiting: int, state: TrainState | None
) -> int:
  """Temporary bytes with what is fetched from the host's memory.

  Args:
    temporary: without it.
    waiting: bytes to fetch.
    state: of an update, which fetches when activations are gone and nothing
      but the gradients is left; None = of a program that fetches first.
  """
  if state is None:
    return temporary + waiting
  gradients = sum(map(device_bytes, jax.tree.leaves(state.params)))
  return max(temporary, gradients + waiting)


def shape_count(program: Program, spec: RunSpec[TrainingConfig]) -> int:
  """The widths up to the program's own that texts are padded to, at most."""
  config, widths, own = spec.config, (), 0
  if state_of(program) is not None:
    widths, own = config.length_buckets, spec.batch_shape[2]
  elif isinstance(config, OnlineConfig) and program.name.startswith("s"):
    # "sample" and "score ..."; evaluations use the same programs.
    sampling = program.name.startswith("sample")
    section = config.sampling if sampling else config.scoring
    widths, own = section.length_buckets, program.arguments[1].shape[-1]
  found = 1 + sum(width < own for width in widths)
  # Scorers have calls of fewer rows for the last texts of a length, and on
  # several devices for a few texts.
  if program.name.startswith("score"):
    found *= 3 if meshes.row_count(spec.mesh) > 1 else 2
  return found


def narrower_updates(spec: RunSpec[TrainingConfig]) -> list[Program]:
  """A run's updates for the next narrower texts, as batches differ in width."""
  micros, rows, tokens = spec.batch_shape
  widths = [width for width in spec.config.length_buckets if width < tokens]
  if not widths:
    return []
  changed = dataclasses.replace(spec, batch_shape=(micros, rows, widths[-1]))
  return [p for p in algorithms.programs(changed) if state_of(p) is not None]


def too_large(message: str) -> int | None:
  """Bytes that a program needs, out of a compiler's refusal; None = another.

  A TPU's compiler says "Ran out of memory in memory space hbm. Used 17.55G of
  15.75G hbm", or "... (17.55G) exceeds available HBM (15.75G)".
  """
  if "memory" not in message or "RESOURCE_EXHAUSTED" not in message:
    return None
  match = _TOO_LARGE.search(message.partition("memory")[2])
  if not match:
    return None
  return round(float(match[1]) * _UNITS[match[2]])


def cache_bytes(program: Program, spec: RunSpec[TrainingConfig]) -> int:
  """Keys and values of a sampler's call on one chip; 0 of other programs."""
  config = spec.policy.model.config
  samples = program.keywords.get("samples_per_prompt", 0)
  if not samples or not isinstance(config, CausalConfig):
    return 0
  prompts, width = program.arguments[1].shape
  rows = prompts * samples
  # A prompt's keys are stored once, a completion's for each row.
  tokens = prompts * width + rows * program.keywords["capacity"]
  each = 2 * config.layers * config.kv_heads * config.head_dim
  size = tokens * each * jax.numpy.dtype(config.dtype).itemsize
  parts = meshes.row_count(spec.mesh) * spec.mesh.shape["sequence"]
  return size // parts if rows % parts == 0 else size
