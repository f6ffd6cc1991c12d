"""Files that are whole or absent, and the error of a full disk."""

import json
import logging
import os
import pathlib
from collections.abc import Mapping

from jaxalign import paths
from jaxalign.errors import DISK_FULL, UserError
from jaxalign.parallel import hosts

_log = logging.getLogger(__name__)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def is_disk_full(error: BaseException | None) -> bool:
  """Whether `error`, or an error that caused it, says that the disk is full."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
      return True
    # TensorStore raises a `ValueError` with the system's message in it.
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False


def disk_full(path: paths.Folder, doing: str, kept: str) -> UserError:
  """The error to raise: where, what was being done, what is left of the run.

  Args:
    path: a file or folder on the full disk.
    doing: what failed, as in "saving step 40".
    kept: what a restart finds, as in "checkpoint 00000020 is kept".
  """
  return UserError(
    f"{path}: the disk (or the quota) is full while {doing}; {kept}; "
    "free some space and start the same command again"
  )


class Growing:
  """A file that only grows; an append is written whole or not at all."""

  def __init__(self, path: pathlib.Path, offset: int = 0):
    """Opens the file for appending.

    Args:
      path: the file; made if missing.
      offset: bytes to keep; what follows them is cut off.
    """
    self.path = path.absolute()  # a user's function may change the folder
    self._open()
    size = self._file.tell()
    if size < offset:
      _log.warning(
        "%s has %d bytes, the checkpoint says %d: earlier rows are lost",
        path,
        size,
        offset,
      )
    self._file.truncate(min(size, offset))

  def append(self, data: bytes) -> None:
    """Adds `data` at the end.

    Raises:
      UserError: the disk is full; the file is as before.
    """
    before = self._file.seek(0, os.SEEK_END)
    try:
      written = 0
      while written < len(data):  # an unbuffered write may stop early
        written += self._file.write(data[written:])
    except OSError as error:
      self._file.truncate(before)
      if is_disk_full(error):
        kept = "its old content is kept"
        raise disk_full(self.path, "adding to it", kept) from error
      raise

  def offset(self) -> int:
    """Forces the file to disk; its length in bytes."""
    os.fsync(self._file.fileno())
    # A mounted bucket uploads a file when it is closed.
    self._file.close()
    self._open()
    return self._file.tell()

  def _open(self) -> None:
    # Unbuffered: what was written survives `kill -9`.
    self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def write_atomic(path: paths.Folder, content: str | bytes) -> None:
  """Writes a file; after a crash it is the old one or the new one, whole.

  In a run of several processes only the lead writes.

  Raises:
    UserError: the disk is full; the old file, if any, is untouched.
  """
  if not hosts.is_lead():
    return
  if not isinstance(path, pathlib.Path):
    # An object is there as a whole or not at all.
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return
  # On disk under another name first; the renaming is the commit.
  draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(draft, "wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
  except OSError as error:
    draft.unlink(missing_ok=True)
    if is_disk_full(error):
      raise disk_full(path, "writing it", "its old content is kept") from error
    raise


def write_json(path: paths.Folder, value: Mapping[str, object]) -> None:
  """`write_atomic` of a JSON object, two-space indent, keys in given order."""
  write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
  """`{"a": {"b": 1}}` -> `{"a.b": 1}`; an empty mapping is a value itself."""
  flat: dict[str, object] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat
