"""Asked once: save and leave with the status; asked twice: leave."""

import os
import signal
import subprocess
import sys

import pytest

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
