"""The machine of a run: versions and devices, for the report."""

import importlib.metadata
import os
import pathlib
import platform

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

  No user names, paths or addresses: reports get published.
  """
  devices = jax.devices()
  installed = {
    d.metadata["Name"]: d for d in importlib.metadata.distributions()
  }
  description = {
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
