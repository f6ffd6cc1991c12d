"""A run's folder: whose it is, whether it is done, and one process at a time.

`config.json` says which run the folder holds; the same command goes on with
it, another config is refused. `finished.json` marks the end.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping

from jaxalign import paths
from jaxalign.config import rename_aliases
from jaxalign.config.changes import LENGTH, may_change
from jaxalign.config.rules import Section, describe
from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.parallel import hosts
from jaxalign.runtime import files

FINISHED = "finished.json"
_LOCK = ".lock"
# Errors of file systems without locks, as Lustre or NFS may be mounted.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_log = logging.getLogger(__name__)
# The weights that `init_from` took are there before the run is.
_BEFORE_CONFIG = ("start", "start.json")


class OtherConfigError(UserError):
  """The folder holds a run with another config."""


@dataclasses.dataclass(frozen=True)
class Workdir:
  """An open run folder; the lock is held until `close` or the process's end."""

  path: pathlib.Path
  lock: int | None  # file descriptor; None where another process leads

  @property
  def checkpoints(self) -> pathlib.Path:
    """Folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def profile(self) -> pathlib.Path:
    """Folder of profiler traces."""
    return self.path / "profile"

  def close(self) -> None:
    """Lets another process have the folder."""
    if self.lock is not None:
      os.close(self.lock)


def open_workdir(
  path: str | os.PathLike,
  config: Mapping[str, object],
  *,
  rules: tuple[str, ...] = (),
  config_class: type[Section] | None = None,
) -> Workdir:
  """Makes the folder, or comes back to it.

  In a run of several processes only the lead locks and writes.

  Args:
    path: the run's folder; made if missing.
    config: nested mapping of JSON values (tuples count as lists).
    rules: which fields may differ from those of the earlier start, as
      `config.changes.MAY_CHANGE`; the new values are written.
    config_class: knows the old names of fields that an earlier version wrote.

  Returns:
    The open folder.

  Raises:
    UserError: the path is no folder or cannot be written, holds something else
      than a run, belongs to another config, or is in use.
  """
  path = pathlib.Path(path)
  assert not paths.is_remote(path), path  # see `check_workdir`
  if not hosts.is_lead():
    return Workdir(path, lock=None)
  with _refusing(path):
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
  # Until the config is accepted, an error gives the lock back.
  with contextlib.ExitStack() as on_error:
    on_error.callback(os.close, lock)
    _take_lock(path, lock)
    # As it will be read back: JSON has no tuples.
    wanted: JsonObject = json.loads(json.dumps(config))
    if _checked_config(path, wanted, rules, config_class) != wanted:
      files.write_json(path / "config.json", wanted)
    on_error.pop_all()  # from here on the lock stays
  return Workdir(path, lock)


def check_workdir(
  path: str | os.PathLike,
  config: Mapping[str, object] | None,
  *,
  rules: tuple[str, ...] = (),
  config_class: type[Section] | None = None,
) -> None:
  """Raises what `open_workdir` would, but makes and writes nothing.

  Args and raises: as `open_workdir`; of another config an `OtherConfigError`.
  None in its place takes a run with any.
  """
  remedy = "the command jaxalign.main takes --workdir=gs://bucket/run"
  paths.refuse_remote(path, "a run's folder", remedy)
  path = pathlib.Path(path)
  # The folder, or the nearest one above it in which it would be made.
  there = next(p for p in (path, *path.absolute().parents) if p.exists())
  with _refusing(path):
    if not there.is_dir():
      raise NotADirectoryError(there)
    if not os.access(there, os.W_OK | os.X_OK):
      raise PermissionError(there)
  if there != path:
    return
  # The lock is tried and let go: it says whether a process is at work.
  if (path / _LOCK).exists():
    lock = os.open(path / _LOCK, os.O_RDWR)
    try:
      _take_lock(path, lock)
    finally:
      os.close(lock)
  if config is None:
    _find_config(path)
    return
  wanted = json.loads(json.dumps(config))
  _checked_config(path, wanted, rules, config_class)


def move_aside(path: pathlib.Path) -> pathlib.Path | None:
  """Renames a run's folder to `<path>.1`, or the next number that is free.

  Returns:
    Its new name, or None if there is no run.

  Raises:
    UserError: a process is at work in it.
  """
  if not (path / "config.json").exists():
    return None
  number = 1
  while (aside := path.with_name(f"{path.name}.{number}")).exists():
    number += 1
  lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    _take_lock(path, lock)
    with _refusing(path):
      path.rename(aside)
  finally:
    os.close(lock)
  return aside


def read_config(path: str | os.PathLike) -> JsonObject | None:
  """The config of the run in a folder, as it was written; None = no run."""
  place = pathlib.Path(path) / "config.json"
  return _read_object(place) if place.exists() else None


def mark_finished(
  path: str | os.PathLike, summary: Mapping[str, object]
) -> None:
  """Marks a run as done; `summary` is any JSON, say the last metrics."""
  files.write_json(pathlib.Path(path) / FINISHED, summary)


def mark_unfinished(path: str | os.PathLike) -> None:
  """Takes the mark of `mark_finished` away: the run goes on."""
  (pathlib.Path(path) / FINISHED).unlink(missing_ok=True)


def read_finished(path: str | os.PathLike) -> JsonObject | None:
  """The summary that a finished run left, or None."""
  place = pathlib.Path(path) / FINISHED
  return _read_object(place) if place.exists() else None


@contextlib.contextmanager
def _refusing(path: pathlib.Path) -> Iterator[None]:
  """What keeps a folder from being made and written, as a UserError."""
  try:
    yield
  except (FileExistsError, NotADirectoryError) as error:
    raise UserError(
      f"{path} cannot be a run's folder: a file is in the way; "
      "give --workdir another path"
    ) from error
  except PermissionError as error:
    raise UserError(
      f"{path} cannot be written: permission denied; "
      "give --workdir a folder you may write to"
    ) from error


def _take_lock(path: pathlib.Path, lock: int) -> None:
  """An advisory lock, which the system drops with the process, however it dies.

  A pid file would outlive `kill -9` and then keep everybody out.
  """
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    owner = os.read(lock, 200).decode(errors="replace").strip()
    raise UserError(
      f"{path} is in use by {owner or 'another process'}; "
      "wait for it, stop it, or give another --workdir"
    ) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    _log.warning(
      "%s: its file system has no locks (%s); start no second run there",
      path,
      error.strerror,
    )
  # Who holds it, for the message to the next process.
  os.ftruncate(lock, 0)
  os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _find_config(path: pathlib.Path) -> pathlib.Path | None:
  """The config.json of a run's folder, or None if the folder is empty.

  Raises:
    UserError: the folder holds something else.
  """
  place = path / "config.json"
  # No config: the folder is a new run's if it holds only hidden files.
  if not place.exists():
    strangers = sorted(
      p.name
      for p in path.iterdir()
      if not p.name.startswith(".") and p.name not in _BEFORE_CONFIG
    )
    if strangers:
      raise UserError(
        f"{paths.location(path)} is not empty ({', '.join(strangers[:3])}) and "
        "holds no config.json of a run; give --workdir a new or empty folder"
      )
    return None
  return place


def _checked_config(
  path: pathlib.Path,
  wanted: Mapping[str, object],
  rules: tuple[str, ...],
  config_class: type[Section] | None,
) -> JsonObject | None:
  """The config of the run in a folder, or None if the folder is empty.

  Raises:
    UserError: the folder holds no run.
    OtherConfigError: it holds that of another config; names every field that
      differs.
  """
  place = _find_config(path)
  if place is None:
    return None
  found = _read_object(place)
  if config_class is not None:
    found = rename_aliases(config_class, found)
  # A config: all fields have to agree but those that may change.
  old, new = files.flatten(found), files.flatten(wanted)
  # A field that an earlier version lacked is off, or as it is by default.
  for row in describe(config_class) if config_class is not None else ():
    name = row.path.removeprefix("config.")
    default = json.loads(json.dumps(row.default))
    if name not in old and new.get(name) == default:
      old[name] = default
  differing = [
    name
    for name in sorted(old.keys() | new.keys())
    if _show(old, name) != _show(new, name)
    and not may_change(name, old.get(name), new.get(name), rules)
    and (name in old or new[name])
  ]
  # Another method has other fields; those that both have say enough.
  if "algorithm" in differing:
    differing = [name for name in differing if name in old and name in new]
  if differing:
    changes = "; ".join(
      f"{name} was {_show(old, name)}, now {_show(new, name)}"
      for name in differing
    )
    longer, shown = "", paths.location(path)
    if set(differing) <= set(LENGTH):
      longer = "--extend to train that run for longer, "
    raise OtherConfigError(
      f"{shown} holds a run with another config: {changes}; give {longer}"
      "another --workdir, --fresh to move that run aside, another --workdir "
      f"with --init_from={shown} to start from its weights, or the old values "
      "to go on with it"
    )
  return found


def _show(flat: Mapping[str, object], name: str) -> str:
  return json.dumps(flat[name]) if name in flat else "absent"


def _read_object(place: pathlib.Path) -> JsonObject:
  try:
    value = json.loads(place.read_text(encoding="utf-8"))
  except ValueError as error:  # neither JSON nor UTF-8
    raise UserError(
      f"{place} is not JSON ({error}); fix it or give another --workdir"
    ) from error
  if not isinstance(value, dict):
    raise UserError(
      f"{place} must hold a JSON object, got {type(value).__name__}; "
      "fix it or give another --workdir"
    )
  return value
