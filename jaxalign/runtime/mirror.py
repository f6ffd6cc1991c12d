"""A run's folder on an object store, which cannot append to files.

The run works in a temporary folder of this machine. Checkpoints go to the store
directly, by Orbax; all other files are copied there before a checkpoint is
committed, and when the run ends. So the logs on the store are never behind its
newest checkpoint, and what a killed run had written after that is written
again.
"""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from jaxalign import paths
from jaxalign.parallel import hosts
from jaxalign.runtime.workdir import FINISHED

# {file: [bytes, time of change]} of what is on the store.
_NOTE = ".copied.json"
# Large folders, which a run writes and does not read again.
_NOT_FETCHED = ("checkpoints", "model", "profile")


@contextlib.contextmanager
def opened(name: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder of this machine for a run's folder, which is mostly itself.

  Args:
    name: the run's folder; one on an object store gets a temporary folder.

  Raises:
    UserError: the store cannot be used.
    HostError: it does not answer.
  """
  if not paths.is_remote(name):
    yield name
    return
  place = paths.remote(name, "--workdir")
  with tempfile.TemporaryDirectory(prefix=f"{place.name}-") as temporary:
    # Its last name is the run's, which trackers and reports show.
    folder = pathlib.Path(temporary) / place.name
    folder.mkdir()
    (folder / paths.MARK).write_text(str(place))
    if place.is_dir():
      for path in place.iterdir():
        if path.name not in _NOT_FETCHED:
          _copy(path, folder / path.name)
    (folder / _NOTE).write_text(json.dumps(_state(folder)))
    if hosts.is_lead():
      print(f"{place}: kept in {folder} between saves", flush=True)
    try:
      yield folder
    finally:
      push(folder)


def push(folder: pathlib.Path) -> None:
  """Copies what has changed to the store; nothing if the folder has none.

  In a run of several processes the lead does it.
  """
  place = paths.location(folder)
  if isinstance(place, pathlib.Path) or not hosts.is_lead():
    return
  # Taken before the copying: a log that grows meanwhile is copied again.
  known, now = json.loads((folder / _NOTE).read_text()), _state(folder)
  for name in known.keys() - now.keys():
    (place / name).unlink(missing_ok=True)
  # The mark of a finished run goes first and comes last, as on a file system.
  for name in sorted(now, key=lambda name: (name == FINISHED, name)):
    if known.get(name) != now[name]:
      with contextlib.suppress(FileNotFoundError):  # gone meanwhile
        _copy(folder / name, place / name)
  (folder / _NOTE).write_text(json.dumps(now))


def _state(folder: pathlib.Path) -> dict[str, list[int]]:
  """{relative path: [bytes, time of change]} of all files but hidden ones."""
  found = {}
  for path in sorted(folder.glob("**/*")):
    name = path.relative_to(folder)
    if path.is_file() and not any(part.startswith(".") for part in name.parts):
      stat = path.stat()
      found[str(name)] = [stat.st_size, stat.st_mtime_ns]
  return found


def _copy(source: paths.Folder, target: paths.Folder) -> None:
  """Copies a file, or a folder with all that is in it."""
  if source.is_dir():
    for path in source.iterdir():
      _copy(path, target / path.name)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  with source.open("rb") as old, target.open("wb") as new:
    shutil.copyfileobj(old, new, 2**24)
