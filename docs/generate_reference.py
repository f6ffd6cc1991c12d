"""Writes docs/configuration_reference.md from the config classes.

Run it after a change of a config class; a house test compares the page.

    python docs/generate_reference.py
"""

import pathlib

from jaxalign import config as configs
from jaxalign.algorithms import METHODS, config_class

PAGE = pathlib.Path(__file__).parent / "configuration_reference.md"

HEAD = """# Configuration reference

Written by `docs/generate_reference.py` from the config dataclasses in
`jaxalign/config/` and `jaxalign/algorithms/`; do not edit.
[Configuration](configuration.md) explains how configs work. In parentheses
after a meaning: where the default comes from, and what the field was called
before.
"""


def table(rows: list[configs.Row]) -> str:
  """Rows as a Markdown table."""
  lines = ["| field | type | default | allowed | meaning |", "|" + "---|" * 5]
  for row in rows:
    default = row.default
    if isinstance(default, tuple):
      default = ",".join(map(str, default))
    shown = f"`{default}`" if str(default) else "empty"
    rule = row.rule.replace(" | ", ", ") or "any"
    source = f"({row.source})" if row.source else ""
    words = (row.doc, source, row.also)
    doc = " ".join(word for word in words if word).replace("|", "\\|")
    name = row.path.removeprefix("config.")
    lines.append(f"| `{name}` | {row.type} | {shown} | {rule} | {doc} |")
  return "\n".join(lines)


def page() -> str:
  """The whole page: the common fields once, then each method's own."""
  common = configs.describe(configs.TrainingConfig)
  common = [row for row in common if row.path != "config.algorithm"]
  parts = [HEAD, "## Every training run\n", table(common)]
  for name in METHODS:
    cls = config_class(name)
    own = [row for row in configs.describe(cls) if row not in common]
    own = [row for row in own if row.path != "config.algorithm"]
    first = (cls.__doc__ or "").splitlines()[0]
    parts += [f"\n## algorithm = `{name}`\n", f"{first}\n", table(own)]
  return "\n".join(parts) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page())
