"""Folders on object stores: `gs://`, `s3://` and what else `etils.epath` knows.

Most code works with a folder of this machine. One that stands for a folder
elsewhere holds, in `.remote`, the name of the other one. Weights are read, and
checkpoints read and written, there directly; a run's other files are copied
(`runtime.mirror`).
"""

import os
import pathlib
import re

from etils import epath

from jaxalign.errors import HostError, UserError

MARK = ".remote"
Folder = pathlib.Path | epath.Path

# `pathlib` makes one slash of two. A letter alone is a drive of Windows.
_REMOTE = re.compile(r"([a-zA-Z][\w+.-]+):/{1,2}(?=[^/])")


def is_remote(name: str | os.PathLike) -> bool:
  """Whether a name means a place on an object store, as `gs://bucket/run`."""
  return _REMOTE.match(os.fspath(name)) is not None


def remote(name: str | os.PathLike, field: str) -> epath.Path:
  """The place on an object store that a name means.

  Args:
    name: `is_remote`.
    field: what the user has set to it, for messages.

  Raises:
    UserError: an unknown scheme, a package that is not installed, or a store
      that refuses.
    HostError: the store does not answer.
  """
  url = _REMOTE.sub(r"\1://", os.fspath(name), count=1)
  scheme = url.partition(":")[0]
  try:
    place = epath.Path(url)
    place.exists()  # the store's package is imported, and credentials are used
  except KeyError as error:
    raise UserError(
      f"{field}: unknown scheme {scheme}:// of {url}; give a local folder, or "
      "one that begins with gs://, s3:// or az://"
    ) from error
  except ImportError as error:
    raise UserError(
      f"{field}: {scheme}:// needs a package that is not installed: {error}"
    ) from error
  except Exception as error:  # each store has errors of its own
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    silent = _is_silence(error)
    raise (HostError if silent else UserError)(
      f"{field}: {url} cannot be reached: {reason}; check the name, the "
      "credentials and the network"
    ) from error
  return place


def _is_silence(error: BaseException | None) -> bool:
  """Whether a store was not reached; each package has errors of its own."""
  while error is not None:
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    if re.search("Connect|Timeout|Transport", kinds):
      return True
    error = error.__cause__ or error.__context__
  return False


def refuse_remote(name: str | os.PathLike, field: str, remedy: str) -> None:
  """UserError if a name means a place on an object store.

  It would become a folder called `gs:`.
  """
  if is_remote(name):
    raise UserError(
      f"{field} must be on this machine's file system, got {name}; {remedy}"
    )


def location(folder: pathlib.Path) -> Folder:
  """The folder that `folder` stands for, which is mostly itself."""
  mark = folder / MARK
  return epath.Path(mark.read_text()) if mark.is_file() else folder


def size(path: Folder) -> int:
  """Bytes of a file."""
  if isinstance(path, pathlib.Path):
    return path.stat().st_size
  return path.stat().length
