"""Writes docs/configuration_reference.md from the config classes.

Run it after a change of a config class; a house test compares the page.

    python docs/generate_reference.py
"""

import inspect
import itertools
import pathlib
import typing

from jaxalign import config as configs
from jaxalign.algorithms import METHODS, config_class
from jaxalign.algorithms.dpo.config import PairLossConfig
from jaxalign.config.rules import Section
from jaxalign.config.supervised import ReferenceConfig

PAGE = pathlib.Path(__file__).parent / "configuration_reference.md"

# What several methods share, each after what it builds on.
COMMON = {
  configs.TrainingConfig: "Every training run",
  configs.SupervisedConfig: "Methods that learn from a data set",
  configs.OnlineConfig: "Methods that sample",
  ReferenceConfig: "Methods with log-ratios to a reference",
  configs.PreferenceConfig: "Stored preferences and labels",
  PairLossConfig: "Losses of a pair",
}

HEAD = """# Configuration reference

Every field with its default, its meaning, and what it may be. A field is set by
`--config.` and its name: `--config.optimizer.learning_rate=1e-4`. What methods
share comes first; a method's own part links to the shared ones, and repeats a
field only where its default or meaning is another. In brackets after a meaning:
where the default comes from, and what the field was called before.

Written by `docs/generate_reference.py` from the config dataclasses in
`jaxalign/config/` and `jaxalign/algorithms/`; do not edit.
[Configuration](configuration.md) explains how configs work.
"""


def allowed(row: configs.Row) -> str:
  """What a field may be, in words: "int >= 1", "one of kto, dpo"."""
  if " | " in row.rule:
    return "one of " + row.rule.replace(" | ", ", ")
  kinds = {
    "str": "text",
    "bool": "True or False",
    "tuple[str, ...]": "texts with commas",
    "tuple[int, ...]": "ints with commas, each",
    "tuple[float, ...]": "floats with commas, each in",
  }
  return f"{kinds.get(row.type, row.type)} {row.rule}".strip()


def table(rows: list[configs.Row]) -> str:
  """Rows as a Markdown table of two columns."""
  lines = ["| field = default | meaning; what it may be |", "|---|---|"]
  for row in rows:
    default = row.default
    # With spaces, so that a long list may break over lines.
    if isinstance(default, tuple):
      default = ", ".join(map(str, default))
    shown = f"`{default}`" if str(default) else "empty"
    source = f"({row.source})" if row.source else ""
    words = (row.doc, source, row.also)
    doc = " ".join(word for word in words if word).replace("|", "\\|")
    name = row.path.removeprefix("config.")
    lines.append(f"| `{name}` = {shown} | {doc}; *{allowed(row)}* |")
  return "\n".join(lines)


def section_of(row: configs.Row) -> str:
  """The section of a field: "optimizer", "" of one that is in none."""
  section, dot, _ = row.path.removeprefix("config.").partition(".")
  return section if dot else ""


def fields(cls: type[Section], rows: list[configs.Row]) -> str:
  """Tables of a class's own fields, then of each of its sections."""
  parts = []
  ordered = sorted(rows, key=section_of)
  for section, group in itertools.groupby(ordered, key=section_of):
    if section:
      kind = typing.get_type_hints(cls)[section]
      parts.append(f"### {section}\n\n{first_paragraph(kind)}\n")
    parts.append(table(list(group)) + "\n")
  return "\n".join(parts)


def first_paragraph(cls: type) -> str:
  """Of a docstring, on one line."""
  return " ".join(inspect.getdoc(cls).split("\n\n")[0].split())


def page() -> str:
  """The whole page: the common fields once, then each method's own."""
  parts = [HEAD]
  own = {name: config_class(name) for name in METHODS}
  done: dict[type[Section], list[configs.Row]] = {}
  for cls, title in COMMON.items():
    users = [name for name, kind in own.items() if issubclass(kind, cls)]
    parts += [f"## {title}\n", f"{first_paragraph(cls)}\n"]
    if len(users) < len(own):
      parts.append(f"Of {', '.join(f'`{name}`' for name in users)}.\n")
    parts.append(fields(cls, _new(cls, done)))
    done[cls] = configs.describe(cls)
  for name, cls in own.items():
    shared = [title for kind, title in COMMON.items() if issubclass(cls, kind)]
    links = [f"[{x}](#{x.lower().replace(' ', '-')})" for x in shared]
    parts += [
      f"## algorithm = `{name}`\n",
      f"{first_paragraph(cls)}\n",
      f"And: {', '.join(links)}.\n",
      fields(cls, _new(cls, done)) or "No field of its own.\n",
    ]
  return "\n".join(parts)


def _new(
  cls: type[Section], done: dict[type[Section], list[configs.Row]]
) -> list[configs.Row]:
  """A class's rows that differ from those of the classes it builds on."""
  known = [
    r for base, rows in done.items() if issubclass(cls, base) for r in rows
  ]
  return [
    row
    for row in configs.describe(cls)
    if row not in known and row.path != "config.algorithm"
  ]


if __name__ == "__main__":
  PAGE.write_text(page())
