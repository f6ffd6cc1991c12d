"""Arrays to disk and back through Orbax, by name and on any sharding.

The one file that knows Orbax's restore arguments. A state is written as a flat
dict {dotted path: array}: neither NamedTuples nor custom nodes matter then.
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

from jaxalign.errors import UserError


def handler() -> ocp.PyTreeCheckpointHandler:
  """How arrays are laid out on disk: OCDBT, not compressed."""
  # Float weights shrink by some 8% under zstd, for several times the CPU work.
  return ocp.PyTreeCheckpointHandler(use_compression=False)


def quiet() -> None:
  """Drops Orbax's own log lines: pages of traceback for a full disk.

  Nothing is lost, what fails is raised as well.
  """
  logging.getLogger("absl").addFilter(_not_from_orbax)
  _drop_late_answers()


@functools.cache  # once a process
def _drop_late_answers() -> None:
  """What TensorStore reports of a save that has failed already.

  It comes when Orbax's event loop is closed, and Python would print a
  traceback for each array that was still being written.
  """
  before = sys.unraisablehook

  def hook(found: Any) -> None:
    if str(found.exc_value) != "Event loop is closed":
      before(found)

  sys.unraisablehook = hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return "/orbax/checkpoint/" not in record.pathname


def named(tree: Any) -> dict[str, Any]:
  """{"params.blocks.kernel": leaf}, in the order of the tree's leaves."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }
  assert len(named) == len(leaves), "two leaves of the state share a name"
  return named


def nonempty(named: Mapping[str, Any]) -> dict[str, Any]:
  """Those with elements; Orbax refuses to write the others."""
  return {name: leaf for name, leaf in named.items() if np.size(leaf)}


def spec(leaf: Any) -> list[Any]:
  """[shape, dtype name], as JSON has it."""
  return [list(np.shape(leaf)), str(jax.numpy.result_type(leaf))]


def check(
  place: pathlib.Path,
  saved: Mapping[str, list[Any]],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  """Raises a `UserError` naming the first arrays that do not fit."""
  specs = {name: [list(s.shape), str(s.dtype)] for name, s in wanted.items()}
  wrong = [
    f"{name} is {_words(saved.get(name))}, the run needs "
    f"{_words(specs.get(name))}"
    for name in sorted(saved.keys() | specs.keys())
    if saved.get(name) != specs.get(name)
  ]
  if wrong:
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    raise UserError(
      f"{place} is of another model or optimizer: {'; '.join(wrong[:3])}{more};"
      " give another --workdir, or the config it was saved with"
    )


def _words(spec: list[Any] | None) -> str:
  return "absent" if spec is None else f"{spec[1]}{spec[0]}"


def read(
  place: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
  """Arrays by name; where a spec has a sharding, on it, else as numpy."""
  stored = {name: s for name, s in wanted.items() if s.size}
  if not stored:  # Orbax cannot restore nothing
    return {name: np.zeros(s.shape, s.dtype) for name, s in wanted.items()}
  with ocp.Checkpointer(handler()) as orbax, jax.transfer_guard("allow"):
    found = orbax.restore(
      place,
      args=ocp.args.PyTreeRestore(
        item=stored,
        restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
        partial_restore=True,
      ),
    )
  for name, spec in wanted.items():
    if not spec.size:
      empty = np.zeros(spec.shape, spec.dtype)
      found[name] = (
        jax.device_put(empty, spec.sharding) if spec.sharding else empty
      )
  return found
