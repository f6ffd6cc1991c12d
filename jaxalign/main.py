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
from jaxalign.config.changes import suffix
from jaxalign.errors import UserError


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
  if args.init_from is not None:
    fields = [*fields, ("init_from", args.init_from)]
  if args.init_optimizer:
    fields = [*fields, ("init_optimizer", "true")]
  # The config's dataclasses type and check fields from flags, from a config
  # file and from a stored config.json in the same way.
  config = read_config(mapping, fields)
  if args.help:
    parser.print_help()
    print(f"\nfields of {args.config}:\n{field_help(config)}")
    return 0
  if not args.workdir:
    workdir += suffix(config, preset_of(mapping, config), extend=args.extend)
  folder = pathlib.Path(args.workdir or workdir)
  return run(
    config, folder, extend=args.extend, fresh=args.fresh, quiet=args.quiet
  )


def preset_of(mapping: object, config: TrainingConfig) -> TrainingConfig:
  """The config of a preset alone, which may lack what the flags have added."""
  try:
    return read_config(mapping, [("algorithm", config.algorithm)])
  except UserError:
    return type(config)()


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
