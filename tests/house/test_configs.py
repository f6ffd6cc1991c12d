"""Every config file, preset and method has a config that is valid."""

import ast
import dataclasses
import subprocess
import sys

import pytest

from jaxalign import cli, config
from jaxalign.algorithms import METHODS, config_class, read_config


def presets(path) -> list[str | None]:
  """The presets a file lists, and None for its default."""
  return [None, *getattr(cli.load_config_file(path), "PRESETS", {})]


def test_every_preset_is_valid(root, monkeypatch):
  monkeypatch.chdir(root)
  for path in cli.config_files(root / "configs"):
    for preset in presets(path):
      flag = str(path) if preset is None else f"{path}:{preset}"
      mapping, workdir = cli.load_config(flag)
      found = read_config(mapping)
      assert read_config(config.to_mapping(found)) == found, flag
      assert workdir.startswith("runs/"), flag


def test_every_file_tells_its_command(root):
  for path in cli.config_files(root / "configs"):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    name = path.relative_to(root).as_posix()
    assert f"--config {name}" in text, f"{name}: no command in its docstring"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_folder_and_a_line_of_the_table(name, root):
  folder = root / METHODS[name].replace(".", "/")
  assert (folder / "__init__.py").is_file()
  assert (folder / "config.py").is_file()
  cls = config_class(name)
  assert cls.__module__ == f"{METHODS[name]}.config"
  (field,) = [f for f in dataclasses.fields(cls) if f.name == "algorithm"]
  assert (field.default, field.metadata["choices"]) == (name, (name,))


def test_every_folder_with_a_config_is_a_method(root):
  found = {
    ".".join(path.relative_to(root).parent.parts)
    for path in (root / "jaxalign" / "algorithms").rglob("config.py")
  }
  assert found == set(METHODS.values())


def test_reading_a_config_imports_no_jax(root):
  code = (
    "import sys\n"
    "from jaxalign.algorithms import METHODS, read_config\n"
    "for name in METHODS: read_config({'algorithm': name})\n"
    "sys.exit('jax' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
