"""What reaches the terminal, and what must not."""

import io
import math

import jax
import pytest
import rich.console

from jaxalign.runtime import console
from jaxalign.runtime.console import Console
from jaxalign.runtime.signals import Stop


def make_output(terminal):
  return rich.console.Console(
    file=io.StringIO(),
    force_terminal=terminal,
    width=100,
    color_system=None,
    legacy_windows=False,
  )


@pytest.fixture
def clock(monkeypatch):
  """The time in seconds, as a list of one number to set."""
  now = [0.0]
  monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
  return now


def row(score, text="x"):
  return {"prompt": "p", "completion": text, "score": score}


def test_plain_lines_for_a_log(clock):
  """One line in two seconds at most, and always the first and the last."""
  output = make_output(terminal=False)
  with Console(10, "[bold]run", output=output) as shown:
    for step in range(1, 11):
      clock[0] += 0.5
      values = {"score/mean": step / 4, "kl/mean": 0.0123, "time/x_s": 9}
      if step == 2:
        values["test_score/mean"] = -1.5
      shown.update(step, values, [row(1.0)])
  lines = output.file.getvalue().splitlines()
  pace, rest = "0.5 s/step", "held-out score -1.5  KL 0.0123"
  assert lines == [
    "step 1/10  compiling",
    f"step 1/10  {pace}  4s left  score 0.25  KL 0.0123",
    f"step 5/10  {pace}  2s left  score 1.25  {rest}",
    f"step 9/10  {pace}  0s left  score 2.25  {rest}",
    f"step 10/10  {pace}  score 2.5  {rest}",
  ]


def panel(clock, seconds, *updates, steps=4, title="lab [red]"):
  """The panel that is left on a terminal `seconds` after the start."""
  clock[0], output = 0.0, make_output(terminal=True)
  with Console(steps, title, output=output) as shown:
    clock[0] = seconds
    for update in updates:
      shown.update(*update)
  page = output.file.getvalue()
  return page[page.rindex("lab [red]") :]


def test_terminal_shows_panel_and_rotates_samples(clock):
  rows = [row(-2.0, "poor"), row(3.0, "fine"), row(math.nan, "odd")]
  update = 2, {"score/mean": 0.5, "throughput/tokens_per_s": 1234.0}, rows
  pages = [panel(clock, seconds, update) for seconds in (1.0, 7.0)]
  assert "best sample, score 3" in pages[0]
  assert "fine" in pages[0]
  assert "worst sample, score -2" in pages[1]
  assert "poor" in pages[1]
  for page in pages:
    assert "2/4" in page
    assert "1234 tokens per s" in page
    assert "odd" not in page


def test_samples_without_a_score_leave_the_last_ones(clock):
  updates = [(1, {}, [row(0, "zero")])]
  for rows in ([row(None, "odd")], [{"prompt": "p"}], []):
    updates.append((2, {}, rows))
  page = panel(clock, 1.0, *updates)
  assert "best sample, score 0" in page
  assert "zero" in page
  assert "odd" not in page
  assert "sample" not in panel(clock, 1.0, updates[1])


def test_model_text_is_neither_markup_nor_control(clock):
  nasty = "[red]a[/red] \x1b[2J\x07\u202eb\u0085\ud800\r\nc [link=http://x]d"
  page = panel(clock, 1.0, (1, {}, [row(1.0, nasty)]))
  assert "[red]a[/red] [2Jb ⏎ c [link=http://x]d" in page
  for control in ("\x1b[2J", "\x07", "\u202e", "\u0085", "\ud800"):
    assert control not in page


def test_a_dumb_terminal_gets_lines():
  output = rich.console.Console(
    file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}
  )
  with Console(1, "t", output=output) as shown:
    shown.update(1, {"score/mean": 1.0})
  assert output.file.getvalue().startswith("step 1/1")


def test_steps_that_compile_are_left_out_of_the_pace(clock):
  """Two of 30 s compile, the others take 1 s."""
  output = make_output(terminal=False)
  with Console(13, "t", done=1, output=output) as shown:
    for step in range(2, 14):
      clock[0] += 1
      if step in (2, 4):
        clock[0] += 29
        jax.jit(lambda x, step=step: x + step)(0.0)
      shown.update(step, {})
  lines = output.file.getvalue().splitlines()
  assert lines[:4] == [
    "step 2/13  compiling",
    "step 2/13  30 s with compiling",
    "step 4/13  1 s/step  9s left",
    "step 6/13  1 s/step  7s left",
  ]


def test_a_run_in_which_each_step_compiles_has_a_pace_too(clock):
  output = make_output(terminal=False)
  with Console(30, "t", output=output) as shown:
    for step in range(1, 31):
      clock[0] += 3
      jax.jit(lambda x, step=step: x - step)(0.0)
      shown.update(step, {})
  lines = output.file.getvalue().splitlines()
  assert lines[19] == "step 19/30  57 s with compiling"
  assert lines[20] == "step 20/30  3 s/step  30s left"


def test_a_column_is_one_metric(clock):
  """Also where a run has several of them, and where one comes later."""
  output = make_output(terminal=False)
  with Console(3, "t", output=output) as shown:
    for step in range(1, 4):
      clock[0] += 3
      values = {"objective/kl": 9.0, "kl/mean": 0.5, "loss/nll": 2.0}
      if step == 2:
        values |= {"loss/total": 7.0, "eval_loss/nll": 3.0}
      shown.update(step, values)
  last = output.file.getvalue().splitlines()[-1]
  assert last == "step 3/3  3 s/step  loss 2  KL 0.5  held-out loss 3"


def test_the_panel_says_that_it_compiles_and_that_it_stops(clock):
  stop = Stop()
  clock[0], output = 0.0, make_output(terminal=True)
  with Console(4, "lab", done=2, stop=stop, output=output):
    assert stop.on_screen
    clock[0] = 12.0
  page = output.file.getvalue()
  assert "2/4" in page
  assert "compiling, 12s" in page
  assert "stopping" not in page
  assert not stop.on_screen
  with Console(4, "lab", stop=stop, output=output) as shown:
    shown.update(1, {})
    jax.jit(lambda x: x * 3).lower(0.0)  # up to where it would compile
    stop.signal = 2
  page = output.file.getvalue()
  assert "compiling  0 s/step" in page
  assert "stopping after this step; once more" in page


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
  assert console.sparkline(values, width) == shown


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
  assert console.short(value) == shown


@pytest.mark.parametrize(
  ("seconds", "shown"),
  [(0.4, "0s"), (59.6, "1m 00s"), (754, "12m 34s"), (7500, "2h 05m")],
)
def test_durations(seconds, shown):
  assert console.duration(seconds) == shown
