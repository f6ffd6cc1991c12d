"""Arrays to disk and back through Orbax, by name and on any sharding.

A state is stored as a flat dict {dotted path: array}: a reader of `params`
needs to know neither the rest of the state nor the optimizer's classes.
"""

import functools
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxalign.core.types import AnyArray
from jaxalign.errors import UserError

ArraySpec = list[list[int] | str]  # [shape, dtype name], as JSON has it


def handler() -> ocp.PyTreeCheckpointHandler:
  """How arrays are laid out on disk: OCDBT, not compressed."""
  # Float weights shrink by some 8% under zstd, for several times the CPU work.
  return ocp.PyTreeCheckpointHandler(use_compression=False)


@functools.cache  # once a process
def quiet() -> None:
  """Drops what Orbax logs about failures: it raises them as well."""
  logging.getLogger("absl").addFilter(
    lambda record: "/orbax/checkpoint/" not in record.pathname
  )
  # A failed save closes Orbax's event loop while TensorStore still answers;
  # Python would print a traceback for each array under way.
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:  # typeshed's name is no class at run time
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook


def named(tree: PyTree) -> dict[str, AnyArray]:
  """{"params.blocks.kernel": leaf}, in the order of the tree's leaves."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }
  assert len(named) == len(leaves), "two leaves of the state share a name"
  return named


def spec(leaf: AnyArray) -> ArraySpec:
  """[shape, dtype name], as JSON has it."""
  return [list(np.shape(leaf)), str(jax.numpy.result_type(leaf))]


def check(
  place: pathlib.Path,
  saved: Mapping[str, ArraySpec],
  wanted: Mapping[str, AnyArray],
  remedy: str = "give another --workdir, or the config it was saved with",
) -> None:
  """Raises a `UserError` naming the first arrays that do not fit.

  `saved` is what the checkpoint's folder `place` holds, by name.
  """
  needed = {name: spec(leaf) for name, leaf in wanted.items()}
  wrong = [
    f"{name} is {_words(saved.get(name))}, the run needs "
    f"{_words(needed.get(name))}"
    for name in sorted(saved.keys() | needed.keys())
    if saved.get(name) != needed.get(name)
  ]
  if wrong:
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    raise UserError(
      f"{place} is of another model or optimizer: {'; '.join(wrong[:3])}{more};"
      f" {remedy}"
    )


def _words(spec: ArraySpec | None) -> str:
  return "absent" if spec is None else f"{spec[1]}{spec[0]}"


def read(
  place: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, AnyArray]:
  """Arrays by name; where a spec has a sharding, on it, else as numpy."""
  found: dict[str, AnyArray] = {}
  stored = {name: s for name, s in wanted.items() if s.size}
  with jax.transfer_guard("allow"):
    if stored:  # Orbax cannot restore nothing
      # Partial, so that a reader of `params` leaves the optimizer on disk.
      args = ocp.args.PyTreeRestore(
        item=stored,
        restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
        partial_restore=True,
      )
      with ocp.Checkpointer(handler()) as orbax:
        found = orbax.restore(place, args=args)
    # Orbax does not store arrays without elements.
    for name in wanted.keys() - stored.keys():
      spec = wanted[name]
      empty = np.zeros(spec.shape, spec.dtype)
      found[name] = (
        jax.device_put(empty, spec.sharding) if spec.sharding else empty
      )
  return found
