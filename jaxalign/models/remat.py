"""What the backward pass keeps of a block, and what it computes again.

From most memory to least:

  none       nothing is computed again but the cast of the parameters
  attention  attention from its queries, keys and values (Korthikanti 2022)
  dots       all but the products with parameters
  full       everything, from the block's input (Chen 2016)
  offload    as full, and the blocks' inputs wait in the host's memory
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxalign.core.types import Params

POLICIES = ("none", "attention", "dots", "full", "offload")

_CAST, _INPUT = "cast parameters", "block input"
_policies = jax.checkpoint_policies


def cast(params: Params, dtype: str) -> Params:
  """A block's parameters in the compute dtype, cast again when they are needed.

  Kept for the backward pass, they would be a second copy of all parameters.
  """

  def one(p: jax.Array) -> jax.Array:
    return p if p.dtype == dtype else checkpoint_name(p.astype(dtype), _CAST)

  return jax.tree.map(one, params)


def block_input(x: jax.Array) -> jax.Array:
  """Marks what a block reads, for `offload`."""
  return checkpoint_name(x, _INPUT)


def of_attention(fn: Callable, policy: str) -> Callable:
  """Attention, computed again where the policy says so."""
  return jax.checkpoint(fn, prevent_cse=False) if policy == "attention" else fn


def of_block(
  fn: Callable,
  policy: str,
  params: Params,
  dtype: str,
  *,
  scanned: bool = True,
) -> Callable:
  """A block that keeps what the policy says.

  Args:
    fn: calls `cast` and `block_input`.
    policy: one of `POLICIES`.
    params: of the block.
    dtype: that it casts them to.
    scanned: whether it is the body of a scan. There XLA cannot merge the two
      computations, and barriers against that would only prevent fusion.
  """
  if policy in ("none", "attention"):
    if all(p.dtype == dtype for p in jax.tree.leaves(params)):
      return fn
    keep = _policies.save_anything_except_these_names(_CAST)
  elif policy == "dots":
    keep = _policies.dots_with_no_batch_dims_saveable
  elif policy == "offload":
    keep = _policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_INPUT],
      offload_src="device",
      offload_dst="pinned_host",
    )
  else:
    assert policy == "full", policy
    keep = None
  return jax.checkpoint(fn, prevent_cse=not scanned, policy=keep)
