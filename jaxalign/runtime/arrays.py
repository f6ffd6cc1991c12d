"""Arrays to disk and back through Orbax, by name and on any sharding.

A state is stored as a flat dict {dotted path: array}: a reader of `params`
needs to know neither the rest of the state nor the optimizer's classes.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from jaxalign import paths
from jaxalign.core import memory
from jaxalign.core.types import AnyArray
from jaxalign.errors import UserError
from jaxalign.parallel import hosts

# The most bytes of a stored piece of an array. Pieces are read whole, so a
# device whose shard is smaller than the writer's would else read all of that.
CHUNK_BYTES = 8 * 2**20

_log = logging.getLogger(__name__)

ArraySpec = list[list[int] | str]  # [shape, dtype name], as JSON has it


def handler() -> ocp.PyTreeCheckpointHandler:
  """How arrays are laid out on disk: OCDBT, not compressed."""
  # Float weights shrink by some 8% under zstd, for several times the CPU work.
  # On GPUs Orbax would copy the whole state to pinned memory at once, and XLA's
  # pool of it is limited to 64 GiB and never shrinks.
  return ocp.PyTreeCheckpointHandler(
    use_compression=False, enable_pinned_host_transfer=False
  )


@functools.cache  # once a process
def quiet() -> None:
  """Drops what Orbax logs about failures: it raises them as well."""
  logging.getLogger("absl").addFilter(
    lambda record: "/orbax/checkpoint/" not in record.pathname
  )
  # A failed save or restore closes Orbax's event loop while TensorStore still
  # answers; Python would print a traceback for each array under way.
  before = sys.unraisablehook
  known = ("Event loop is closed", "Encountered error while reading array")

  def hook(unraisable: Any) -> None:  # typeshed's name is no class at run time
    if not str(unraisable.exc_value).startswith(known):
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


def sums(named: Mapping[str, AnyArray]) -> dict[str, int]:
  """The sum of each array's bits as whole numbers, modulo 2⁶⁴.

  It finds every flipped bit and every part that was lost, and misses only
  changes whose differences cancel. It does not depend on how the array is
  sharded. Every process that holds a part of it takes part.
  """
  with jax.transfer_guard("allow"):
    # On accelerators all are started before one is waited for.
    parts = jax.device_get({n: _partial_sums(x) for n, x in named.items()})
  total = np.array([np.sum(p, dtype=np.uint64) for p in parts.values()])
  leaves = [named[name] for name in parts]  # `device_get` has sorted the names
  shared = [
    isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    for leaf in leaves
  ]
  if any(shared):
    # What every process has for itself counts once.
    mine = total if hosts.is_lead() else np.where(shared, total, np.uint64(0))
    total = hosts.gather(mine).sum(0)
  return dict(zip(parts, total.tolist(), strict=True))


def _partial_sums(leaf: AnyArray) -> list[np.uint64 | jax.Array]:
  """The sums of this process's shards, each shard counted once."""
  if not isinstance(leaf, jax.Array):
    return [_host_sum(np.asarray(leaf))]
  shards = [s.data for s in leaf.addressable_shards if s.replica_id == 0]
  # A CPU's arrays are the host's, and numpy is five times as fast as XLA there.
  on_cpu = next(iter(leaf.devices())).platform == "cpu"
  if on_cpu or memory.is_on_host(leaf):
    return [_host_sum(np.asarray(shard)) for shard in shards]
  return [device_sum(shard) for shard in shards]


def _host_sum(x: np.ndarray) -> np.uint64:
  words = np.ravel(x).view(f"u{min(x.dtype.itemsize, 4)}")
  return np.sum(words, dtype=np.uint64)


def device_sum(x: jax.Array) -> jax.Array:
  """As numpy's sum on the host."""
  with jax.enable_x64(True):
    return _device_sum(x)


@jax.jit
def _device_sum(x):
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
  return jnp.sum(words, dtype=jnp.uint64)


def spec(leaf: AnyArray) -> ArraySpec:
  """[shape, dtype name], as JSON has it."""
  return [list(np.shape(leaf)), str(jax.numpy.result_type(leaf))]


def check(
  place: paths.Folder,
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


def save_args(stored: Mapping[str, AnyArray]) -> ocp.args.PyTreeSave:
  """What Orbax is to write, in pieces of at most `CHUNK_BYTES`."""
  pieces = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
  return ocp.args.PyTreeSave(stored, save_args=dict.fromkeys(stored, pieces))


def read_whole(
  place: paths.Folder,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  saved: Mapping[str, int],
  *,
  alone: bool = False,
) -> dict[str, AnyArray] | None:
  """Arrays by name as they were saved, or None if they are damaged.

  Args:
    place: a checkpoint's folder.
    wanted: see `read`.
    saved: the sums that they had, by name; {} = not known.
    alone: whether other processes do not read; else all of them call this.
  """
  found, trouble = {}, ""
  try:
    found = read(place / "arrays", wanted)
  except (jax.errors.JaxRuntimeError, MemoryError):
    raise  # no room is no damage
  except Exception as error:  # a damaged file may fail in any way
    trouble = (str(error).splitlines() or [type(error).__name__])[0]
  # What one process cannot read, none of them takes.
  failed = bool(trouble) if alone else hosts.agree(bool(trouble))
  if not failed and saved:
    other = [n for n, total in sums(found).items() if total != saved[n]]
    failed = bool(other)
    trouble = f"{', '.join(other[:3])} changed since they were saved"
  if failed:
    _log.warning(
      "%s is passed over: %s", place, trouble or "another host cannot read it"
    )
    return None
  return found


def read(
  place: paths.Folder, wanted: Mapping[str, jax.ShapeDtypeStruct]
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
      # Without Orbax's `Checkpointer`, in which all processes would wait for
      # one that meets a damaged file.
      with contextlib.closing(handler()) as orbax:
        found = orbax.restore(epath.Path(place), args=args)
    # Orbax does not store arrays without elements.
    for name in wanted.keys() - stored.keys():
      spec = wanted[name]
      empty = np.zeros(spec.shape, spec.dtype)
      found[name] = (
        jax.device_put(empty, spec.sharding) if spec.sharding else empty
      )
  return found
