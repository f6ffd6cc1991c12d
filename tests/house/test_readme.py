"""The commands that the README and the docs show exist and parse."""

import importlib
import re
import shlex
import tomllib

import pytest

from jaxalign import cli, main
from jaxalign.algorithms import read_config

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands(root) -> list[tuple[str, list[str]]]:
  """(page, words) of every command shown, environment variables left out."""
  found = []
  pages = [root / "README.md", root / "CONTRIBUTING.md"]
  for page in pages + sorted((root / "docs").glob("*.md")):
    for block in BLOCK.findall(page.read_text()):
      for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
          words.pop(0)
        if words:
          found.append((f"{page.name}: {line.strip()}", words))
  return found


def test_the_first_screen_is_there(root):
  top = "\n".join((root / "README.md").read_text().splitlines()[:40])
  assert "pip install -e ." in top
  assert "python -m jaxalign.main --config configs/superhf.py" in top


def test_modules_exist(root):
  for line, words in commands(root):
    if words[:2] == ["python", "-m"]:
      module = importlib.import_module(words[2])
      if hasattr(module, "__path__"):  # a package, which its __main__ starts
        module = importlib.import_module(f"{words[2]}.__main__")
      assert callable(module.main), line


def test_training_commands_are_valid(root, monkeypatch):
  monkeypatch.chdir(root)
  seen = 0
  for line, words in commands(root):
    if words[:3] == ["python", "-m", "jaxalign.main"]:
      args = main.make_parser().parse(words[3:])
      mapping, _ = cli.load_config(args.config)
      assert read_config(mapping, args.fields), line
      seen += 1
  assert seen >= 3


def test_extras_exist(root):
  project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  for line, words in commands(root):
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
      assert extra in project["optional-dependencies"], line


def test_scripts_exist(root):
  for line, words in commands(root):
    script = words[1] if words[0] == "python" else words[0]
    if script.endswith(".py") or script.startswith("."):
      assert (root / script).is_file(), line


def test_links_exist(root):
  for page in ("README.md", "CONTRIBUTING.md"):
    for target in re.findall(r"\]\(([^)]+)\)", (root / page).read_text()):
      if not target.startswith("http"):
        assert (root / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(
  "name", ["load", "logits", "generate", "score", "save", "read_run", "train"]
)
def test_the_functions(name):
  package = importlib.import_module("jaxalign")
  assert callable(getattr(package, name))
