"""Checkpoints by Orbax: written in the background, believed only when whole.

A checkpoint of step 40 is the folder `00000040/` with the arrays as Orbax
wrote them and, last of all, `manifest.json`: the step, what the caller added,
and the length and SHA-256 of every file. A folder without a manifest, or one
that does not match it, is passed over with a warning and the one before is
used. So nothing depends on how far a killed process came, nor on which errors
the array format would notice by itself (a missing chunk reads as zeros).

Arrays are stored by name (`params.blocks.kernel`), so `load` can read the
parameters alone.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxalign.errors import UserError
from jaxalign.runtime import arrays, files, manifest

_ARRAYS = "arrays"
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """What a checkpoint held."""

  state: Any  # the tree of arrays, on the shardings that were asked for
  extra: dict[str, Any]  # as given to `save`
  step: int  # steps done when it was saved


class Checkpointer:
  """Saves a run's state in the background and finds the newest whole one.

  At most one save is in flight. Its failure is raised by the next `check`,
  `save`, `wait` or `close`: none of them hides it.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    every_steps: int = 0,
    every_minutes: int | float = 0,
    keep: int = 2,
    keep_best: bool = False,
  ):
    """Opens, and makes, the folder of checkpoints.

    Args:
      folder: holds one folder a checkpoint and nothing else.
      every_steps: `due` after as many steps; >= 0, 0 = not by steps.
      every_minutes: `due` after as many minutes; >= 0, 0 = not by time.
      keep: how many of the newest stay; >= 1.
      keep_best: also keep the one with the highest `score`.

    Raises:
      UserError: an argument is out of range.
    """
    for name, value, least in (
      ("every_steps", every_steps, 0),
      ("every_minutes", every_minutes, 0),
      ("keep", keep, 1),
    ):
      if value < least:
        raise UserError(
          f"config.checkpoint.{name} must be at least {least}, got {value}"
        )
    arrays.quiet()
    self.folder = pathlib.Path(folder).absolute()
    self.folder.mkdir(parents=True, exist_ok=True)
    self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
    self._keep, self._keep_best = keep, keep_best
    self._orbax = ocp.AsyncCheckpointer(arrays.handler())
    self._thread: threading.Thread | None = None
    self._failure: tuple[int, BaseException] | None = None
    self._damaged: set[pathlib.Path] = set()
    self._last_save = time.monotonic()

  def due(self, step: int) -> bool:
    """Whether to save now that `step` steps are done.

    In a multi-host run all processes must call it; the first one's clock rules.
    """
    by_steps = self._every_steps > 0 and step % self._every_steps == 0
    if by_steps or self._every_seconds == 0:
      return by_steps
    late = time.monotonic() - self._last_save >= self._every_seconds
    return bool(_from_lead(late))

  def save(
    self,
    step: int,
    state: Any,
    extra: Mapping[str, Any],
    *,
    score: int | float | None = None,
  ) -> None:
    """Starts to save; returns once the arrays may be donated or changed.

    Waits first for a save that is still under way.

    Args:
      step: steps done, >= 0; an older checkpoint of it is replaced.
      state: tree of jax or numpy arrays.
      extra: JSON object: file offsets, counters, whatever a resume needs.
      score: higher is better; what `keep_best` goes by.

    Raises:
      UserError: the disk is full, now or during the save before.
    """
    self.wait()
    place = self.folder / f"{step:08d}"
    named = arrays.named(state)
    body = {
      "step": step,
      "extra": json.loads(json.dumps(extra)),
      "score": score,
      "arrays": {k: arrays.spec(v) for k, v in named.items()},
    }
    try:
      if _is_lead():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self._damaged.discard(place)
      # The guard of the training step is about transfers nobody asked for.
      with jax.transfer_guard("allow"):
        args = ocp.args.PyTreeSave(arrays.nonempty(named))
        self._orbax.save(place / _ARRAYS, args=args)
    except Exception as error:
      with contextlib.suppress(Exception):  # it is `error` once more
        self._orbax.wait_until_finished()
      shutil.rmtree(place, ignore_errors=True)
      raise self._explain(step, error) from error
    self._last_save = time.monotonic()
    self._thread = threading.Thread(
      target=self._finish, args=(place, body), name="checkpoint", daemon=True
    )
    self._thread.start()

  def restore_latest(self, abstract_state: Any) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none.

    Args:
      abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves; their
        `sharding` says where the arrays go, whatever they were saved from.

    Returns:
      State, extra and step.

    Raises:
      UserError: the checkpoint is of a state of other names, shapes or dtypes.
    """
    self.wait()
    place = None
    if _is_lead():
      place = self._newest_whole()
    step = int(_from_lead(-1 if place is None else int(place.name)))
    if step < 0:
      return None
    place = self.folder / f"{step:08d}"
    body = manifest.body(place)
    wanted = arrays.named(abstract_state)
    arrays.check(place, body["arrays"], wanted)
    found = arrays.read(place / _ARRAYS, wanted)
    treedef = jax.tree.structure(abstract_state)
    state = jax.tree.unflatten(treedef, [found[k] for k in wanted])
    self._last_save = time.monotonic()
    return Restored(state, body["extra"], step)

  def check(self) -> None:
    """Raises what went wrong in the background, if anything did; cheap."""
    if self._failure is not None:
      (step, error), self._failure = self._failure, None
      raise self._explain(step, error) from error

  def wait(self) -> None:
    """Blocks until no save is under way; raises its failure."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def close(self) -> None:
    """Waits, then frees Orbax's threads."""
    try:
      self.wait()
    finally:
      # Orbax may raise here once more what `wait` has told already.
      with contextlib.suppress(Exception):
        self._orbax.close()

  def _finish(self, place: pathlib.Path, body: dict[str, Any]) -> None:
    """The background part: let Orbax write, seal with a manifest, tidy up."""
    try:
      self._orbax.wait_until_finished()
      if _is_lead():
        manifest.seal(place, body)
    except BaseException as error:
      shutil.rmtree(place, ignore_errors=True)
      self._failure = (body["step"], error)
      return
    try:
      if _is_lead():
        self._tidy(body["step"])
    except OSError as error:
      _log.warning("old checkpoints in %s are kept: %s", self.folder, error)

  def _tidy(self, step: int) -> None:
    """Drops what is neither among the newest nor the best.

    Folders above `step` belong to a course of the run that was given up when it
    went back to an older checkpoint.
    """
    places = manifest.places(self.folder)
    older = [p for p in places if int(p.name) <= step]
    whole = [p for p in older if p not in self._damaged and manifest.read(p)]
    kept = set(whole[-self._keep :])
    if self._keep_best:
      scores = {p: manifest.body(p)["score"] for p in whole}
      scored = [p for p in whole if scores[p] is not None]
      kept |= set(sorted(scored, key=scores.__getitem__)[-1:])
    for place in places:
      if place not in kept:
        manifest.unseal(place)
        shutil.rmtree(place, ignore_errors=True)
        self._damaged.discard(place)

  def _newest_whole(self) -> pathlib.Path | None:
    for place in reversed(manifest.places(self.folder)):
      trouble = manifest.trouble(place)
      if trouble is None:
        return place
      self._damaged.add(place)
      _log.warning("%s is passed over: %s", place, trouble)
    return None

  def _explain(self, step: int, error: BaseException) -> Exception:
    if files.is_disk_full(error):
      whole = [p for p in manifest.places(self.folder) if manifest.read(p)]
      kept = "there is no earlier checkpoint"
      if whole:
        kept = f"checkpoint {whole[-1].name} is kept"
      return files.disk_full(self.folder, f"saving step {step}", kept)
    return RuntimeError(f"saving step {step} to {self.folder} failed")


def load(
  folder: str | os.PathLike, prefix: str = "", step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int] | None:
  """The newest whole checkpoint as nested dicts of numpy arrays.

  Needs no knowledge of the state, so exports use it.

  Args:
    folder: a run's folder of checkpoints.
    prefix: a dotted path; only the arrays below it are read, as in "params".
    step: of the checkpoint; None = the newest whole one.

  Returns:
    (tree below prefix, extra, step), or None if there is no whole checkpoint.
  """
  for place in reversed(manifest.places(pathlib.Path(folder).absolute())):
    if step is not None and int(place.name) != step:
      continue
    trouble = manifest.trouble(place)
    if trouble is not None:
      _log.warning("%s is passed over: %s", place, trouble)
      continue
    body = manifest.body(place)
    dot = f"{prefix}." if prefix else ""
    wanted = {
      name: jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
      for name, (shape, dtype) in body["arrays"].items()
      if name.startswith(dot)
    }
    tree: dict[str, Any] = {}
    for name, array in arrays.read(place / _ARRAYS, wanted).items():
      *parents, leaf = name.removeprefix(dot).split(".")
      node = tree
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = np.asarray(array)
    return tree, body["extra"], body["step"]
  return None


def _is_lead() -> bool:
  return jax.process_index() == 0


def _from_lead(value: int | bool) -> int:
  """The first process's value, on all of them."""
  if jax.process_count() == 1:
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int64(value)))
