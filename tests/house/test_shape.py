"""Files and functions stay short, classes and `try` few (CONTRIBUTING.md)."""

import ast
import statistics
import subprocess

MEBIBYTE = 2**20

# Functions that may pass 60 lines, each with its reason. At most five.
LONG_FUNCTIONS = {
  "jaxalign/sampling/decode.py:sample": "its docstring is half of it",
  "jaxalign/sampling/settings.py:make": "one line a setting, thrice",
}


def test_files_have_one_subject(sources):
  long = {s.name: s.lines for s in sources if s.lines >= 500}
  assert not long, f"split these: {long}"


def test_most_files_are_short(sources):
  lengths = [s.lines for s in sources if not s.name.endswith("__init__.py")]
  assert statistics.median(lengths) <= 200
  assert sorted(lengths)[int(len(lengths) * 0.9)] <= 400


def test_functions_fit_on_a_screen(sources):
  long = {
    f"{s.name}:{f.name}": f.end_lineno - f.lineno
    for s in sources
    for f in s.functions()
    if f.end_lineno - f.lineno > 60
  }
  assert len(LONG_FUNCTIONS) <= 5
  assert set(long) == set(LONG_FUNCTIONS), long


def test_functions_outnumber_classes(sources):
  top = [node for s in sources for node in s.tree.body]
  classes = sum(isinstance(node, ast.ClassDef) for node in top)
  functions = sum(isinstance(node, ast.FunctionDef) for node in top)
  assert classes <= 0.5 * functions, f"{classes} classes, {functions} functions"


def test_few_try(sources):
  kinds = (ast.Try, ast.TryStar)
  places = [
    f"{s.name}:{node.lineno}"
    for s in sources
    for node in ast.walk(s.tree)
    if isinstance(node, kinds)
  ]
  assert len(places) <= 25, places


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
