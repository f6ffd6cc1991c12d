"""Lists the commands, and the config files and presets below ./configs.

python -m jaxalign
"""

import sys
from collections.abc import Sequence

from jaxalign import cli
from jaxalign.errors import UserError

COMMANDS = {
  "main": "trains what a config file describes",
  "chat": "answers prompts in the terminal",
  "compare": "lays the curves of several runs over each other in one page",
  "plan": "says what a run needs on a machine that is not there",
  "convert": "writes a run or a checkpoint as a Hugging Face folder",
}


@cli.command
def main(argv: Sequence[str]) -> None:
  """Prints the lists."""
  cli.Parser("jaxalign", __doc__).parse(argv)
  print(f"jaxalign {cli.version()}\n\ncommands, each with a --help:")
  for name, line in COMMANDS.items():
    print(f"  python -m jaxalign.{name:<8} {line}")
  files = cli.config_files(cli.CONFIGS)
  if not files:
    print(f"\nno config files below ./{cli.CONFIGS}")
    return
  print("\nconfigs and presets, named --config FILE.py:PRESET:")
  print("(python -m jaxalign.main --config FILE.py --help describes them)")
  for path in files:
    # One broken file does not hide the others.
    try:
      presets = ", ".join(cli.presets(path))
    except UserError as error:
      presets = f"broken; {error}"
    print(f"  {path}" + (f": {presets}" if presets else ""))


if __name__ == "__main__":
  sys.exit(main())
