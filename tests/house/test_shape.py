"""No bare except, nothing left for later, small files."""

import ast
import subprocess

MEBIBYTE = 2**20


def test_no_bare_except(sources):
  for s in sources:
    for node in ast.walk(s.tree):
      if isinstance(node, ast.ExceptHandler):
        assert node.type is not None, f"{s.name}:{node.lineno}"


def test_nothing_is_left_for_later(root):
  words = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"]
  found = []
  for folder in ("jaxalign", "configs", "tests"):
    for path in sorted((root / folder).rglob("*.py")):
      text = path.read_text()
      found += [f"{path.relative_to(root)}: {w}" for w in words if w in text]
  assert not found


def test_the_lab_is_small(root):
  files = [p for p in (root / "jaxalign" / "lab").rglob("*") if p.is_file()]
  total = sum(path.stat().st_size for path in files)
  assert total <= 16 * MEBIBYTE, f"{total / MEBIBYTE:.1f} MiB in jaxalign/lab"


def test_no_tracked_file_is_large(root):
  if not (root / ".git").exists():  # an unpacked archive: everything counts
    names = [p for p in root.rglob("*") if p.is_file()]
  else:
    command = ["git", "ls-files", "-z"]
    out = subprocess.run(command, cwd=root, check=True, capture_output=True)
    names = [root / name for name in out.stdout.decode().split("\0") if name]
  sizes = {p.name: p.stat().st_size for p in names if p.is_file()}
  large = {name: size for name, size in sizes.items() if size > 8 * MEBIBYTE}
  assert not large
