"""Every metric an algorithm reports has its unit in docs/metrics.md."""

import ast
import re

NAME = re.compile(r"[a-z_]+/[a-z_0-9]+")


def keys(tree: ast.Module) -> set[str]:
  """Text that is used as a dict's key, whether written or assigned."""
  found = set()
  for node in ast.walk(tree):
    nodes = node.keys if isinstance(node, ast.Dict) else []
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
      nodes = [node.slice]
    for key in nodes:
      if isinstance(key, ast.Constant) and isinstance(key.value, str):
        found.add(key.value)
  return {name for name in found if NAME.fullmatch(name)}


def test_metrics_are_documented(root, sources):
  page = (root / "docs" / "metrics.md").read_text()
  rooms = (
    "jaxalign/algorithms/",
    "jaxalign/evals/",
    "jaxalign/training/rollout",
    "jaxalign/report/overoptimization",
  )
  used = {n for s in sources if s.name.startswith(rooms) for n in keys(s.tree)}
  assert "score/mean" in used
  missing = sorted(n for n in used if f"`{n}`" not in page)
  assert not missing, f"give these a line in docs/metrics.md: {missing}"
