"""From what a user names to a folder on disk."""

import difflib
import fnmatch
import functools
import os
import pathlib
import re
import tempfile

from jaxalign import paths
from jaxalign.errors import HostError, UserError
from jaxalign.models.hf.weights import ADAPTER_FILES, MODEL_FILES

# [owner/]name[@revision].
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
# The files of weights, whole or in parts (model-00001-of-00002.safetensors).
_SAFETENSORS, _BINARIES = (
  tuple(
    name.replace(".", "*.")
    for name in (*MODEL_FILES, *ADAPTER_FILES)
    if name.endswith(suffix)
  )
  for suffix in (".safetensors", ".bin")
)


def resolve(
  source: str | pathlib.Path, *, weights: bool = True
) -> pathlib.Path:
  """The folder of a model, downloaded if a hub id names it.

  Args:
    source: an existing folder, a path (it begins with `.`, `/`, `~` or
      `runs/`), a folder on an object store ("gs://bucket/model"), or a hub id
      such as "EleutherAI/pythia-70m", optionally with "@revision".
    weights: fetch them; a tokenizer needs none.

  Returns:
    The folder; for one on an object store a temporary one with its small files,
    whose weights are read from there. Only an id may need the network; an
    earlier download is found without it.

  Raises:
    UserError: the folder does not exist, or the hub does not give it.
    HostError: the hub does not answer.
  """
  # A local folder, or what can only be meant as one.
  name = str(source)
  if paths.is_remote(name):
    return pathlib.Path(_stand_in(name).name)
  folder = pathlib.Path(name).expanduser()
  # `runs/` is where this package puts its runs, and no owner of the hub.
  local = name.startswith((".", "/", "~", "runs/"))
  exists = os.path.exists(folder)  # `Path.exists` raises on very long names
  if name and (exists or local):
    if not os.path.isdir(folder):
      state = "is a file" if exists else "does not exist"
      remedy = "check the path"
      if name.startswith("runs/") and folder.name == "model":
        remedy = "it is there once that run is trained"
      remedy = _nearest(folder) or remedy
      raise UserError(f"model folder {name} {state}; {remedy}")
    if not os.access(folder, os.R_OK | os.X_OK):
      raise UserError(
        f"model folder {name} cannot be read: permission denied; ask its owner "
        "or copy it"
      )
    return folder

  # A hub id.
  if not _ID.fullmatch(name):
    raise UserError(
      f"{name!r} is neither an existing folder nor a hub id such as "
      "EleutherAI/pythia-70m"
    )

  import huggingface_hub  # slow to import, and most runs need no hub

  repository, _, revision = name.partition("@")
  # Many repositories hold both kinds; the binary one is fetched only if alone.
  for patterns in (_SAFETENSORS, _BINARIES) if weights else ((),):
    try:
      path = huggingface_hub.snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=[*CONFIGS, *patterns],
      )
    except (OSError, ValueError) as error:
      # The hub's errors run over several lines; the first one suffices.
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      remedy = "check the name and the connection, or give a local folder"
      raise (HostError if _is_passing(error) else UserError)(
        f"model {name} is not a local folder and cannot be fetched from the "
        f"hub: {reason.rstrip('.')}; {_nearest(folder) or remedy}"
      ) from error
    folder = pathlib.Path(path)
    if any(folder.glob("*.safetensors")):
      break
  return folder


def _is_passing(error: Exception) -> bool:
  """Whether the same download may succeed in a while."""
  from huggingface_hub import constants, errors

  # Most failures come as "not in the cache either".
  absent = isinstance(error, errors.LocalEntryNotFoundError)
  answer = getattr(error.__cause__ if absent else error, "response", None)
  if answer is None:  # the hub was not reached, or not asked
    return absent and not constants.HF_HUB_OFFLINE
  # Too many requests; a failure of the hub's own.
  return answer.status_code == 429 or answer.status_code >= 500


@functools.cache  # one copy a process, gone at its end
def _stand_in(name: str) -> tempfile.TemporaryDirectory:
  """A folder of this machine with the small files of one on an object store."""
  place = paths.remote(name, "model folder")
  if not place.is_dir():
    raise UserError(f"model folder {name} does not exist; check the path")
  folder = tempfile.TemporaryDirectory(prefix=f"{place.name}-")
  for file in place.iterdir():
    if any(fnmatch.fnmatch(file.name, pattern) for pattern in CONFIGS):
      (pathlib.Path(folder.name) / file.name).write_bytes(file.read_bytes())
  (pathlib.Path(folder.name) / paths.MARK).write_text(str(place))
  return folder


def _nearest(folder: pathlib.Path) -> str:
  """Suggests the existing folder with the nearest name, or ""."""
  try:
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
  except OSError:
    return ""
  near = difflib.get_close_matches(folder.name, names, 1)
  return f"did you mean {folder.with_name(near[0])}?" if near else ""
