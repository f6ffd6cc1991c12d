"""Arithmetic of a program, counted on its jaxpr.

XLA's own count takes a loop's body once and calls of cuBLAS for nothing.
"""

import collections
import math
import re

import jax.extend as jex
import jax.numpy as jnp
from jax import lax

from jaxalign.parallel.program import jaxprs_of

# Products at the default precision of their operands, and exact float32.
BF16, F32, EXACT = "bfloat16", "float32", "float32 exact"

Flops = collections.Counter[str]  # multiplications and additions by kind


def count_jaxpr(jaxpr: jex.core.Jaxpr, trips: int) -> Flops:
  """Multiplications and additions of matrix products, over all devices.

  A scan counts its length, a `cond` its dearest branch, a kernel its grid.
  Attention counts the same by whatever kernel: what its dense form computes.

  Args:
    jaxpr: of `jax.make_jaxpr` or `trace`.
    trips: turns of a `while` loop whose number the program does not say; of
      such loops in each other, those of the outermost.
  """
  total = Flops()
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      total[_kind(eqn)] += _dot(eqn)
    elif name == "conv_general_dilated":
      total[_kind(eqn)] += _convolution(eqn)
    elif name == "scan":
      body = count_jaxpr(params["jaxpr"].jaxpr, trips)
      total += _times(body, params["length"])
    elif name == "while":
      turns = turns_of(str(eqn.source_info.name_stack))
      # The caller's count is of the outermost loop that says none.
      inner = trips if turns is not None else 1
      turn = count_jaxpr(params["body_jaxpr"].jaxpr, inner)
      turn += count_jaxpr(params["cond_jaxpr"].jaxpr, inner)
      total += _times(turn, trips if turns is None else turns)
    elif name == "cond":
      branches = [count_jaxpr(b.jaxpr, trips) for b in params["branches"]]
      total += max(branches, key=Flops.total)
    elif (products := _attention(eqn)) is not None:
      total += products
    elif name == "pallas_call":
      grid = math.prod(params["grid_mapping"].grid)
      total += _times(count_jaxpr(params["jaxpr"], trips), grid)
    elif name == "shard_map":  # its body is of one device
      body = count_jaxpr(params["jaxpr"], trips)
      total += _times(body, params["mesh"].size)
    else:  # jit, remat, custom rules: each body once
      for inner in jaxprs_of(params):
        total += count_jaxpr(inner, trips)
  return total


# Attention's kernels by the start of their names, and how many of the dense
# form's products each stands for: two forwards, four backwards. Splash has two
# kernels backwards. What a kernel computes twice, so as not to keep it, is not
# counted, nor is what it leaves out as masked.
_KERNELS = {
  "dot_product_attention_fwd": 2,  # cuDNN
  "dot_product_attention_bwd": 4,
  "mha_forward": 2,  # Pallas-Triton
  "mha_backward": 4,
  "splash_mha_fwd": 2,
  "splash_mha_dkv": 3,
  "splash_mha_dq": 1,
}


def _attention(eqn) -> Flops | None:
  """Operations of a call of an attention kernel; None = it is none."""
  name = eqn.primitive.name
  if name == "pallas_call":
    name = eqn.params["name"] or ""
  found = [n for start, n in _KERNELS.items() if name.startswith(start)]
  if not found:
    return None
  # Queries and keys are the first that are no masks: [B, N, T, H] of splash,
  # [B, T, N, H] of the others.
  q, k = [
    x.aval for x in eqn.invars if jnp.issubdtype(x.aval.dtype, jnp.floating)
  ][:2]
  keys = k.shape[-2] if name.startswith("splash") else k.shape[1]
  kind = BF16 if q.dtype.itemsize < 4 else F32
  return Flops({kind: found[0] * 2 * q.size * keys})


def turns_of(scope: str) -> int | None:
  """How often a loop runs at most, by the scope that it is written in.

  A loop whose length depends on its data says so as
  `with jax.named_scope("turns_12")`.
  """
  # The innermost scope is its own.
  found = re.findall(r"turns_(\d+)", scope)
  return int(found[-1]) if found else None


def _times(flops: Flops, turns: int) -> Flops:
  return Flops({kind: n * turns for kind, n in flops.items()})


def _dot(eqn) -> int:
  """2 x every element of the result x the length that is summed over."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
  return 2 * eqn.outvars[0].aval.size * summed


def _convolution(eqn) -> int:
  kernel = eqn.invars[1].aval.shape
  out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2 * eqn.outvars[0].aval.size * math.prod(kernel) // out_features


def _kind(eqn) -> str:
  # Operands that differ are computed in the wider of the two.
  if all(x.aval.dtype.itemsize < 4 for x in eqn.invars[:2]):
    return BF16
  precision = eqn.params.get("precision")
  asked = precision if isinstance(precision, tuple) else (precision,)
  return EXACT if lax.Precision.HIGHEST in asked else F32
