"""What a run ran on: versions and devices, for the report."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

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


def describe() -> dict[str, Any]:
  """Versions, devices and host, as JSON; starts JAX's backend.

  No user names, paths or addresses: the report is made to be shown around.
  """
  devices = jax.devices()
  return {
    "python": platform.python_version(),
    "packages": _versions(),
    "backend": jax.default_backend(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "cpu_cores": os.cpu_count(),
    "system": f"{platform.system()} {platform.machine()}",
  }


def _versions() -> dict[str, str]:
  installed = {
    d.metadata["Name"]: d for d in importlib.metadata.distributions()
  }
  return {n: installed[n].version for n in _PACKAGES if n in installed}


def write(folder: pathlib.Path) -> None:
  """Writes `environment.json` into a run's folder."""
  files.write_json(folder / NAME, describe())
