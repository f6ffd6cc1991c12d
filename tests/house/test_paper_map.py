"""The lines that docs/superhf.md quotes stand in the code."""

import re


def quoted(page: str) -> list[str]:
  """The code in the second column of the tables of "Paper to code"."""
  part = page.partition("## Paper to code")[2].partition("\n## ")[0]
  cells = [line.split(" | ") for line in part.splitlines()]
  return [
    code
    for row in cells
    if len(row) == 3
    for code in re.findall(r"`([^`]+)`", row[1])
  ]


def test_the_paper_map_quotes_the_code(root):
  lines = quoted((root / "docs" / "superhf.md").read_text())
  files = ("algorithms/superhf/train.py", "training/rollout.py")
  code = "".join((root / "jaxalign" / name).read_text() for name in files)
  assert len(lines) >= 14
  missing = [line for line in lines if line not in code]
  assert not missing, f"fix the table in docs/superhf.md: {missing}"
