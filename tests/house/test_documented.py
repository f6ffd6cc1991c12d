"""What is public says what it does and which shapes it takes."""

import ast


def public(body: list[ast.stmt]) -> list[ast.stmt]:
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  return [n for n in body if isinstance(n, kinds) and n.name[0] != "_"]


def test_every_module_names_its_subject(sources):
  bare = [s.name for s in sources if not ast.get_docstring(s.tree)]
  assert not bare


def test_public_names_have_docstrings(sources):
  """Functions and classes; ruff's D102 looks after the methods."""
  bare = [
    f"{s.name}:{node.lineno} {node.name}"
    for s in sources
    for node in public(s.tree.body)
    if not ast.get_docstring(node)
  ]
  assert not bare


def test_public_functions_are_annotated(sources):
  """Without annotations the shape checks of the test run see nothing."""
  bare = []
  for s in sources:
    for f in public(s.tree.body):
      if isinstance(f, ast.ClassDef):
        continue
      a = f.args
      given = [*a.posonlyargs, *a.args, *a.kwonlyargs]
      if f.returns is None or any(x.annotation is None for x in given):
        bare.append(f"{s.name}:{f.lineno} {f.name}")
  assert not bare
