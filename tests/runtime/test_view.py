"""What reaches the terminal, and what must not."""

import io
import math

import pytest
from rich.console import Console

from jaxalign.runtime import view


def make_console(terminal):
  return Console(
    file=io.StringIO(),
    force_terminal=terminal,
    width=100,
    color_system=None,
    legacy_windows=False,
  )


def row(score, text="x"):
  return {"prompt": "p", "completion": text, "score": score}


def test_plain_lines_for_a_log(monkeypatch):
  """One line in two seconds at most, and always the first and the last."""
  clock = [0.0]
  monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
  console = make_console(terminal=False)
  with view.View(10, "[bold]run", console=console) as shown:
    for step in range(1, 11):
      clock[0] += 0.5
      values = {"score/mean": step / 4, "kl/mean": 0.0123, "time/x_s": 9}
      if step == 2:
        values["test_score/mean"] = -1.5
      shown.update(step, values, [row(1.0)])
  lines = console.file.getvalue().splitlines()
  pace, rest = "0.5 s/step", "held-out score -1.5  KL 0.0123"
  assert lines == [
    f"step 1/10  {pace}  4s left  score 0.25  KL 0.0123",
    f"step 5/10  {pace}  2s left  score 1.25  {rest}",
    f"step 9/10  {pace}  0s left  score 2.25  {rest}",
    f"step 10/10  {pace}  score 2.5  {rest}",
  ]


def test_terminal_shows_panel_and_rotates_samples(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
  console = make_console(terminal=True)
  shown = view.View(4, "lab [red]", console=console)
  with shown:
    clock[0] = 1.0
    rows = [row(-2.0, "poor"), row(3.0, "fine"), row(math.nan, "odd")]
    shown.update(
      2, {"score/mean": 0.5, "throughput/tokens_per_s": 1234.0}, rows
    )
    pages = []
    for clock[0] in (0.0, view._TURN_SECONDS):
      with console.capture() as capture:
        console.print(shown._render())
      pages.append(capture.get())
  assert "best sample, score 3" in pages[0]
  assert "fine" in pages[0]
  assert "worst sample, score -2" in pages[1]
  assert "poor" in pages[1]
  for page in pages:
    assert "lab [red]" in page
    assert "2/4" in page
    assert "1234 tokens per s" in page


def test_model_text_is_neither_markup_nor_control():
  console = make_console(terminal=True)
  shown = view.View(1, "t", console=console)
  nasty = "[red]a[/red] \x1b[2J\x07\u202eb\u0085\ud800\r\nc [link=http://x]d"
  shown.update(1, {}, [row(1.0, nasty)])
  with console.capture() as capture:
    console.print(shown._render())
  page = capture.get()
  assert "[red]a[/red] [2Jb ⏎ c [link=http://x]d" in page
  for control in ("\x1b[2J", "\x07", "\u202e", "\u0085", "\ud800"):
    assert control not in page


def test_a_dumb_terminal_gets_lines():
  console = Console(
    file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}
  )
  with view.View(1, "t", console=console) as shown:
    shown.update(1, {"score/mean": 1.0})
  assert console.file.getvalue().startswith("step 1/1")


def test_best_and_worst():
  rows = [row(1), row(None), row(math.nan), row(-3.5), row(2.5)]
  assert view.best_and_worst(rows) == [("best", row(2.5)), ("worst", row(-3.5))]
  assert view.best_and_worst([row(None)]) == []
  assert view.best_and_worst([{"prompt": "p"}]) == []


@pytest.mark.parametrize(
  ("values", "width", "shown"),
  [
    ([0, 7], 8, "▁█"),
    ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
    ([0, 0, 7, 7], 2, "▁█"),
    ([5, 5, 5], 8, "▁▁▁"),
    ([0, math.nan, 7], 8, "▁ █"),
    ([math.nan], 8, " "),
    ([], 8, " "),
  ],
)
def test_sparkline(values, width, shown):
  assert view.sparkline(values, width) == shown


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (0, "0"),
    (0.12345, "0.123"),
    (-12.345, "-12.3"),
    (123.45, "123.5"),
    (12345.6, "12346"),
    (0.00012, "1.20e-04"),
    (2.5e7, "2.50e+07"),
    (math.inf, "inf"),
  ],
)
def test_short_numbers(value, shown):
  assert view.short(value) == shown


@pytest.mark.parametrize(
  ("seconds", "shown"),
  [(0.4, "0s"), (59.6, "1m 00s"), (754, "12m 34s"), (7500, "2h 05m")],
)
def test_durations(seconds, shown):
  assert view.duration(seconds) == shown
