"""Chooses what a config leaves to `auto`: the mesh, remat, padded widths.

The rules need no compiler and no measurement, so every host and every start
choose alike; `python -m jaxalign.plan` compiles and so checks them.
docs/sharding.md says where they are from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.extend as jex
import jax.numpy as jnp

from jaxalign.config.online import (
  BucketConfig,
  OnlineConfig,
  SamplingConfig,
  ScoringConfig,
)
from jaxalign.config.sections import TrainingConfig
from jaxalign.core.types import TrainState
from jaxalign.models import lora, remat
from jaxalign.models.config import CausalConfig
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program, device_bytes, jaxprs_of
from jaxalign.setup.models import ModelSpec, open_policy
from jaxalign.setup.spec import RunSpec

C = TypeVar("C", bound=TrainingConfig)
S = TypeVar("S", bound=TrainingConfig | BucketConfig)

GIB = 2**30
MOST_TENSOR = 8  # chips that exchange features in every layer, at most
FEWEST_TOKENS = 256  # of a row, on a device
# Widths on a TPU: it computes on 128 columns at once, and compiles slowly.
TPU_WIDTHS = (128, 256, 512, 1024)
# Share of the memory for what is counted here; the rest is for what is not.
USABLE = 0.85


def memory_of(devices: Devices) -> int:
  """Bytes that a program can have on a device; 0 = it does not say (CPU)."""
  device = (jax.local_devices() if devices is None else devices)[0]
  try:
    stats = device.memory_stats() or {}
  except RuntimeError:
    return 0  # it is not there
  # Cards that are alike may differ by what others have taken of them.
  whole = int(stats.get("bytes_limit", 0)) // GIB
  return GIB * hosts.from_lead(lambda: whole, 0)


def with_mesh(config: C, devices: Devices, memory: int) -> C:
  """The config with its mesh and widths chosen; says why.

  Args:
    config: of the run; without `mesh.auto` the mesh is left alone.
    devices: see `make_mesh`.
    memory: bytes of each; 0 = unknown.

  Raises:
    UserError: the policy cannot be opened.
  """
  there: Sequence[jax.Device] = jax.devices() if devices is None else devices
  if there[0].platform == "tpu":
    config = with_tpu_widths(config)
  if not config.mesh.auto:
    return config
  policy = open_policy(
    config,
    meshes.make_mesh(fsdp=-1, devices=there),
    getattr(config, "head", "lm"),
  )
  whole = 0
  if isinstance(config, OnlineConfig) and config.mesh.gather_for_generation:
    dtype = jnp.dtype(policy.model.config.dtype)
    whole = sum(x.size for x in jax.tree.leaves(policy.model.shapes))
    whole *= dtype.itemsize
  superbatch = getattr(config, "superbatch", None)
  kept = getattr(superbatch, "kept_rows", 0)
  splits = isinstance(policy.model.config, CausalConfig)
  sizes, why = choose_axes(
    len(there),
    part_count(there),
    rows=min(config.micro_rows, kept or config.micro_rows),
    heads=policy.model.config.heads,
    state=state_bytes(policy, config),
    whole=whole,
    memory=memory,
    tokens=config.max_length if splits else 0,
    fills=superbatch is not None,
  )
  if hosts.is_lead():
    print(f"mesh: auto takes {why}")
  mesh = dataclasses.replace(
    config.mesh,
    auto=False,
    replica=sizes["replica"],
    tensor=sizes["tensor"],
    sequence=sizes["sequence"],
  )
  return dataclasses.replace(config, mesh=mesh)


def part_count(devices: Sequence[jax.Device]) -> int:
  """Slices of a TPU, or nodes of GPUs: a network is all that joins them."""
  slices = {getattr(device, "slice_index", 0) for device in devices}
  if len(slices) == 1 and devices[0].platform in ("gpu", "cuda", "rocm"):
    processes = {device.process_index for device in devices}
    # One process a GPU says nothing of nodes.
    return len(processes) if len(processes) < len(devices) else 1
  return len(slices)


def with_tpu_widths(config: C) -> C:
  """The config with fewer widths of texts, where it has the default ones."""
  config = _fewer_widths(config, TrainingConfig())
  if not isinstance(config, OnlineConfig):
    return config
  return dataclasses.replace(
    config,
    sampling=_fewer_widths(config.sampling, SamplingConfig()),
    scoring=_fewer_widths(config.scoring, ScoringConfig()),
  )


def _fewer_widths(section: S, default: TrainingConfig | BucketConfig) -> S:
  if section.length_buckets != default.length_buckets:
    return section
  return dataclasses.replace(section, length_buckets=TPU_WIDTHS)


def state_bytes(policy: ModelSpec, config: TrainingConfig) -> int:
  """Parameters, gradients and the optimizer's two means, of all devices."""
  shapes = policy.model.shapes
  trained = lora.split(shapes)[0] if policy.model.lora else shapes
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  mean = jnp.dtype(config.optimizer.mu_dtype).itemsize
  return held + sum(x.size * (8 + mean) for x in jax.tree.leaves(trained))


def choose_axes(
  devices: int,
  parts: int,
  *,
  rows: int,
  heads: int,
  state: int,
  whole: int,
  memory: int,
  tokens: int = 0,
  fills: bool = False,
) -> tuple[dict[str, int], str]:
  """The sizes of the other axes, and why; `fsdp` takes the rest.

  All devices go to `fsdp`, which costs no memory and hides its exchange behind
  arithmetic. `replica` takes the parts that only a slow network joins, where
  each can hold the state in a quarter of its memory. `tensor` grows as long as
  there are more devices than rows, or as the weights that decoding gathers take
  more than a quarter of the memory. `sequence` takes what is left over then, as
  long as each device has enough of a row's tokens.

  Args:
    devices: N.
    parts: slices or nodes among them, joined by a network.
    rows: of a pass.
    heads: of the policy, which `tensor` divides.
    state: bytes of parameters, gradients and optimizer.
    whole: bytes of the weights that each device gathers to sample; 0 = none.
    memory: bytes of a device; 0 = unknown.
    tokens: of the longest row; 0 = they cannot be split.
    fills: whether rows that do not divide are filled up with empty ones.
  """
  within = devices // parts
  reasons = []
  # Between slices parameters would be gathered over the network.
  replica = 1
  if parts > 1 and (not memory or state / within <= memory / 4):
    replica = parts
    reasons.append(
      f"replica {parts}: {parts} slices or nodes, each holds "
      f"{state / within / GIB:.2g} GiB of state a device"
    )
  tensor, few, large = 1, False, False
  while True:
    large_now = memory and whole / tensor > memory / 4
    spread = devices // tensor
    few_now = spread > rows or (not fills and rows % spread > 0)
    wider = 2 * tensor
    fits = wider <= MOST_TENSOR and not within % wider and not heads % wider
    if not ((large_now or few_now) and fits):
      break
    large, few = large or bool(large_now), few or few_now
    tensor = wider
  if few:
    reasons.append(f"tensor {tensor}: {rows} rows for {devices} devices")
  elif large:
    reasons.append(
      f"tensor {tensor}: {whole / GIB:.3g} GiB of weights to sample with, for "
      f"which there is a quarter of {memory / GIB:.3g} GiB"
    )
  sequence, left = 1, devices // tensor
  while left > sequence * rows and not (
    within // tensor % (2 * sequence)
    or tokens % (2 * sequence)
    or tokens // (2 * sequence) < FEWEST_TOKENS
  ):
    sequence *= 2
  if sequence > 1:
    reasons.append(f"sequence {sequence}: rows of {tokens} tokens")
  fsdp = left // (replica * sequence)
  reasons.append(f"fsdp {fsdp}: all {'other ' if reasons else ''}devices")
  sizes = {"replica": replica, "tensor": tensor, "sequence": sequence}
  return sizes, "; ".join(reasons)


def with_remat(
  spec: RunSpec[C],
  memory: int,
  programs: Callable[[RunSpec[C]], list[Program]],
) -> RunSpec[C]:
  """The run with `remat=auto` replaced by a policy; says why.

  The first of `POLICIES` with which what is in memory all the time, gradients,
  and what the backward pass keeps fit. Nothing is compiled: that is counted on
  the update's jaxpr.

  Args:
    spec: of the run, whose models compute nothing again.
    memory: bytes of a device; 0 = unknown, as on a CPU: none.
    programs: of a method.
  """
  if spec.config.remat != "auto":
    return spec
  if not memory:
    return replace_remat(spec, "none")
  # Offloading needs memory of the host, of which nothing is known here.
  found = spec
  for policy in remat.POLICIES[:-1]:
    found = replace_remat(spec, policy)
    kept, other = kept_bytes(programs(found), spec.config.micro_batches)
    if kept + other <= USABLE * memory:
      break
  if hosts.is_lead():
    short = "" if kept + other <= USABLE * memory else ": it may not fit"
    print(
      f"remat: auto takes {found.config.remat}, with which the backward pass "
      f"keeps {kept / GIB:.2f} GiB next to {other / GIB:.2f} on a device of "
      f"{memory / GIB:.1f} GiB{short}"
    )
  return found


def replace_remat(spec: RunSpec[C], policy: str) -> RunSpec[C]:
  """The run with another remat policy of all models that it trains."""

  def changed(model: ModelSpec) -> ModelSpec:
    if model.model.config.remat == policy:
      return model
    return dataclasses.replace(model, model=model.model.replace(remat=policy))

  return dataclasses.replace(
    spec,
    config=dataclasses.replace(spec.config, remat=policy),
    policy=changed(spec.policy),
    value_model=spec.value_model and changed(spec.value_model),
  )


def kept_bytes(
  programs: Sequence[Program], micro_batches: int = 1
) -> tuple[int, int]:
  """Bytes on a device that an update keeps for its backward pass, and others.

  The others are parameters, optimizer state, reference and reward models, and
  the gradients: those of a micro-batch, and their sum where there are several.

  Args:
    programs: of a run.
    micro_batches: M, of an update.
  """
  held: dict[int, int] = {}
  kept = gradients = 0
  for program in programs:
    for argument in program.arguments:
      if isinstance(argument, dict | TrainState):
        held |= {id(x): device_bytes(x) for x in jax.tree.leaves(argument)}
      if isinstance(argument, TrainState):
        params = jax.tree.leaves(argument.params)
        gradients = sum(map(device_bytes, params))
        mesh = params[0].sharding.mesh
        # Rows are split over all axes but this one.
        parts = mesh.size // mesh.shape["tensor"]
        found = saved_bytes(program.trace().jaxpr.jaxpr) // parts
        kept = max(kept, found)
  sets = 2 if micro_batches > 1 else 1
  return kept, sum(held.values()) + sets * gradients


def saved_bytes(jaxpr: jex.core.Jaxpr) -> int:
  """Bytes that the scans of a gradient hand to its backward pass.

  Layers are scanned; what the scan stacks for each of them is kept until the
  scan that runs backwards reads it. That one stacks gradients.
  """
  total = 0
  for eqn in jaxpr.eqns:
    params = eqn.params
    if eqn.primitive.name == "scan" and not params["reverse"]:
      total += _stacked(eqn)
    inner = [saved_bytes(body) for body in jaxprs_of(params)]
    # Of branches one is run.
    branches = eqn.primitive.name == "cond"
    total += max(inner, default=0) if branches else sum(inner)
  return total


def _stacked(eqn) -> int:
  """Bytes of what a scan stacks: outputs with an axis more than its body's."""
  body = eqn.params["jaxpr"]
  body = getattr(body, "jaxpr", body)  # closed before JAX 0.12
  return sum(
    x.aval.size * x.aval.dtype.itemsize
    for x, inner in zip(eqn.outvars, body.outvars, strict=True)
    if x.aval.ndim > inner.aval.ndim
  )
