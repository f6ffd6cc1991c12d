"""Rooms keep to their layers, and importing has no side effects."""

import json
import os
import subprocess
import sys

import pytest

# Runs in a process of its own: the test process has imported everything. The
# sockets are shut first, so that an import that calls home raises.
PROBE = """
import importlib, json, pkgutil, socket, sys

def refuse(*args, **kwargs):
  raise OSError("an import used the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse

import jaxalign

names = ["jaxalign"]
if sys.argv[1] == "all":
  found = pkgutil.walk_packages(jaxalign.__path__, "jaxalign.")
  names += sorted(m.name for m in found if not m.name.endswith("__main__"))
for name in names:
  importlib.import_module(name)

bridge = sys.modules.get("jax._src.xla_bridge")
heavy = ("torch", "transformers", "datasets", "orbax", "jax", "flax")
print(json.dumps({
  "names": names,
  "backends": sorted(bridge._backends) if bridge else [],
  "heavy": [name for name in heavy if name in sys.modules],
}))
"""


def probe(which: str) -> dict:
  out = subprocess.run(
    [sys.executable, "-c", PROBE, which],
    capture_output=True,
    text=True,
    env=os.environ | {"HF_HUB_OFFLINE": "1"},
  )
  assert out.returncode == 0, out.stderr
  return json.loads(out.stdout.splitlines()[-1])


def test_importing_the_package_costs_nothing():
  seen = probe("package")
  assert seen["backends"] == []
  assert seen["heavy"] == []


@pytest.fixture(scope="module")
def everything() -> dict:
  return probe("all")


def test_the_probe_sees_every_file(everything, sources):
  files = {
    s.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for s in sources
    if not s.name.endswith("__main__.py")
  }
  assert files <= set(everything["names"])


def test_no_module_starts_a_backend(everything):
  assert everything["backends"] == []


def test_no_module_imports_torch(everything):
  assert "torch" not in everything["heavy"]


def test_layers(root):
  """The contracts of pyproject.toml, as `lint-imports` reads them."""
  out = subprocess.run(
    [
      sys.executable,
      "-c",
      "from importlinter.cli import lint_imports_command as main; main()",
      "--no-cache",
    ],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert out.returncode == 0, out.stdout + out.stderr
  assert "0 broken" in out.stdout
