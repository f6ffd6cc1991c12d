"""The seal of a checkpoint: the size, or also the SHA-256, of all its files.

Kept next to Orbax's own commit because Orbax checks no contents: a chunk that
is missing from its array format reads as zeros. What is in the files is
compared by the sums of the arrays, which the manifest carries along.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from concurrent import futures

from jaxalign import paths
from jaxalign.core.types import JsonObject
from jaxalign.runtime import files

NAME = "manifest.json"
_THREADS = 4  # hashing lets go of the GIL


def seal(
  place: paths.Folder, content: Mapping[str, object], sha256: bool = False
) -> None:
  """Forces all files of `place` to disk, then writes the manifest.

  Args:
    place: a checkpoint's folder, to whose arrays nobody writes any more.
    content: JSON object to carry along.
    sha256: whether to read all files again for their digests.
  """
  body = {**content, "files": _digests(place, sha256=sha256, sync=True)}
  files.write_json(place / NAME, {"sha256": _digest(body), "body": body})


def read(place: paths.Folder) -> JsonObject | None:
  """What was sealed, or None if the manifest is missing or damaged."""
  try:
    found = json.loads((place / NAME).read_bytes())
    body = found["body"]
    # The manifest carries its own checksum, because it may be damaged too.
    return body if found["sha256"] == _digest(body) else None
  except (OSError, ValueError, LookupError, TypeError):
    return None


def trouble(place: paths.Folder) -> str | None:
  """What is wrong with the files of `place`, in words; None = nothing.

  Files are read only where the manifest has their digests.
  """
  body = read(place)
  if body is None:
    return f"{NAME} is missing or damaged"
  wanted = body["files"]
  hashed = any(len(digest) > 1 for digest in wanted.values())
  found = _digests(place, sha256=hashed, sync=False)
  for name, digest in wanted.items():
    if found.get(name) != digest:
      state = "not what was written" if name in found else "missing"
      return f"{name} is {state}"
  return None


def _digests(
  place: paths.Folder, *, sha256: bool, sync: bool
) -> dict[str, list[int | str]]:
  """{relative path: [bytes] or [bytes, SHA-256]} of all in folders of `place`.

  The files next to the manifest are Orbax's notes, which nothing here reads.
  """

  def digest(path: paths.Folder) -> list[int | str]:
    size = paths.size(path)
    # An object is on its store once it can be seen.
    if sync and isinstance(path, pathlib.Path):
      with path.open("rb") as file:
        os.fsync(file.fileno())
    if not sha256:
      return [size]
    total = hashlib.sha256()
    with path.open("rb") as file:
      while block := file.read(2**22):
        total.update(block)
    return [size, total.hexdigest()]

  found = sorted(
    path
    for folder in place.iterdir()
    if folder.is_dir()
    for path in _files(folder)
  )
  names = [str(path.relative_to(place)) for path in found]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(digest, found), strict=True))


def _files(folder: paths.Folder) -> Iterator[paths.Folder]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _digest(body: Mapping[str, object]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
