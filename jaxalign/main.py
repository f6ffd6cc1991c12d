"""Trains what a config file describes.

  python -m jaxalign.main --config configs/superhf.py:pythia-1b
    --config.optimizer.learning_rate=3e-5

Running the same command again continues the run.
"""

import json
import operator
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from jaxalign import cli
from jaxalign.algorithms import dry_run, preset_of, read_config, run
from jaxalign.config import Row, TrainingConfig, describe, to_mapping
from jaxalign.config.changes import suffix
from jaxalign.config.hints import all_paths, what_was_meant
from jaxalign.errors import UserError
from jaxalign.parallel import cpu
from jaxalign.parallel.cluster import find_cluster


@cli.command
def main(argv: Sequence[str]) -> int:
  """Flags -> config -> run.

  Returns:
    The exit status; 2 = a mistake in the flags, the config, or what it names.
  """
  parser = make_parser()
  try:
    args = parser.parse(argv)
  except cli.UnknownFlagError as error:
    raise meant_field(error) from error
  if args.help and not args.config:
    parser.print_help()
    return 0
  mapping, workdir = cli.load_config(args.config)
  fields = args.fields
  if args.profile_steps is not None:
    fields = [*fields, ("profile_steps", args.profile_steps)]
  if args.init_from is not None:
    fields = [*fields, ("init_from", args.init_from)]
  if args.init_optimizer:
    fields = [*fields, ("init_optimizer", "true")]
  # The config's dataclasses type and check fields from flags, from a config
  # file and from a stored config.json in the same way.
  config = read_config(mapping, fields)
  if args.help:
    parser.print_help()
    print(f"\n{preset_help(args.config)}")
    print(f"fields of {args.config}:\n{field_help(config)}")
    return 0
  if args.print_config:
    print(json.dumps(to_mapping(config), indent=2))
    return 0
  if not args.workdir:
    workdir += suffix(config, preset_of(mapping, config), extend=args.extend)
  folder = pathlib.Path(args.workdir or workdir)
  cluster = find_cluster(args.coordinator, args.num_processes, args.process_id)
  if args.dry_run:
    return dry_run(
      config,
      folder,
      extend=args.extend,
      fresh=args.fresh,
      quiet=args.quiet,
    )
  if not cli.has_accelerator():
    cpu.keep_freed_memory()
  return run(
    config,
    folder,
    extend=args.extend,
    fresh=args.fresh,
    quiet=args.quiet,
    cluster=cluster,
  )


def make_parser() -> cli.Parser:
  """The command's flags."""
  parser = cli.Parser("jaxalign.main", __doc__, config=True)
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="folder of the run; default runs/<config>-<preset>, followed by what "
    "the command line changes, as in runs/sft-lab-lr3e-05-seed2",
  )
  parser.add_argument(
    "--extend",
    action="store_true",
    help="trains the run that is there up to a higher --config.steps or "
    "--config.epochs",
  )
  parser.add_argument(
    "--fresh",
    action="store_true",
    help="begins again; moves the run that is there to DIR.1, deletes nothing",
  )
  parser.add_argument(
    "--init_from",
    metavar="RUN",
    help="begins with the weights of another run, or of one of its "
    "checkpoints, in place of config.policy",
  )
  parser.add_argument(
    "--init_optimizer",
    action="store_true",
    help="takes the optimizer's state of --init_from as well",
  )
  parser.add_argument(
    "--profile_steps",
    metavar="A:B",
    help="traces steps A to B-1 with jax.profiler",
  )
  parser.add_argument(
    "--quiet",
    action="store_true",
    help="prints no example of what is trained on",
  )
  parser.add_argument(
    "--print_config",
    action="store_true",
    help="prints every field with its value as JSON and ends",
  )
  parser.add_argument(
    "--dry_run",
    action="store_true",
    help="opens and checks models and data, says what would run and ends; "
    "reads no parameter and writes nothing",
  )
  parser.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="of a run on several hosts: the address of process 0; the next two "
    "flags go with it, and none is needed under SLURM, Open MPI and on TPU "
    "slices",
  )
  parser.add_argument(
    "--num_processes",
    type=int,
    metavar="N",
    help="how many processes the run has, one a host",
  )
  parser.add_argument(
    "--process_id",
    type=int,
    metavar="I",
    help="number of this process, from 0; all else in the command is the same "
    "on all hosts",
  )
  return parser


def meant_field(error: cli.UnknownFlagError) -> UserError:
  """The error with the field of its config that the flag may have meant."""
  if not error.config:
    return error
  root = type(read_config(cli.load_config(error.config)[0]))
  name = f"config.{error.name}"
  hint = f"did you mean {name}?"
  if name not in all_paths(root):
    hint = what_was_meant(root, name)
  if not hint:
    return error
  return UserError(
    f"unknown flag --{error.name}; {hint.replace('config.', '--config.')}"
  )


def preset_help(flag: str) -> str:
  """The presets of a `--config`'s file, a line each; "" if it has none."""
  path = pathlib.Path(flag[: flag.rindex(".py") + 3])
  found = cli.presets(path)
  if not found:
    return ""
  width = max(map(len, found))
  lines = [f"  {name:<{width}}  {doc}".rstrip() for name, doc in found.items()]
  return "\n".join([f"presets, named --config {path}:PRESET:", *lines, ""])


def field_help(config: TrainingConfig) -> str:
  """Every field of a config by section: value, meaning, rule and source."""
  # Fields of a section stand together, those of none come first.
  sections: dict[str, list[Row]] = {"": []}
  for row in describe(type(config)):
    section, _, _ = row.path.removeprefix("config.").rpartition(".")
    sections.setdefault(section, []).append(row)
  lines = []
  for section, rows in sections.items():
    lines.append(f"\n{section}" if section else "")
    for row in rows:
      value = operator.attrgetter(row.path.removeprefix("config."))(config)
      lines.append(f"  --{row.path}={shown(value)}")
      lines += wrapped(row.doc)
      # A source is that of the default, not of another value.
      from_ = f"from {row.source}" if row.source else ""
      if value != row.default:
        from_ = f"default {shown(row.default) or 'empty'}"
      allowed = f"allowed {row.rule}" if row.rule else ""
      notes = [note for note in (allowed, from_, row.also.strip("()")) if note]
      lines += wrapped("; ".join(notes))
  return "\n".join(lines)


def wrapped(text: str) -> list[str]:
  """A text in lines of 80 characters, below a flag."""
  indent = " " * 6
  return textwrap.wrap(
    text, 80, initial_indent=indent, subsequent_indent=indent
  )


def shown(value: object) -> str:
  """A field's value as a flag writes it."""
  if isinstance(value, tuple):
    return ",".join(map(str, value))
  return str(value)


if __name__ == "__main__":
  sys.exit(main())
