"""Compaction: rows that have ended leave the batch while others are decoded.

A decoding loop costs as much for a row that has ended as for one that has not.
Once half of the batch or less is needed, the loop stops, the rows that still
draw move to a smaller batch, and a program of that size goes on. The samples
of a prompt stay together, as they share its keys: what is needed is every
prompt that has a row left, times the rows of the prompt that has most. Both
are rounded up to powers of two, so that there are few programs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxalign.models.cache import KV
from jaxalign.sampling.state import Fixed, State

LEAST = 4  # rows; a smaller batch is not faster


def prompt_groups(fixed: Fixed) -> int:
  """P, prompts of a batch, each with the same number of rows."""
  return len(fixed.past[-1].positions)


def needed(
  done: Bool[Array, " B"], groups: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """The prompts, and rows of each, that hold every row that still draws.

  Args:
    done: True = the row draws no more.
    groups: P; the rows of a prompt are next to each other.

  Returns:
    Both numbers; (rows, 1) where each row gets its own copy of the prompt.
  """
  alive = ~done.reshape(groups, -1)
  prompts = _rounded_up(alive.any(axis=1).sum(), groups)
  rows = _rounded_up(alive.sum(axis=1).max(), alive.shape[1])
  alone = _rounded_up(alive.sum(), alive.size)
  apart = alone <= prompts * rows // 2
  return jnp.where(apart, alone, prompts), jnp.where(apart, 1, rows)


def pays(done: Bool[Array, " B"], groups: int) -> Bool[Array, ""]:
  """Whether a batch of half the rows or fewer would do."""
  prompts, rows = needed(done, groups)
  return (prompts * rows <= len(done) // 2) & (len(done) > LEAST)


def choose(
  done: np.ndarray, groups: int, prompts: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """The prompts and rows that a smaller batch takes over.

  Args:
    done: `[B]`; True = the row draws no more.
    groups: P.
    prompts: to keep, as `needed` says.
    rows: of each prompt to keep.

  Returns:
    Numbers of the kept prompts, and of their rows in the batch. Those that
    still draw come first; ended ones fill up.
  """
  alive = ~done.reshape(groups, -1)
  if rows == 1:  # a prompt comes as often as it has rows
    apart = np.argsort(done, kind="stable")[:prompts]
    return apart // alive.shape[1], apart
  kept = np.argsort(~alive.any(axis=1), kind="stable")[:prompts]
  inside = np.argsort(~alive[kept], axis=1, kind="stable")[:, :rows]
  return kept, (kept[:, None] * alive.shape[1] + inside).reshape(-1)


def take(
  fixed: Fixed,
  state: State,
  prompts: Int[Array, " P"],
  rows: Int[Array, " B"],
) -> tuple[Fixed, State]:
  """The batch of these prompts and rows."""
  *prefix, own = fixed.past  # a prefix is shared by all
  fixed = Fixed(
    past=(*prefix, _take_kv(own, prompts)),
    start=fixed.start[rows],
    limit=fixed.limit[rows],
    keys=fixed.keys[rows],
  )
  rest = {
    field.name: jax.tree.map(lambda x: x[rows], getattr(state, field.name))
    for field in dataclasses.fields(state)
    if field.name not in ("drawn", "own")
  }
  own = _take_kv(state.own, rows)
  return fixed, dataclasses.replace(state, own=own, **rest)


def _take_kv(kv: KV, groups: Int[Array, " G"]) -> KV:
  # Counted from the end, the groups are the fourth axis, stacked or not.
  k, v = jax.tree.map(lambda x: jnp.take(x, groups, axis=-4), (kv.k, kv.v))
  return KV(k, v, kv.positions[groups], kv.mask[groups])


def _rounded_up(count: Int[Array, ""], limit: int) -> Int[Array, ""]:
  """The next power of two, or `limit` where that comes first."""
  sizes = jnp.array([1 << i for i in range(limit.bit_length())] + [limit])
  return sizes[(sizes < count).sum()]
