"""The machines that a run can be planned for, by the clouds' own names.

All figures are from public data sheets: cloud.google.com/tpu/docs (v4, v5e,
v5p, v6e) and NVIDIA's data sheets and tuning guides. Rates are peaks without
sparsity, links count one direction.
"""

import dataclasses
import difflib
import importlib.util
import logging
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from jaxalign.errors import UserError

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory, which JAX takes at its start


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    kind: "tpu", "gpu" or "cpu".
    name: for people.
    memory: bytes; of a TPU what programs can have, of a GPU all of it.
    bandwidth: bytes a second to and from that memory.
    flops: multiplications and additions a second in bfloat16.
    flops_f32: the same of float32 operands at JAX's default precision: one
      bfloat16 pass on a TPU, TF32 on a GPU.
    flops_exact: the same at `precision="highest"`.
    link: bytes a second of one link, or of all links of a GPU, one way.
    network: bytes a second to other slices or nodes, a chip, one way.
  """

  kind: str
  name: str
  memory: int
  bandwidth: float
  flops: float
  flops_f32: float
  flops_exact: float
  link: float
  network: float


def _tpu(
  name: str,
  *,
  gib: float,
  bandwidth: float,
  flops: float,
  link: float,
  network: float,
) -> Chip:
  return Chip(
    kind="tpu",
    name=name,
    memory=round(gib * GIB),
    bandwidth=bandwidth,
    flops=flops,
    flops_f32=flops,
    flops_exact=flops / 6,  # six bfloat16 passes make a float32 product
    link=link,
    network=network,
  )


# HBM is what the compiler gives a program: a little less than the sheet says.
TPUS = {
  "v4": _tpu(
    "TPU v4",
    gib=30.75,
    bandwidth=1.228e12,
    flops=275e12,
    link=50e9,
    network=6.25e9,
  ),
  "v5e": _tpu(
    "TPU v5e",
    gib=15.75,
    bandwidth=819e9,
    flops=197e12,
    link=50e9,
    network=3.125e9,
  ),
  "v5p": _tpu(
    "TPU v5p",
    gib=95.74,
    bandwidth=2.765e12,
    flops=459e12,
    link=100e9,
    network=6.25e9,
  ),
  "v6e": _tpu(
    "TPU v6e",
    gib=31.25,
    bandwidth=1.64e12,
    flops=918e12,
    link=100e9,
    network=12.5e9,
  ),
}
# The cloud's prefix of an accelerator type -> chip, and cores a chip, as v4 and
# v5p count TensorCores in their names.
PREFIXES = {
  "v4": ("v4", 2),
  "v5litepod": ("v5e", 1),
  "v5e": ("v5e", 1),
  "v5p": ("v5p", 2),
  "v6e": ("v6e", 1),
}
# Chips of a slice -> its shape, for the flat and the cubic generations.
FLAT = {
  1: (1, 1),
  4: (2, 2),
  8: (2, 4),
  16: (4, 4),
  32: (4, 8),
  64: (8, 8),
  128: (8, 16),
  256: (16, 16),
}
CUBIC = {
  4: (2, 2, 1),
  8: (2, 2, 2),
  16: (2, 2, 4),
  32: (2, 4, 4),
  64: (4, 4, 4),
  128: (4, 4, 8),
  256: (4, 8, 8),
  512: (8, 8, 8),
  1024: (8, 8, 16),
  2048: (8, 16, 16),
  4096: (16, 16, 16),
}
SHAPES = {"v4": CUBIC, "v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Card:
  """What XLA has to know of a GPU, besides what `Chip` says."""

  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  lanes: int  # float32 lanes of each
  threads: int  # resident on each
  shared: int  # bytes of shared memory of each
  block_shared: int  # the same, of a block that asks for most
  cache: int  # bytes of L2
  clock: float  # GHz
  title: str


# Resident threads, shared memory of a multiprocessor, and of a block, by the
# compute capability.
_LIMITS = {
  (8, 0): (2048, 167_936, 166_912),
  (8, 6): (1536, 102_400, 101_376),
  (8, 9): (1536, 102_400, 101_376),
  (9, 0): (2048, 233_472, 232_448),
}


def _gpu(
  name: str,
  *,
  memory: int,
  bandwidth: float,
  flops: float,
  flops_exact: float,
  link: float,
  network: float,
  capability: tuple[int, int],
  cores: int,
  lanes: int,
  cache: int,
  clock: float,
  title: str,
) -> tuple[Chip, Card]:
  # TF32 has half the rate of bfloat16 on all of these.
  chip = Chip(
    kind="gpu",
    name=name,
    memory=memory,
    bandwidth=bandwidth,
    flops=flops,
    flops_f32=flops / 2,
    flops_exact=flops_exact,
    link=link,
    network=network,
  )
  threads, shared, block_shared = _LIMITS[capability]
  card = Card(
    capability=capability,
    cores=cores,
    lanes=lanes,
    threads=threads,
    shared=shared,
    block_shared=block_shared,
    cache=cache,
    clock=clock,
    title=title,
  )
  return chip, card


GPUS = {
  "a6000": _gpu(
    "RTX A6000",
    memory=51_041_271_808,
    bandwidth=768.096e9,
    flops=154.8e12,
    flops_exact=38.7e12,
    link=31.5e9,
    network=3.125e9,
    capability=(8, 6),
    cores=84,
    lanes=128,
    cache=6_291_456,
    clock=1.8,
    title="NVIDIA RTX A6000",
  ),
  "rtx4090": _gpu(
    "RTX 4090",
    memory=25_757_220_864,
    bandwidth=1.008096e12,
    flops=165.2e12,
    flops_exact=82.6e12,
    link=31.5e9,
    network=3.125e9,
    capability=(8, 9),
    cores=128,
    lanes=128,
    cache=75_497_472,
    clock=2.52,
    title="NVIDIA GeForce RTX 4090",
  ),
  "a100-40": _gpu(
    "A100-40",
    memory=42_505_273_344,
    bandwidth=1.5552e12,
    flops=312e12,
    flops_exact=19.5e12,
    link=300e9,
    network=25e9,
    capability=(8, 0),
    cores=108,
    lanes=64,
    cache=41_943_040,
    clock=1.41,
    title="NVIDIA A100-40GB",
  ),
  "a100-80": _gpu(
    "A100-80",
    memory=85_100_068_864,
    bandwidth=2.03904e12,
    flops=312e12,
    flops_exact=19.5e12,
    link=300e9,
    network=25e9,
    capability=(8, 0),
    cores=108,
    lanes=64,
    cache=41_943_040,
    clock=1.41,
    title="NVIDIA A100-80GB",
  ),
  "h100": _gpu(
    "H100 SXM",
    memory=84_942_979_072,
    bandwidth=3.35232e12,
    flops=989.4e12,
    flops_exact=66.9e12,
    link=450e9,
    network=50e9,
    capability=(9, 0),
    cores=132,
    lanes=128,
    cache=52_428_800,
    clock=1.98,
    title="NVIDIA H100 80GB HBM3",
  ),
  "h200": _gpu(
    "H200 SXM",
    memory=150_109_880_320,
    bandwidth=4.814e12,
    flops=989.4e12,
    flops_exact=66.9e12,
    link=450e9,
    network=50e9,
    capability=(9, 0),
    cores=132,
    lanes=128,
    cache=62_914_560,
    clock=1.98,
    title="NVIDIA H200",
  ),
}
ESTIMATED = 1024  # chips that CPU devices can stand for
# What a core does in a second: 16 lanes, two operations each, at 2.5 GHz.
_CORE, _RAM = 80e9, 20e9
NODE = 8  # cards of a node at most
CARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine to plan for.

  Attributes:
    name: as the cloud writes it.
    chip: what it is made of.
    family: the chip's key in `TPUS` or `GPUS`.
    shape: chips of a TPU slice along its links, or cards of a node.
    parts: slices of a TPU, nodes of GPUs.
    share: part of a chip's memory that a program can have.
    estimated: whether CPUs stand for it although its compiler is there.
  """

  name: str
  chip: Chip
  family: str
  shape: tuple[int, ...]
  parts: int = 1
  share: float = 1.0
  estimated: bool = False

  @property
  def part_chips(self) -> int:
    """Chips that are joined by fast links."""
    return math.prod(self.shape)

  @property
  def chips(self) -> int:
    """All chips."""
    return self.parts * self.part_chips

  @property
  def host_chips(self) -> int:
    """Chips of one host: a node's cards, four of a TPU's slice or fewer."""
    return min(self.part_chips, 4 if self.chip.kind == "tpu" else NODE)

  @property
  def memory(self) -> int:
    """Bytes of a chip that a program can have."""
    return int(self.chip.memory * self.share)

  @property
  def device_memory(self) -> int:
    """What a device of a run says that it has; 0 = nothing, as a CPU."""
    return 0 if self.chip.kind == "cpu" else self.memory

  @property
  def missing(self) -> str:
    """What to install so that XLA compiles for it; "" if it is there."""
    if self.chip.kind == "cpu":
      return ""
    module, extra = COMPILERS[self.chip.kind]
    package, _, _ = module.partition(".")
    if importlib.util.find_spec(package) and importlib.util.find_spec(module):
      return ""
    return f"pip install 'jaxalign[{extra}]'"

  @property
  def compiler_options(self) -> dict[str, bool | str] | None:
    """Options that a compilation without the chip needs."""
    # Triton's tiles are tuned on the card; without one they may not be found.
    # Peak memory differs by less than 0.1 %.
    if self.chip.kind == "gpu":
      return {"xla_gpu_enable_triton_gemm": False}
    return None

  def devices(self) -> Sequence[jax.Device]:
    """Devices to compile for; nothing can be put on them.

    Only where `missing` is empty.
    """
    if self.chip.kind == "cpu":
      return jax.devices("cpu")[:1]
    if self.chip.kind == "gpu":
      topology = f"1x{self.parts}x{self.part_chips}"
      text = gpu_description(self.chip, GPUS[self.family][1])
      name = f"plan-{self.name}"
      found = topologies.get_topology_desc(
        name, "cuda", target_config=text, topology=topology
      )
      return found.devices
    options: dict[str, object] = {}
    chips = self.part_chips
    if self.family == "v4":
      options["chip_config_name"] = "megacore"
    # One host has up to eight chips of the flat generations, four of others.
    if chips <= 8 and len(self.shape) == 2:
      options["chips_per_host_bounds"] = (*self.shape, 1)
    elif self.family == "v4":
      options["chips_per_host_bounds"] = (2, 2, 1)
    if self.parts > 1:
      options["num_slices"] = self.parts
    shape = "x".join(map(str, self.shape))
    return topologies.get_topology_desc(
      f"{self.family}:{shape}", "tpu", **options
    ).devices

  def sizes(self) -> "list[Target]":
    """The same chips in growing numbers, from one on."""
    if self.chip.kind == "cpu":
      return [self]
    if self.chip.kind == "tpu":
      found = [tpu_target(self.family, n, 1) for n in SHAPES[self.family]]
    else:
      found = [gpu_target(self.family, n, self.share) for n in CARDS]
    return [
      dataclasses.replace(target, estimated=self.estimated) for target in found
    ]


# The module whose presence tells that XLA can compile for a kind, its extra.
COMPILERS = {
  "tpu": ("libtpu", "plan-tpu"),
  "gpu": ("jax_plugins.xla_cuda13", "plan-gpu"),
}


def prepare(chosen: Sequence[Target]) -> None:
  """Sets up this process to compile for targets; before the first jax call.

  It takes no accelerator, and simulates CPU devices where a compiler is not
  installed.
  """
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # Else libtpu asks the cloud which machine it is on.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # XLA's CUDA part says of itself that there is no CUDA here.
  logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)
  jax.config.update("jax_platforms", "cpu")
  # What is compiled for a device that is not there cannot be kept.
  jax.config.update("jax_enable_compilation_cache", False)
  if any(target.missing or target.estimated for target in chosen):
    jax.config.update("jax_num_cpu_devices", ESTIMATED)


def names() -> list[str]:
  """Names to choose from, for messages."""
  return [
    "v5litepod-16",
    "v6e-8",
    "v5p-128",
    "v4-32",
    "2xv5litepod-256",
    *GPUS,
    "8xh100",
    "2x8xh100",
    "cpu",
  ]


def find(name: str, share: float = GPU_SHARE) -> Target:
  """The target of a name.

  Args:
    name: a TPU's accelerator type, such as v5litepod-16, of several slices
      2xv5litepod-256; a card, several of one node as 8xh100, of several nodes
      as 2x8xh100; cpu is this machine.
    share: part of a GPU's memory that JAX takes, (0, 1].

  Raises:
    UserError: no such machine; names the nearest one first.
  """
  text = name.strip().lower()
  if text == "cpu":
    return Target("cpu", this_cpu(), "cpu", (1,))
  tpu = re.fullmatch(r"(?:(\d+)x)?(v\d+\w*?)-(\d+)", text)
  if tpu and tpu[2] in PREFIXES:
    family, cores = PREFIXES[tpu[2]]
    size, parts = int(tpu[3]), int(tpu[1] or 1)
    chips, rest = divmod(size, cores)
    if rest or chips not in SHAPES[family] or not parts:
      sizes = [n * cores for n in SHAPES[family]]
      near = min(sizes, key=lambda n: abs(n - size))
      raise UserError(
        f"--on {name}: {tpu[2]} has no slice of {size}; did you mean "
        f"{tpu[2]}-{near}? It has {', '.join(map(str, sizes))}"
      )
    return dataclasses.replace(tpu_target(family, chips, parts), name=text)
  gpu = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([a-z]\S*)", text)
  if gpu and gpu[3] in GPUS:
    parts, cards = int(gpu[1] or 1), int(gpu[2] or 1)
    if gpu[2] is None:  # one number is of cards
      parts, cards = 1, parts
    if not (1 <= cards <= NODE and parts >= 1):
      nodes = max(-(-parts * cards // NODE), 1)
      raise UserError(
        f"--on {name}: a node has 1 to {NODE} cards, got {cards}; did you mean "
        f"{nodes}x{NODE}x{gpu[3]}?"
      )
    return dataclasses.replace(
      gpu_target(gpu[3], parts * cards, share),
      name=text,
      shape=(cards,),
      parts=parts,
    )
  # Nearest first, then all.
  stem = re.sub(r"^(\d+x)*", "", text)
  known = names()
  close = difflib.get_close_matches(
    stem, [*known, *PREFIXES], n=len(known), cutoff=0.3
  )
  ordered = [word for word in close if word in known]
  ordered += [word for word in known if word not in ordered]
  raise UserError(
    f"--on {name}: unknown target; did you mean {ordered[0]}? Known are "
    f"{', '.join(ordered)}, other sizes of these (v6e-256, 4xa6000), several "
    "slices (2xv6e-64) and several nodes (4x8xa100-80)"
  )


def this_cpu() -> Chip:
  """This machine's processor and its memory.

  Its rates are a rough guess.
  """
  cores = os.cpu_count() or 1
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  rate = cores * _CORE
  return Chip(
    kind="cpu",
    name="CPU",
    memory=memory,
    bandwidth=_RAM,
    flops=rate,
    flops_f32=rate,
    flops_exact=rate,
    link=_RAM,
    network=_RAM,
  )


def tpu_target(family: str, chips: int, parts: int) -> Target:
  """A TPU by its chips a slice, and its slices."""
  prefix, cores = next(
    (prefix, cores) for prefix, (f, cores) in PREFIXES.items() if f == family
  )
  name = f"{prefix}-{chips * cores}"
  if parts > 1:
    name = f"{parts}x{name}"
  shape = SHAPES[family][chips]
  return Target(name, TPUS[family], family, shape, parts)


def gpu_target(family: str, cards: int, share: float) -> Target:
  """GPUs by their number; more than `NODE` stand in several nodes."""
  parts = -(-cards // NODE)
  name = family if cards == 1 else f"{cards}x{family}"
  if parts > 1:
    name = f"{parts}x{cards // parts}x{family}"
  chip = GPUS[family][0]
  return Target(name, chip, family, (cards // parts,), parts, share)


def gpu_description(chip: Chip, card: Card) -> str:
  """A `GpuTargetConfigProto` in text form, as XLA reads it."""
  major, minor = card.capability
  # Limits that all cards since Volta share.
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.block_shared}
  threads_per_core_limit: {card.threads}
  core_count: {card.cores} fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {round(chip.bandwidth)}
  l2_cache_size: {card.cache} clock_rate_ghz: {card.clock}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{card.title}"
"""
