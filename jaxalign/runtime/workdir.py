"""A run's folder: whose it is, whether it is done, and one process at a time.

`config.json` says which run lives here; starting the same command again finds
it and goes on, another config is refused. `finished.json` marks the end.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.errors import UserError, explained
from jaxalign.runtime import files

_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Workdir:
  """An open run folder; the lock is held until `close` or the process's end."""

  path: pathlib.Path
  config: dict[str, Any]  # as written to config.json
  fresh: bool  # True: the folder was empty until now
  lock: int | None  # file descriptor; None where another process leads

  @property
  def checkpoints(self) -> pathlib.Path:
    """Folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def model(self) -> pathlib.Path:
    """Folder of the resulting Hugging Face model."""
    return self.path / "model"

  @property
  def profile(self) -> pathlib.Path:
    """Folder of profiler traces."""
    return self.path / "profile"

  @property
  def finished(self) -> dict[str, Any] | None:
    """What `mark_finished` was given, or None before that."""
    return read_finished(self.path)

  def close(self) -> None:
    """Lets another process have the folder."""
    if self.lock is not None:
      os.close(self.lock)


def open_workdir(
  path: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  may_change: Iterable[str] = (),
  lead: bool = True,
) -> Workdir:
  """Makes the folder, or comes back to it.

  Args:
    path: the run's folder; made if missing.
    config: nested mapping of JSON values (tuples count as lists).
    may_change: patterns over dotted field names (`checkpoint.*`) whose values
      may differ from those of the earlier start; the new ones are written.
    lead: False on all but one process of a multi-host run: those neither lock
      nor write.

  Returns:
    The open folder.

  Raises:
    UserError: the path is no folder or cannot be written, holds something else
      than a run, belongs to another config, or is in use.
  """
  path = pathlib.Path(path)
  wanted: dict[str, Any] = json.loads(json.dumps(config))
  if not lead:
    return Workdir(path, wanted, fresh=False, lock=None)
  with contextlib.ExitStack() as undo:
    lock = _open_lock(path)
    undo.callback(os.close, lock)
    _take_lock(path, lock)
    fresh = _claim(path, wanted, tuple(may_change))
    undo.pop_all()  # from here on the lock stays
  return Workdir(path, wanted, fresh=fresh, lock=lock)


def check_workdir(
  path: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  may_change: Iterable[str] = (),
) -> None:
  """Raises what `open_workdir` would, but makes and writes nothing.

  Args and raises: as `open_workdir`.
  """
  path = pathlib.Path(path)
  there = next(p for p in (path, *path.absolute().parents) if p.exists())
  with _explained(path):
    if not there.is_dir():
      raise NotADirectoryError(there)
    if not os.access(there, os.W_OK | os.X_OK):
      raise PermissionError(there)
  if there == path:
    with contextlib.ExitStack() as undo:
      if (path / _LOCK).exists():
        lock = os.open(path / _LOCK, os.O_RDWR)
        undo.callback(os.close, lock)
        _take_lock(path, lock)
      _known(path, json.loads(json.dumps(config)), tuple(may_change))


def _claim(
  path: pathlib.Path, wanted: dict[str, Any], may_change: tuple[str, ...]
) -> bool:
  """Writes config.json, or checks it; whether the folder was fresh."""
  found = _known(path, wanted, may_change)
  if found != wanted:
    files.write_json(path / "config.json", wanted)
  return found is None


def _known(
  path: pathlib.Path, wanted: dict[str, Any], may_change: tuple[str, ...]
) -> dict[str, Any] | None:
  """The config of the run in a folder, checked; None if there is no run."""
  place = path / "config.json"
  if not place.exists():
    strangers = sorted(
      p.name for p in path.iterdir() if not p.name.startswith(".")
    )
    if strangers:
      raise UserError(
        f"{path} is not empty ({', '.join(strangers[:3])}) and holds no "
        "config.json of a run; give --workdir a new or empty folder"
      )
    return None
  found = _read_object(place)
  _check_same(path, found, wanted, may_change)
  return found


def mark_finished(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
  """Marks a run as done; `summary` is any JSON, say the last metrics."""
  files.write_json(pathlib.Path(path) / "finished.json", summary)


def read_finished(path: str | os.PathLike) -> dict[str, Any] | None:
  """The summary that a finished run left, or None."""
  place = pathlib.Path(path) / "finished.json"
  return _read_object(place) if place.exists() else None


def _open_lock(path: pathlib.Path) -> int:
  """Makes the folder and a file in it; a descriptor of the file."""
  with _explained(path):
    path.mkdir(parents=True, exist_ok=True)
    return os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  """What keeps a folder from being made and written, as a UserError."""
  in_the_way = lambda _: (
    f"{path} cannot be a run's folder: a file is in the way; "
    "give --workdir another path"
  )
  denied = lambda _: (
    f"{path} cannot be written: permission denied; "
    "give --workdir a folder you may write to"
  )
  with (
    explained(FileExistsError, NotADirectoryError, by=in_the_way),
    explained(PermissionError, by=denied),
  ):
    yield


def _take_lock(path: pathlib.Path, lock: int) -> None:
  """An advisory lock, which the system drops with the process, however it dies.

  A pid file would outlive `kill -9` and then keep everybody out.
  """
  owner = lambda: os.read(lock, 200).decode(errors="replace").strip()
  in_use = lambda _: (
    f"{path} is in use by {owner() or 'another process'}; "
    "wait for it, stop it, or give another --workdir"
  )
  with explained(BlockingIOError, by=in_use):
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  os.ftruncate(lock, 0)
  os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _read_object(place: pathlib.Path) -> dict[str, Any]:
  failed = lambda why: (
    f"{place} is not JSON ({why}); mend it or give another --workdir"
  )
  with explained(json.JSONDecodeError, UnicodeDecodeError, by=failed):
    value = json.loads(place.read_text(encoding="utf-8"))
  if not isinstance(value, dict):
    raise UserError(
      f"{place} must hold a JSON object, got {type(value).__name__}; "
      "mend it or give another --workdir"
    )
  return value


def _check_same(
  path: pathlib.Path,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  may_change: tuple[str, ...],
) -> None:
  """Raises a UserError that names every field that differs."""
  old, new = files.flatten(old), files.flatten(new)
  differing = [
    f"{name} was {_show(old, name)}, now {_show(new, name)}"
    for name in sorted(old.keys() | new.keys())
    if _show(old, name) != _show(new, name)
    and not any(fnmatch.fnmatchcase(name, rule) for rule in may_change)
  ]
  if differing:
    raise UserError(
      f"{path} holds a run with another config: {'; '.join(differing)}; "
      "give another --workdir, or the old values to go on with that run"
    )


def _show(flat: Mapping[str, Any], name: str) -> str:
  return json.dumps(flat[name]) if name in flat else "absent"
