"""Checkpoints of a run: Orbax's manager, and what exact resume needs on top.

A checkpoint of step 40 is the folder `00000040/` with the arrays and
`manifest.json`: the step, what the caller added, the sizes of all files and a
sum of every array. Orbax writes in the background, commits by a rename and
deletes old checkpoints. The manifest is written just before the commit, so
nothing depends on how far a killed process came; a checkpoint that no longer
matches its manifest is passed over with a warning, and the one before is used.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from jaxalign import paths
from jaxalign.core.types import JsonObject, Params
from jaxalign.parallel import hosts
from jaxalign.runtime import arrays, files, manifest, mirror

_log = logging.getLogger(__name__)

State = TypeVar("State")  # a tree of arrays


@dataclasses.dataclass(frozen=True)
class Restored(Generic[State]):
  """What a checkpoint held."""

  state: State  # on the shardings that were asked for
  extra: JsonObject  # JSON, as given to `save`
  step: int  # steps done when it was saved


@dataclasses.dataclass
class _Retention(checkpoint_managers.PreservationPolicy):
  """Which checkpoints stay: the newest, and the one with the highest score.

  Kept instead of Orbax's `BestN`, which takes the scores from files without a
  checksum: a single damaged one would make the whole folder unreadable.
  """

  keep: int
  keep_best: bool
  scores: dict[int, float | None]  # by step

  def should_preserve(
    self,
    checkpoints: Sequence[Any],  # Orbax's type is a protocol without checks
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> list[bool]:
    """Of each checkpoint, by rising step, whether it stays."""
    steps = [info.step for info in checkpoints]
    kept = set(steps[-self.keep :])
    if self.keep_best:
      known = {step: self.scores.get(step) for step in steps}
      # A score that is not finite is no score: NaN has no place in an order.
      scored = {
        step: score
        for step, score in known.items()
        if score is not None and math.isfinite(score)
      }
      kept |= set(sorted(scored, key=scored.__getitem__)[-1:])
    return [step in kept for step in steps]


class Checkpointer:
  """Saves a run's state in the background and finds the newest whole one.

  At most one save is in flight. The next `check`, `save`, `wait` or `close`
  raises its failure. All processes of a run make the same calls.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    every_steps: int = 0,
    every_minutes: int | float = 0,
    keep: int = 2,
    keep_best: bool = False,
    sha256: bool = False,
  ):
    """Opens, and makes, the folder of checkpoints.

    Args:
      folder: holds one folder a checkpoint and nothing else.
      every_steps: `due` after as many steps; 0 = not by steps.
      every_minutes: `due` after as many minutes; 0 = not by time.
      keep: how many of the newest stay; >= 1.
      keep_best: also keep the one with the highest `score`.
      sha256: also write the SHA-256 of every file, which `restore_latest` then
        compares.
    """
    arrays.quiet()
    self._sha256 = sha256
    self._local = pathlib.Path(folder).absolute()
    self.folder = _home(folder)
    self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
    # Drafts of a killed save are named here and deleted by Orbax below.
    if hosts.is_lead():
      for draft in self.folder.glob("*.orbax-checkpoint-tmp*"):
        place = self.folder / draft.stem
        _log.warning("%s is passed over: the save did not finish", place)
    # The scores so far, so that the best checkpoint also outlives a restart.
    bodies = [manifest.read(place) for place in _places(self.folder)]
    self._scores = {body["step"]: body["score"] for body in bodies if body}
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        step_format_fixed_length=8,
        preservation_policy=_Retention(keep, keep_best, self._scores),
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._seal,
          timeout_secs=hosts.TRANSFER_SECONDS,
          create_directories_asynchronously=False,
        ),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # opens whatever is damaged in the folder
      ),
      item_handlers={"arrays": arrays.handler()},
    )
    self._body: JsonObject | None = None  # of the save in flight
    self._raised = False  # whether a failure was
    self._given_up: set[int] = set()  # steps that a resume did not go on from
    self._last_save = time.monotonic()

  def due(self, step: int) -> bool:
    """Whether to save now, `step` steps done; the lead's clock counts."""
    by_steps = self._every_steps > 0 and step % self._every_steps == 0
    if by_steps or self._every_seconds == 0:
      return by_steps
    late = time.monotonic() - self._last_save >= self._every_seconds
    return hosts.broadcast(late)

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, object],
    *,
    score: int | float | None = None,
  ) -> None:
    """Starts to save; returns once the arrays may be donated or changed.

    Waits first for a save that is still under way.

    Args:
      step: steps done, >= 0; an older checkpoint of it is replaced.
      state: tree of jax or numpy arrays.
      extra: JSON object: file offsets, counters, whatever a resume needs.
      score: higher is better; what `keep_best` goes by. None or not finite: it
        is not the best.

    Raises:
      UserError: the disk is full, now or during the save before.
    """
    self.wait()
    named = arrays.named(state)
    body = {
      "step": step,
      "extra": json.loads(json.dumps(extra)),  # as of now: a run counts on
      "score": score,
      "arrays": {name: arrays.spec(leaf) for name, leaf in named.items()},
      "sums": arrays.sums(named),
    }
    # Orbax refuses to write arrays without elements.
    stored = {name: leaf for name, leaf in named.items() if np.size(leaf)}
    try:
      # Steps after this one belong to a course of the run that was given up
      # when it went back to an older checkpoint.
      for old in self._manager.all_steps():
        if old >= step or old in self._given_up:
          self._manager.delete(old)
      self._given_up.clear()
      # Read by `_seal` and `_Retention` while Orbax saves.
      self._body, self._scores[step] = body, score
      # The guard of the training step is about transfers nobody asked for.
      with jax.transfer_guard("allow"):
        args = ocp.args.Composite(arrays=arrays.save_args(stored))
        self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._failed(step, error) from error
    self._last_save = time.monotonic()

  def restore_latest(self, abstract_state: State) -> Restored[State] | None:
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
    wanted, below = arrays.named(abstract_state), None
    while True:
      # The lead looks at all files of a checkpoint; the others take its word.
      lead = hosts.is_lead()
      step = newest_whole(self._local, below=below) if lead else -1
      step = hosts.broadcast(step)
      # Later checkpoints are deleted by the next save, not before.
      self._given_up = {s for s in self._manager.all_steps() if s > step}
      if step < 0:
        return None
      place = self.folder / f"{step:08d}"
      body = _body_of(place)
      # Names, shapes and dtypes are compared before an array is read.
      arrays.check(place, body["arrays"], wanted)
      found = arrays.read_whole(place, wanted, body.get("sums", {}))
      if found is not None:
        break
      below = step
    # `wanted` is in the order of the tree's leaves.
    treedef = jax.tree.structure(abstract_state)
    state = jax.tree.unflatten(treedef, [found[name] for name in wanted])
    self._last_save = time.monotonic()
    return Restored(state, body["extra"], step)

  def check(self) -> None:
    """Raises what went wrong in the background, if anything did; cheap."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Blocks until no save is under way; raises its failure."""
    if self._body is None:
      return
    step = self._body["step"]
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      # Where there are no renames, the folder is there from the start.
      committed = manifest.read(self.folder / f"{step:08d}") is not None
      if not (committed and isinstance(error, OSError)):
        raise self._failed(step, error) from error
      # What failed came after the commit: the deletion of old ones.
      _log.warning("old checkpoints in %s are kept: %s", self.folder, error)
    finally:
      self._body = None

  def close(self) -> None:
    """Waits, then frees Orbax's threads."""
    try:
      self.wait()
    finally:
      try:
        self._manager.close()
      except Exception:
        # Arrays and metadata are written by threads of their own: where both
        # fail, Orbax raises the second failure here, after `wait` has raised
        # the first.
        if not self._raised:
          raise

  def _seal(self) -> None:
    """Orbax calls it, on the lead, when all is written, before the commit."""
    assert self._body is not None
    # The logs are on the store before a checkpoint says how long they were.
    mirror.push(self._local.parent)
    # The folder still has a temporary name, which begins with the step.
    (place,) = self.folder.glob(f"{self._body['step']:08d}*")
    manifest.seal(place, self._body, self._sha256)

  def _failed(self, step: int, error: Exception) -> Exception:
    """Removes what a failed save wrote; the error to raise."""
    self._body, self._raised = None, True
    if hosts.is_lead():
      for draft in self.folder.glob(f"{step:08d}.*"):
        if isinstance(draft, pathlib.Path):
          shutil.rmtree(draft, ignore_errors=True)
        else:
          draft.rmtree(missing_ok=True)
    if not files.is_disk_full(error):
      return RuntimeError(f"saving step {step} to {self.folder} failed")
    kept = "there is no earlier checkpoint"
    whole = [place for place in _places(self.folder) if manifest.read(place)]
    if whole:
      kept = f"checkpoint {whole[-1].name} is kept"
    return files.disk_full(self.folder, f"saving step {step}", kept)


def load(
  folder: str | os.PathLike, prefix: str = "", step: int | None = None
) -> tuple[Params, JsonObject, int] | None:
  """The newest whole checkpoint as nested dicts of numpy arrays.

  Needs no knowledge of the state, so exports use it.

  Args:
    folder: a run's folder of checkpoints.
    prefix: a dotted path; only the arrays below it are read, as in "params".
    step: of the checkpoint; None = the newest whole one.

  Returns:
    (tree below prefix, extra, step), or None if there is no whole checkpoint.
  """
  below = None
  while (found := newest_whole(folder, step, below)) >= 0:
    place = _home(folder) / f"{found:08d}"
    body = _body_of(place)
    # The manifest says what there is, so no model is needed.
    dot = f"{prefix}." if prefix else ""
    wanted = {
      name: jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
      for name, (shape, dtype) in body["arrays"].items()
      if name.startswith(dot)
    }
    read = arrays.read_whole(place, wanted, body.get("sums", {}), alone=True)
    if read is not None:
      tree = traverse_util.unflatten_dict(
        {
          tuple(name.removeprefix(dot).split(".")): np.asarray(array)
          for name, array in read.items()
        }
      )
      return tree, body["extra"], body["step"]
    below = found
  return None


def read_part(
  folder: str | os.PathLike, step: int, part: PyTree, remedy: str
) -> PyTree | None:
  """Some arrays of one checkpoint, of a run that need not be this one.

  Args:
    folder: a run's folder of checkpoints.
    step: of the checkpoint.
    part: a dict of top-level names of the state, `jax.ShapeDtypeStruct` leaves
      below them; their `sharding` says where the arrays go.
    remedy: what to do where they do not fit, for the message.

  Returns:
    The same tree with arrays, or None if there is no such whole checkpoint.

  Raises:
    UserError: it has other names, shapes or dtypes there.
  """
  if newest_whole(folder, step) < 0:
    return None
  place = _home(folder) / f"{step:08d}"
  body = _body_of(place)
  wanted = arrays.named(part)
  tops = tuple(f"{name}." for name in part)
  saved = {n: s for n, s in body["arrays"].items() if n.startswith(tops)}
  arrays.check(place, saved, wanted, remedy)
  found = arrays.read_whole(place, wanted, body.get("sums", {}))
  if found is None:
    return None
  return jax.tree.unflatten(
    jax.tree.structure(part), [found[name] for name in wanted]
  )


def last_step(folder: str | os.PathLike) -> int:
  """The step of the newest checkpoint by its name, unread; 0 = none."""
  return max((int(place.name) for place in _places(_home(folder))), default=0)


def read_extra(folder: str | os.PathLike, step: int) -> JsonObject:
  """What a checkpoint that was found whole carries, see `Checkpointer.save`."""
  return _body_of(_home(folder) / f"{step:08d}")["extra"]


def newest_whole(
  folder: str | os.PathLike, step: int | None = None, below: int | None = None
) -> int:
  """The step of the newest checkpoint whose files are all there, or -1.

  Args:
    folder: of a run's checkpoints.
    step: the only one to look at; None = all.
    below: only earlier ones than this; None = all.
  """
  for place in reversed(_places(_home(folder))):
    found = int(place.name)
    if step in (None, found) and (below is None or found < below):
      trouble = manifest.trouble(place)
      if trouble is None:
        return int(place.name)
      _log.warning("%s is passed over: %s", place, trouble)
  return -1


def _home(folder: str | os.PathLike) -> paths.Folder:
  """Where a run's checkpoints are: in its folder, or on an object store."""
  folder = pathlib.Path(folder).absolute()
  return paths.location(folder.parent) / folder.name


def _body_of(place: paths.Folder) -> JsonObject:
  """The manifest of a checkpoint that was found whole."""
  body = manifest.read(place)
  assert body is not None, f"{place} was whole and no longer is"
  return body


def _places(folder: paths.Folder) -> list[paths.Folder]:
  """The folders of committed checkpoints, by rising step."""
  if not folder.is_dir():
    return []
  found = (place for place in folder.glob("*") if place.name.isdigit())
  return sorted(found, key=lambda place: int(place.name))
