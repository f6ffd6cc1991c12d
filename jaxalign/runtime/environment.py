"""The command and the machine of a run, for the report."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import jax

from jaxalign.runtime import files

NAME = "environment.json"
_PACKAGES = (
  "jaxalign",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "transformers",
)


def write(folder: pathlib.Path) -> None:
  """Writes `environment.json` into a run's folder; starts JAX's backend.

  No user names and addresses, because reports get published; paths only as
  they stand in the command and in the config. So `--coordinator` is left out
  of the command.
  """
  devices = jax.devices()
  installed = {
    d.metadata["Name"]: d for d in importlib.metadata.distributions()
  }
  # A run that is continued keeps the date of its first start.
  started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  if (folder / NAME).exists():
    with contextlib.suppress(ValueError, AttributeError):  # a damaged file
      old = json.loads((folder / NAME).read_text(encoding="utf-8"))
      started = old.get("started_at", "")
  description = {
    "command": _command(),
    "started_at": started,
    "python": platform.python_version(),
    "packages": {
      name: installed[name].version for name in _PACKAGES if name in installed
    },
    "backend": jax.default_backend(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "cpu_cores": os.cpu_count(),
    "system": f"{platform.system()} {platform.machine()}",
  }
  files.write_json(folder / NAME, description)


def _command() -> str:
  """The command of this process, "" in a notebook or another program."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  if spec is None or not spec.name.startswith("jaxalign."):
    return ""
  words, left = [], list(sys.argv[1:])
  while left:
    word = left.pop(0)
    if word == "--coordinator":
      del left[:1]  # its value is the next word
    elif not word.startswith("--coordinator="):
      words.append(word)
  return shlex.join(["python", "-m", spec.name, *words])
