"""What the backward pass keeps of a block, and what it computes again.

From most memory to least:

  none       nothing is computed again but cheap arithmetic
  attention  attention from its queries, keys and values (Korthikanti 2022)
  dots       all but the products with parameters
  full       everything, from the block's input (Chen 2016)
  offload    as full, and the blocks' inputs wait in the host's memory
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "attention", "dots", "full", "offload")

_INPUT, _PRODUCT = "block input", "product"
_policies = jax.checkpoint_policies


def block_input(x: jax.Array) -> jax.Array:
  """Marks what a block reads, for `offload`."""
  return checkpoint_name(x, _INPUT)


def product(x: jax.Array) -> jax.Array:
  """Marks a product with parameters, for `dots`."""
  return checkpoint_name(x, _PRODUCT)


def of_attention(fn: Callable, policy: str) -> Callable:
  """Attention, computed again where the policy says so."""
  return jax.checkpoint(fn, prevent_cse=False) if policy == "attention" else fn


def of_block(fn: Callable, policy: str, *, scanned: bool = True) -> Callable:
  """A block that keeps what the policy says.

  Args:
    fn: calls `block_input`, and `product` through its layers.
    policy: one of `POLICIES`.
    scanned: whether it is the body of a scan. There XLA cannot merge the two
      computations, and barriers against that would only prevent fusion.
  """
  if policy in ("none", "attention"):
    return fn
  if policy == "dots":
    keep = _policies.save_only_these_names(_PRODUCT)
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
