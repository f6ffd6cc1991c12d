"""From what a user names to a folder on disk."""

import os
import pathlib
import re

from jaxalign.errors import UserError, explained

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
_SAFETENSORS = ("model*.safetensors", "adapter_model.safetensors")
_BINARIES = ("pytorch_model*.bin",)


def resolve(source: str | pathlib.Path) -> pathlib.Path:
  """The folder of a model, downloaded if a hub id names it.

  Args:
    source: an existing folder, a path (it begins with `.`, `/` or `~`), or a
      hub id such as "EleutherAI/pythia-70m", with "@revision" if need be.

  Returns:
    The folder. Only an id asks the network, and what was downloaded before
    is found without it.

  Raises:
    UserError: the folder does not exist, or the hub does not give it.
  """
  name = str(source)
  folder = pathlib.Path(name).expanduser()
  if name and (folder.exists() or name.startswith((".", "/", "~"))):
    if not folder.is_dir():
      state = "is a file" if folder.exists() else "does not exist"
      raise UserError(f"model folder {name} {state}; check the path")
    if not os.access(folder, os.R_OK | os.X_OK):
      raise UserError(
        f"model folder {name} cannot be read: permission denied; ask its owner "
        "or copy it"
      )
    return folder
  if not _ID.fullmatch(name):
    raise UserError(
      f"{name!r} is neither an existing folder nor a hub id such as "
      "EleutherAI/pythia-70m"
    )
  return _download(name)


def _download(name: str) -> pathlib.Path:
  import huggingface_hub  # slow to import, and most runs need no hub

  repository, _, revision = name.partition("@")

  def fetch(patterns: tuple[str, ...]) -> pathlib.Path:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repository, revision=revision or None, allow_patterns=list(patterns)
      )
    )

  failed = lambda why: (
    f"model {name} is no folder here and cannot be fetched from the hub: "
    f"{why}; check the name and the connection, or give a local folder"
  )
  with explained(OSError, ValueError, by=failed):
    folder = fetch(_CONFIGS + _SAFETENSORS)
    if not any(folder.glob("*.safetensors")):
      # Many repositories hold both; the binary one is fetched only if alone.
      folder = fetch(_CONFIGS + _BINARIES)
  return folder
