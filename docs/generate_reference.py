"""Writes docs/configuration_reference.md from the config classes.

Run it after a change of `jaxalign.config`; a house test compares the page.

    python docs/generate_reference.py
"""

import pathlib

from jaxalign import config as configs

PAGE = pathlib.Path(__file__).parent / "configuration_reference.md"

HEAD = """# Configuration reference

Written by `docs/generate_reference.py` from the dataclasses in
`jaxalign.config`; do not edit. How configs work is told in
[Configuration](configuration.md). A name in parentheses behind a meaning is
where the default comes from.
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
    doc = row.doc.replace("|", "\\|")
    name = row.path.removeprefix("config.")
    lines.append(f"| `{name}` | {row.type} | {shown} | {rule} | {doc} |")
  return "\n".join(lines)


def page() -> str:
  """The whole page: the common fields once, then each algorithm's own."""
  common = configs.describe(configs.TrainingConfig)
  common = [row for row in common if row.path != "config.algorithm"]
  parts = [HEAD, "## Every training run\n", table(common)]
  for name, cls in configs.CONFIGS.items():
    own = [row for row in configs.describe(cls) if row not in common]
    own = [row for row in own if row.path != "config.algorithm"]
    first = (cls.__doc__ or "").splitlines()[0]
    parts += [f"\n## algorithm = `{name}`\n", f"{first}\n", table(own)]
  return "\n".join(parts) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page())
