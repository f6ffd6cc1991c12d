"""Two processes over loopback: equal to one, stopped, killed, resumed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from jaxalign import main

ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPARED = ("time/", "throughput/", "memory/")


def in_folder(command, folder):
  words = [word for word in command if not word.startswith("--workdir")]
  return [*words, f"--workdir={folder}"]


def start(command, folder, processes, devices, **env):
  """Starts processes of `jaxalign.main`, of so many pretended devices each."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  words = in_folder(command, folder)
  command = [sys.executable, "-m", "jaxalign.main", *words]
  count = f"--xla_force_host_platform_device_count={devices}"
  flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
  running = []
  for i in range(processes):
    cluster = [
      f"--coordinator=127.0.0.1:{port}",
      f"--num_processes={processes}",
      f"--process_id={i}",
    ]
    running.append(
      subprocess.Popen(
        command + (cluster if processes > 1 else []),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return running


def end(running, timeout=300):
  """The exit status, the output and the errors of each process."""
  found = []
  try:
    for process in running:
      out, errors = process.communicate(timeout=timeout)
      found.append((process.returncode, out, errors))
  finally:
    for process in running:
      process.kill()
  return found


def error_of(errors):
  """The last line that says what ended a process."""
  lines = [line for line in errors.splitlines() if line.startswith("error:")]
  return lines[-1] if lines else ""


def assert_equal_runs(one, two, read, tolerance):
  """Metrics to a tolerance, 0 = bit for bit; the same texts; the weights."""
  rows = [read(folder / "metrics.jsonl") for folder in (one, two)]
  assert len(rows[0]) == len(rows[1]) > 0
  for a, b in zip(*rows, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(NOT_COMPARED):
        wanted = pytest.approx(a[name], rel=tolerance, abs=tolerance)
        assert b[name] == wanted, name
  texts = [(folder / "samples.jsonl").read_text() for folder in (one, two)]
  if tolerance == 0:
    assert texts[0] == texts[1]
  elif texts[0]:
    samples = [
      [(row["completion"], row["kept"]) for row in read(x / "samples.jsonl")]
      for x in (one, two)
    ]
    assert samples[0] == samples[1]
  a, b = (load_file(x / "model" / "model.safetensors") for x in (one, two))
  assert a.keys() == b.keys()
  for name in a:
    # Adam's first updates turn rounding into a whole step of a tiny gradient.
    assert abs(a[name] - b[name]).max() <= (0.005 if tolerance else 0), name


@pytest.fixture(scope="module")
def sft(supervised, lab):
  """(steps) -> the command of a small run, whose saves come often."""

  def command(steps=3, **changes):
    fields = {
      "policy": lab.policy,
      "data": lab.rows,
      "steps": steps,
      "batch_size": 8,
      "optimizer.learning_rate": 1e-3,
      "metrics.tensorboard": "false",
    }
    return supervised("sft.py", "", **(fields | changes))

  return command


def test_two_processes_equal_one(sft, tmp_path, read):
  """The lead alone prints and writes; the checkpoint is of both."""
  command = sft(checkpoint__every_steps=2)
  two = start(command, tmp_path / "two", 2, 2)
  # One process of one device; the slow tests below have one of four.
  assert main.main(in_folder(command, tmp_path / "one")) == 0
  lead, other = end(two)
  assert (lead[0], other[0]) == (0, 0), lead[2] + other[2]
  assert "mesh: 4 devices (replica 1, fsdp 4, sequence 1, tensor 1)" in lead[1]
  assert other[1] == "" or "Gloo" in other[1]
  assert_equal_runs(tmp_path / "one", tmp_path / "two", read, 1e-4)
  # One process of one device goes on from what two wrote.
  longer = in_folder(sft(5, checkpoint__every_steps=2), tmp_path / "two")
  assert main.main([*longer, "--extend"]) == 0
  assert len(read(tmp_path / "two" / "metrics.jsonl")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["superhf", "ppo"])
def test_online_methods_equal_one_process(
  method, superhf, online, tmp_path, read
):
  command = online(
    "ppo.py",
    "",
    max_length=64,
    rollout__prompts=8,
    rollout__samples_per_prompt=2,
    batch_size=8,
    micro_batch=8,
  )
  if method == "superhf":
    command = superhf(
      "",
      steps=3,
      superbatch__prompts=8,
      batch_size=8,
      evaluation__interval=2,
      evaluation__num_prompts=4,
      evaluation__best_of_n=2,
    )
  one = start(command, tmp_path / "one", 1, 4)
  two = start(command, tmp_path / "two", 2, 2)
  for status, _, errors in end(one + two, 600):
    assert status == 0, errors
  assert_equal_runs(tmp_path / "one", tmp_path / "two", read, 1e-4)


def wait_for(path, running):
  until = time.monotonic() + 240
  while not path.exists():
    assert all(process.poll() is None for process in running), end(running)
    assert time.monotonic() < until, path
    time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(sft, tmp_path_factory):
  """The command of a run of 60 steps, and the folder where two finished it."""
  command = sft(60, checkpoint__every_steps=20)
  folder = tmp_path_factory.mktemp("whole") / "run"
  for status, _, errors in end(start(command, folder, 2, 2)):
    assert status == 0, errors
  return command, folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(victim, whole, tmp_path, read):
  """Within a minute and with a message; both again end as if nothing was."""
  command, wanted = whole
  folder = tmp_path / "run"
  running = start(command, folder, 2, 2)
  wait_for(folder / "checkpoints" / "00000020", running)
  running[victim].kill()
  begin = time.monotonic()
  status, _, errors = end(running, 90)[1 - victim]
  assert time.monotonic() - begin < 60
  assert status == 1
  assert error_of(errors).startswith(f"error: host {victim} (")
  assert "goes on from its last checkpoint" in error_of(errors)
  for status, _, errors in end(start(command, folder, 2, 2)):
    assert status == 0, errors
  assert_equal_runs(wanted, folder, read, 0)


@pytest.mark.slow
def test_a_stop_of_one_process_is_one_of_both(whole, tmp_path, read):
  command, wanted = whole
  folder = tmp_path / "run"
  running = start(command, folder, 2, 2)
  wait_for(folder / "checkpoints" / "00000020", running)
  running[1].send_signal(signal.SIGTERM)
  lead, other = end(running, 60)
  assert (lead[0], other[0]) == (143, 143), lead[2] + other[2]
  assert "stopped after step" in lead[1]
  # One process of another number of devices goes on from there.
  ((status, _, errors),) = end(start(command, folder, 1, 2))
  assert status == 0, errors
  assert_equal_runs(wanted, folder, read, 1e-4)


WRONG = """
import sys
from jaxalign import main
from jaxalign.parallel import hosts
hosts.START_SECONDS = 5
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_wrong_starts_are_one_line(sft, tmp_path):
  """Other flags, other devices, too few devices, nobody there."""
  command = sft()

  def fails(flags, devices=(2, 2), ids=(0, 1)):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    words = in_folder(command, tmp_path / "run")
    words += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    running = []
    for i in ids:
      count = f"--xla_force_host_platform_device_count={devices[i]}"
      running.append(
        subprocess.Popen(
          [sys.executable, "-c", WRONG, *words, f"--process_id={i}", *flags[i]],
          cwd=ROOT,
          env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count},
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    found = end(running, 90)
    assert not (tmp_path / "run").exists()
    return [(status, error_of(errors)) for status, _, errors in found]

  same = [[], []]
  for status, error in fails([[], ["--config.optimizer.learning_rate=0.5"]]):
    assert status == 2
    assert "config.optimizer.learning_rate is 0.001 on host 0" in error
    assert "and 0.5 on host 1" in error
  for status, error in fails(same, devices=(2, 1)):
    assert status == 2
    assert "the number of its devices is 2 on host 0" in error
  for status, error in fails([["--config.mesh.fsdp=2"]] * 2):
    assert status == 2
    assert "= 2 devices, but a run on 2 hosts needs all 4" in error
  ((status, error),) = fails(same, ids=(1,))
  assert status == 2
  assert "cannot be reached within 5 s: [Errno 111]" in error
  ((status, error),) = fails(same, ids=(0,))
  assert status == 1
  assert "not all 2 processes came to 127.0.0.1" in error
