"""The terminal at the end of a run as a picture, for docs/images/.

  python docs/terminal.py docs/images/terminal.svg \
    --config configs/superhf.py --config.steps=30

The first argument is the picture, the others are those of `jaxalign.main`.
"""

import io
import sys

import rich.console
from rich import live

from jaxalign import main
from jaxalign.runtime import console

picture, *flags = sys.argv[1:]
screen = rich.console.Console(
  record=True, force_terminal=True, width=88, file=io.StringIO()
)


class LastPanel(live.Live):
  """Records the panel that is left on the screen, and none before it."""

  def stop(self) -> None:
    """Forgets what was drawn so far, then draws the last panel."""
    screen.export_text(clear=True)
    super().stop()


def one_screen() -> rich.console.Console:
  """The console of the run, which records."""
  return screen


console.live.Live = LastPanel
console.rich.console.Console = one_screen
status = main.main(flags)
screen.save_svg(picture, title="python -m jaxalign.main")
sys.exit(status)
