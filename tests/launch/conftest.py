"""Runs the launch files with other programs in the place of the real ones."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Machine:
  """A folder for the launch files, with programs that only note their calls."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.log = folder / "log"
    (folder / "bin").mkdir()
    shutil.copytree(ROOT / "launch", folder / "launch")

  def program(self, name: str, body: str) -> pathlib.Path:
    """Puts a bash program on the path."""
    path = self.folder / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path

  def run(self, file: str, *flags: str, **environment: str):
    """Runs launch/FILE; its status, output and errors."""
    keep = ("HOME", "TMPDIR", "LANG")
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
      ["bash", f"launch/{file}", *flags],
      cwd=self.folder,
      env={k: os.environ[k] for k in keep if k in os.environ}
      | {"PATH": path, "LOG": str(self.log)}
      | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )

  @property
  def calls(self) -> list[str]:
    """The lines that programs noted, sorted: processes run side by side."""
    return sorted(self.log.read_text().splitlines())


@pytest.fixture
def machine(tmp_path) -> Machine:
  return Machine(tmp_path)
