"""The one command: flags -> config -> devices -> algorithm.

  python -m jaxalign.main --config FILE.py[:PRESET] [--config.FIELD=VALUE ...]
    [--workdir DIR] [--profile_steps A:B]

The flags are read here and typed by the config's own dataclasses, so that a
flag, a config file and a stored config.json get the same checks and the same
messages. jax is imported only once the config is valid.
"""

import difflib
import importlib.machinery
import inspect
import operator
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign import config as config_lib
from jaxalign.errors import UserError, exit_status

USAGE = """\
usage: python -m jaxalign.main --config FILE.py[:PRESET]
         [--config.FIELD=VALUE ...] [--workdir DIR] [--profile_steps A:B]

  --config         a config file and one of its presets, say
                   configs/superhf.py:pythia-1b
  --config.FIELD   changes one field, say --config.optimizer.learning_rate=3e-5;
                   lists are written with commas: --config.lora.targets=q_proj
  --workdir        folder of the run; default runs/<config>-<preset>. Running
                   the same command again goes on with the run.
  --profile_steps  A:B traces steps A to B-1 with jax.profiler
  --help           this text; behind --config also all fields of that config
"""
FLAGS = ("config", "workdir", "profile_steps", "help")


class Flags(NamedTuple):
  """A command line taken apart."""

  config: str  # "configs/superhf.py:pythia-1b"; "" where it is missing
  workdir: str  # "" = the default
  fields: tuple[tuple[str, str], ...]  # (path below config, text), in order
  help: bool


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status: 2 is a mistake in the input."""
  return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
  flags = parse_flags(argv)
  if flags.help:
    print(help_text(flags))
    return 0
  mapping, workdir = load_config(flags.config)
  config = config_lib.from_mapping(mapping, flags.fields)
  # Imported late: jax takes seconds to start, a mistyped flag should not.
  from jaxalign.build.runs import run

  return run(config, pathlib.Path(flags.workdir or workdir))


def parse_flags(argv: Sequence[str]) -> Flags:
  """Takes a command line apart: `--name=value` or `--name value`.

  Raises:
    UserError: an argument that is no flag, an unknown flag, a missing value.
  """
  values, fields, rest = {}, [], list(argv)
  while rest:
    word = rest.pop(0)
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("--") or not name:
      raise UserError(
        f"unexpected argument {word!r}; flags are written --name=value, "
        "see --help"
      )
    if name not in FLAGS and not name.startswith("config."):
      raise UserError(unknown_flag(name))
    if name == "help":
      values["help"] = "yes"
      continue
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name} lacks its value; write --{name}=VALUE")
      value = rest.pop(0)
    if name.startswith("config."):
      fields.append((name.removeprefix("config."), value))
    elif name == "profile_steps":
      fields.append((name, value))
    else:
      values[name] = value
  return Flags(
    config=values.get("config", ""),
    workdir=values.get("workdir", ""),
    fields=tuple(fields),
    help="help" in values,
  )


def unknown_flag(name: str) -> str:
  """The message for a flag that there is not."""
  known = ["workdir", "profile_steps", "help", "config"]
  near = difflib.get_close_matches(name, known, 1)
  if near:
    return f"unknown flag --{name}; did you mean --{near[0]}?"
  return (
    f"unknown flag --{name}; fields of the config are written --config.{name}, "
    "see --help"
  )


def load_config(flag: str) -> tuple[Any, str]:
  """Runs `get_config` of `FILE.py[:PRESET]`.

  Returns:
    The mapping that it gave, and the default workdir.

  Raises:
    UserError: no such file, a mistake in it, or no such preset.
  """
  found = re.fullmatch(r"(.+?\.py)(?::(.*))?", flag)
  if not found:
    raise UserError(
      f"--config must be FILE.py or FILE.py:PRESET, got {flag!r}; "
      "try --config configs/superhf.py"
    )
  path = pathlib.Path(found[1])
  get_config = find_get_config(path)
  takes = list(inspect.signature(get_config).parameters.values())
  preset = found[2]
  if preset is not None and not takes:
    raise UserError(
      f"{path} has no presets, got {preset!r}; leave :{preset} off"
    )
  args = [] if preset is None else [preset]
  mapping = in_file(path, lambda: get_config(*args))
  if preset is None and takes and isinstance(takes[0].default, str):
    preset = takes[0].default
  name = path.stem if preset is None else f"{path.stem}-{preset}"
  return mapping, "runs/" + re.sub(r"[^\w.-]", "_", name)


def find_get_config(path: pathlib.Path) -> Any:
  """The function `get_config` of a Python file."""
  if not path.is_file():
    others = [str(p) for p in sorted(path.parent.glob("*.py"))]
    near = difflib.get_close_matches(str(path), others, 1) or others[:1]
    hint = f"did you mean {near[0]}?" if near else "check the path"
    raise UserError(f"config file {path} does not exist; {hint}")
  loader = importlib.machinery.SourceFileLoader("config_file", str(path))
  module = types.ModuleType(loader.name)
  module.__file__ = str(path)
  in_file(path, lambda: loader.exec_module(module))
  if not hasattr(module, "get_config"):
    raise UserError(
      f"{path} has no function get_config; it must return a ConfigDict"
    )
  return module.get_config


def in_file(path: pathlib.Path, call: Any) -> Any:
  """Calls into a config file; its mistakes are the user's, told in one line."""
  try:
    return call()
  except UserError:
    raise
  except Exception as error:
    inside = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == str(path.absolute()) or frame.filename == str(path)
    ]
    line = getattr(error, "lineno", None) or (inside or [0])[-1]
    remedy = "mend the config file"
    if isinstance(error, ModuleNotFoundError):
      remedy += f", or install {error.name}; pip install -e . has all of ours"
    raise UserError(
      f"{path} line {line}: {type(error).__name__}: {error}; {remedy}"
    ) from error


def help_text(flags: Flags) -> str:
  """The usage, and the fields of the config that was named."""
  if not flags.config:
    return USAGE
  mapping, _ = load_config(flags.config)
  config = config_lib.from_mapping(mapping, flags.fields)
  lines = []
  for row in config_lib.describe(type(config)):
    value = operator.attrgetter(row.path.removeprefix("config."))(config)
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    lines.append(f"  --{row.path}={shown}\n      {row.doc}")
    if row.rule:
      lines.append(f"      allowed: {row.rule}")
  return "\n".join([USAGE, f"fields of {flags.config}:", *lines])


if __name__ == "__main__":
  sys.exit(main())
