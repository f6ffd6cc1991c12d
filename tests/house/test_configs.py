"""Every config file and every preset of it is valid."""

import ast

from jaxalign import config, main


def config_files(root):
  """Python files below configs/ that have a function get_config."""
  for path in sorted((root / "configs").rglob("*.py")):
    names = [getattr(x, "name", "") for x in ast.parse(path.read_text()).body]
    if "get_config" in names:
      yield path


def presets(path) -> list[str | None]:
  """The presets a file lists, and None for its default."""
  listed = main.find_get_config(path).__globals__.get("PRESETS", {})
  return [None, *listed]


def test_every_preset_is_valid(root, monkeypatch):
  monkeypatch.chdir(root)
  for path in config_files(root):
    for preset in presets(path):
      flag = str(path) if preset is None else f"{path}:{preset}"
      mapping, workdir = main.load_config(flag)
      found = config.from_mapping(mapping)
      assert config.from_mapping(config.to_mapping(found)) == found, flag
      assert workdir.startswith("runs/"), flag


def test_every_file_tells_its_command(root):
  for path in config_files(root):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    name = path.relative_to(root).as_posix()
    assert f"--config {name}" in text, f"{name}: no command in its docstring"
