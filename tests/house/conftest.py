"""What the house tests look at: the tree itself."""

import ast
import dataclasses
import pathlib

import pytest


@dataclasses.dataclass(frozen=True)
class Source:
  """One Python file of the package."""

  name: str  # path below the repository's root, with /
  text: str
  tree: ast.Module


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The repository's root."""
  return pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sources(root) -> list[Source]:
  """Every Python file below jaxalign/."""
  found = []
  for path in sorted((root / "jaxalign").rglob("*.py")):
    text = path.read_text()
    name = path.relative_to(root).as_posix()
    found.append(Source(name, text, ast.parse(text)))
  return found
