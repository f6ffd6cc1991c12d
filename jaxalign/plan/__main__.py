"""Says what a run needs on a machine that is not there.

  python -m jaxalign.plan --config configs/superhf.py:pythia-1b --on a6000
  python -m jaxalign.plan --config configs/superhf.py --on v5litepod-16,8xh100

Compiles every program of the run for the target and prints, for each program
and chip, memory, arithmetic, bytes between chips and the least time; then
whether it fits, the largest batch that does and the smallest slice that would.
Models need their config.json alone, data need not be there.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from jaxalign import cli
from jaxalign.errors import UserError


@cli.command
def main(argv: Sequence[str]) -> int:
  """Flags -> config -> plans.

  Returns:
    The exit status; 2 = a mistake in the flags, the config, or what it names.
  """
  parser = make_parser()
  args = parser.parse(argv)
  if args.help:
    parser.print_help()
    return 0
  # Imported late: jax takes seconds to start, a mistake in a flag should not.
  from jaxalign.algorithms import read_config, with_its_model
  from jaxalign.plan import measure, page, search, standins, targets

  share = args.memory_share
  if share is None:
    share = targets.GPU_SHARE
  if not 0 < share <= 1:
    raise UserError(
      f"--memory_share must be in (0, 1], got {share}; {targets.GPU_SHARE} is "
      "what JAX takes of a GPU by default"
    )
  if not args.on:
    raise UserError(
      f"--on is missing; give a target such as {', '.join(targets.names())}"
    )
  chosen = [
    dataclasses.replace(targets.find(name, share), estimated=args.estimate)
    for name in args.on.split(",")
    if name
  ]
  mapping, _ = cli.load_config(args.config)
  config = read_config(mapping, args.fields)
  targets.prepare(chosen)
  if config.init_from:
    config = with_its_model(config)
  with tempfile.TemporaryDirectory(prefix="jaxalign-plan-") as folder:
    there = standins.stand_in(
      config, pathlib.Path(folder), args.tokens, args.rows
    )

    def plan(target: targets.Target) -> measure.RunPlan:
      # `describe` prints lines about the run; the plan keeps only what `auto`
      # chose.
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        found = measure.plan(there.config, target, there.notes)
      auto = [x for x in printed.getvalue().splitlines() if ": auto takes" in x]
      return dataclasses.replace(found, notes=(*found.notes, *auto))

    plans = [plan(target) for target in chosen]
    advice = []
    # Only the text has room for it, and it takes minutes of compiling.
    as_text = not (args.json or args.compare)
    if as_text and not args.quick and len(plans) == 1:
      with contextlib.redirect_stdout(io.StringIO()):
        advice = search.advise(there.config, plans[0], plan)
  if args.json:
    found = [page.as_json(each) for each in plans]
    print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
  elif args.compare:
    print(page.side_by_side(plans))
  else:
    print("\n\n".join(page.text(each) for each in plans))
    for line in advice:
      print(line)
  return 0


def make_parser() -> cli.Parser:
  """The command's flags."""
  parser = cli.Parser("jaxalign.plan", __doc__, config=True)
  parser.add_argument(
    "--on",
    default="",
    metavar="TARGET[,TARGET...]",
    help="machines by the clouds' names: v5litepod-16, v6e-8, v5p-128, "
    "2xv5litepod-256 (two slices), a6000, 8xh100, 2x8xh100 (two nodes)",
  )
  parser.add_argument(
    "--compare",
    action="store_true",
    help="prints the targets side by side, a row each; implies --quick",
  )
  parser.add_argument(
    "--json",
    action="store_true",
    help="prints the plan as JSON; implies --quick",
  )
  parser.add_argument(
    "--quick",
    action="store_true",
    help="leaves out the largest batch and the smallest slice, which compile "
    "some programs again",
  )
  parser.add_argument(
    "--estimate",
    action="store_true",
    help="compiles for CPUs in the place of the target, which is faster than a "
    "TPU's compiler and less exact",
  )
  parser.add_argument(
    "--memory_share",
    type=float,
    default=None,
    metavar="SHARE",
    help="part of a GPU's memory that the run takes, as "
    "XLA_CLIENT_MEM_FRACTION will say; default: what JAX takes",
  )
  parser.add_argument(
    "--tokens",
    type=int,
    default=0,
    metavar="N",
    help="tokens of a prompt, or of a text to train on, where the data are not "
    "here; default max_prompt_chars / 4, or max_length",
  )
  parser.add_argument(
    "--rows",
    type=int,
    default=0,
    metavar="N",
    help="rows of data that are not here, where the steps depend on them; "
    "default 10000",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
