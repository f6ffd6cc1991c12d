"""The seal of a checkpoint: lengths and SHA-256 of all its files.

Written last and in one piece, so a folder with a manifest was complete once,
and one that still matches it is complete now.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from jaxalign.runtime import files

NAME = "manifest.json"
_THREADS = 4


def places(folder: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoint folders, sealed or not, by rising step."""
  if not folder.exists():
    return []
  found = (p for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
  return sorted(found, key=lambda p: int(p.name))


def seal(place: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Forces all files of `place` to disk, then writes the manifest.

  Args:
    place: a checkpoint folder that nobody writes to any more.
    content: JSON object to carry along.
  """
  whole = {**content, "files": _digests(place, sync=True)}
  files.write_json(place / NAME, {"sha256": _digest_body(whole), "body": whole})


def unseal(place: pathlib.Path) -> None:
  """Takes the manifest away: what dies half-deleted is no checkpoint."""
  (place / NAME).unlink(missing_ok=True)


def read(place: pathlib.Path) -> dict[str, Any] | None:
  """The body of the manifest, or None if it is missing or damaged."""
  path = place / NAME
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_bytes())
  except ValueError:  # neither UTF-8 nor JSON any more
    return None
  if not isinstance(found, dict) or found.keys() != {"sha256", "body"}:
    return None
  content = found["body"]
  return content if _digest_body(content) == found["sha256"] else None


def body(place: pathlib.Path) -> dict[str, Any]:
  """`read`, where the manifest is known to be whole."""
  found = read(place)
  assert found is not None, f"{place} has no manifest"
  return found


def trouble(place: pathlib.Path) -> str | None:
  """Reads every file of `place`; what is wrong in words, or None."""
  if not (place / NAME).exists():
    return f"the save did not finish (no {NAME})"
  found = read(place)
  if found is None:
    return f"{NAME} is damaged"
  wanted = found["files"]
  lacking = [name for name in wanted if not (place / name).is_file()]
  if lacking:
    return f"{lacking[0]} is missing ({len(lacking)} of {len(wanted)} files)"
  for name, (length, _) in wanted.items():
    size = (place / name).stat().st_size
    if size != length:
      return f"{name} has {size} bytes instead of {length}"
  digests = _digests(place, sync=False)
  for name, digest in wanted.items():
    if digests[name] != digest:
      return f"{name} is not what was written (checksum differs)"
  return None


def _digests(place: pathlib.Path, *, sync: bool) -> dict[str, list[Any]]:
  """{relative path: [bytes, SHA-256]}; hashing lets go of the GIL."""
  paths = sorted(p for p in place.rglob("*") if p.is_file())
  paths = [p for p in paths if p != place / NAME]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(lambda path: _digest_file(path, sync), paths)
    return {
      str(p.relative_to(place)): d for p, d in zip(paths, found, strict=True)
    }


def _digest_file(path: pathlib.Path, sync: bool) -> list[Any]:
  with open(path, "rb") as file:
    if sync:
      os.fsync(file.fileno())
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [file.tell(), digest]


def _digest_body(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(
    json.dumps(content, sort_keys=True).encode()
  ).hexdigest()
