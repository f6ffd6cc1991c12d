"""Asked once: save and leave with the status; asked twice: leave."""

import os
import signal
import subprocess
import sys

import pytest

from jaxalign.runtime import signals
from jaxalign.runtime.signals import catch_signals

LOOP = """
import sys, time
from jaxalign.runtime.signals import catch_signals
with catch_signals() as stop:
  print("running", flush=True)
  while not stop.requested:
    time.sleep(0.01)
  print("saving", flush=True)
  time.sleep(float(sys.argv[1]))
  print("saved", flush=True)
sys.exit(stop.exit_status)
"""


def start(saving):
  process = subprocess.Popen(
    [sys.executable, "-c", LOOP, str(saving)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "running\n"
  return process


@pytest.mark.parametrize(
  ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_the_first_signal_lets_it_save(number, status):
  process = start(saving=0.1)
  process.send_signal(number)
  out, err = process.communicate(timeout=30)
  assert out == "saving\nsaved\n"
  assert "stopping after this step" in err
  assert process.returncode == status


def test_the_second_signal_ends_it_at_once():
  process = start(saving=60)
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == "saving\n"
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=10)
  assert out == ""
  assert process.returncode == 130


def test_a_signal_that_comes_twice_within_a_second_counts_once(monkeypatch):
  """As `timeout` and a process group send it; a later one ends the process."""
  clock, left = [0.0], []
  monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(signals, "leave", left.append)
  with catch_signals():
    for clock[0] in (5.0, 5.01, 5.9):
      os.kill(os.getpid(), signal.SIGTERM)
    assert left == []
    clock[0] = 6.1
    os.kill(os.getpid(), signal.SIGTERM)
    assert left == [143]
  # Ctrl-C twice in a hurry is meant.
  with catch_signals():
    for clock[0] in (7.0, 7.01, 7.15):
      os.kill(os.getpid(), signal.SIGINT)
    assert left == [143, 130]


def test_a_host_that_is_told_last_saves_as_well(monkeypatch):
  """A platform's notice comes to one host after the other."""
  clock, left = [5.0], []
  monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(signals, "leave", left.append)
  monkeypatch.setattr(signals.hosts, "highest", lambda own: signal.SIGTERM)
  with catch_signals() as stop:
    assert stop.agree()  # another host was told
    os.kill(os.getpid(), signal.SIGTERM)
    assert left == []
    clock[0] = 7.0
    os.kill(os.getpid(), signal.SIGTERM)  # this one asks twice
    assert left == [143]


def test_a_program_of_its_own_keeps_its_process(monkeypatch):
  """A notebook's second interrupt is an exception, not the kernel's end."""
  clock = [0.0]
  monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
  # A shell's background job ignores the signal, and so do these tests there.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with signals.raise_second(), catch_signals() as stop:
      clock[0] = 5.0
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.requested
      clock[0] = 7.0
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_screen_that_says_it_is_not_written_over(capfd):
  with catch_signals() as stop:
    stop.on_screen = True
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
  assert not capfd.readouterr().err


def test_ctrl_c_ends_an_answer_and_elsewhere_the_program(monkeypatch):
  left = []
  monkeypatch.setattr(signals, "leave", left.append)
  before = signal.getsignal(signal.SIGINT)
  with signals.catch_interrupts() as interrupts:
    with interrupts.answer():
      os.kill(os.getpid(), signal.SIGINT)
      assert interrupts.asked
      assert left == []
      os.kill(os.getpid(), signal.SIGINT)
      assert left == [130]
    os.kill(os.getpid(), signal.SIGINT)
    assert left == [130, 130]
    with interrupts.answer():
      assert not interrupts.asked
  assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_given_back(capfd):
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with catch_signals() as stop:
    assert not stop.requested
    assert stop.exit_status == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert stop.exit_status == 143
  after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert after == before
  assert "once more to stop at once" in capfd.readouterr().err
