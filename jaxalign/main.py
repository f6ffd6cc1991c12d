"""Trains what a config file describes.

  python -m jaxalign.main --config configs/superhf.py:pythia-1b
    --config.optimizer.learning_rate=3e-5

Running the same command again continues the run.
"""

import operator
import pathlib
import sys
from collections.abc import Sequence

from jaxalign import cli
from jaxalign.algorithms import read_config, run
from jaxalign.config import TrainingConfig, describe


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status: 2 is a mistake in the input."""
  return cli.exit_status(train, argv)


def train(argv: Sequence[str]) -> int:
  """Flags -> config -> run.

  Raises:
    UserError: a mistake in the flags, the config, or what the config names.
  """
  parser = make_parser()
  args = parser.parse(argv)
  if args.help and not args.config:
    parser.print_help()
    return 0
  mapping, workdir = cli.load_config(args.config)
  fields = args.fields
  if args.profile_steps is not None:
    fields = [*fields, ("profile_steps", args.profile_steps)]
  # The config's dataclasses type and check fields from flags, from a config
  # file and from a stored config.json in the same way.
  config = read_config(mapping, fields)
  if args.help:
    parser.print_help()
    print(f"\nfields of {args.config}:\n{field_help(config)}")
    return 0
  folder = pathlib.Path(args.workdir or workdir)
  return run(config, folder, quiet=args.quiet)


def make_parser() -> cli.Parser:
  """The command's flags."""
  parser = cli.Parser("jaxalign.main", __doc__, config=True)
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="folder of the run; default runs/<config>-<preset>",
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
  return parser


def field_help(config: TrainingConfig) -> str:
  """Every field of a config: its flag, value, meaning and allowed values."""
  lines = []
  for row in describe(type(config)):
    value = operator.attrgetter(row.path.removeprefix("config."))(config)
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    lines.append(f"  --{row.path}={shown}\n      {row.doc}")
    if row.rule:
      lines.append(f"      allowed: {row.rule}")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
