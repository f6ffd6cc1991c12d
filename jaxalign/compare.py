"""Compares runs: lays their curves over each other in one HTML page.

  python -m jaxalign.compare runs/sft-lab runs/sft-lab-lr
  python -m jaxalign.compare runs/* --metrics 'eval_*' --out compare.html

RUN is a run's folder, finished or not. Runs that differ in nothing but their
seed become one curve with a band. The page needs no network.
"""

import errno
import pathlib
import sys
from collections.abc import Sequence

from jaxalign import cli
from jaxalign.errors import UserError


@cli.command
def main(argv: Sequence[str]) -> None:
  """Reads the runs and writes the page.

  The exit status is 2 without a run with metrics, with a damaged file, or where
  the page has no place.
  """
  args = make_parser().parse(argv)
  # Imported late: a mistyped flag should not wait for numpy and jax.
  from jaxalign.report import comparison, logged

  if not args.runs:
    raise UserError("no runs; name their folders, as in runs/a runs/b")
  out = pathlib.Path(args.out)
  if out.is_dir() or not out.absolute().parent.is_dir():
    state = "is a folder" if out.is_dir() else "is in no folder that exists"
    raise UserError(f"--out {out} {state}; name a file, as in compare.html")
  # A folder that is named twice, by whatever path, is one run.
  folders = {
    pathlib.Path(name).resolve(): pathlib.Path(name) for name in args.runs
  }
  # Of runs/* some may be no runs, or have just begun.
  runs, others = [], []
  for folder in folders.values():
    if folder.is_file():
      others.append(folder)
      continue
    run = logged.read_run(folder, empty=len(folders) > 1)
    if run.rows:
      runs.append(run)
    else:
      others.append(folder)
  for path in others:
    print(f"{path} has no metrics, left out", file=sys.stderr)
  if not runs:
    raise UserError("none of these folders has metrics; are they runs?")
  try:
    comparison.write_comparison(runs, out, args.metrics)
  except OSError as error:
    if error.errno not in (errno.EACCES, errno.EROFS):
      raise
    raise UserError(
      f"--out {out} cannot be written: {error.strerror}"
    ) from error
  print(f"{len(runs)} runs compared in {out}")


def make_parser() -> cli.Parser:
  """The command's flags."""
  parser = cli.Parser("jaxalign.compare", __doc__)
  parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder")
  parser.add_argument(
    "--out",
    default="compare.html",
    metavar="FILE",
    help="the page, replaced if it is there; default compare.html",
  )
  parser.add_argument(
    "--metrics",
    action="append",
    default=[],
    metavar="GLOB",
    help="only metrics that this pattern fits, such as 'eval_*'; may be given "
    "several times",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
