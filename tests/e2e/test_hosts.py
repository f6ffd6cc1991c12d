"""Two processes over loopback: equal to one, stopped, killed, resumed."""

import os
import shutil
import signal
import socket
import time

import pytest
from safetensors.numpy import load_file

from jaxalign import main
from jaxalign.parallel import hosts

NOT_COMPARED = ("time/", "throughput/", "memory/")


def in_folder(command, folder):
  words = [word for word in command if not word.startswith("--workdir")]
  return [*words, f"--workdir={folder}"]


@pytest.fixture(scope="module")
def start(fork):
  """Starts a command in two processes, of two pretended devices each."""

  def start(command, folder, flags=((), ()), devices=(2, 2), first=""):
    words = [*in_folder(command, folder), "--num_processes=2"]
    words.append(f"--coordinator=127.0.0.1:{free_port()}")
    return [
      fork([*words, f"--process_id={i}", *flags[i]], pretend(count), first)
      for i, count in enumerate(devices)
      if count
    ]

  return start


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def pretend(devices):
  """The environment of a process that pretends to have so many devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}


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


@pytest.fixture(scope="module")
def whole(sft, start, tmp_path_factory):
  """The command of a run that two processes finish, and its folder.

  Its 20 steps take long enough to be killed in the middle. One process of one
  device, this one, finishes it as well, in the folder `one` next to it.
  """
  command = sft(20, checkpoint__every_steps=5)
  folder = tmp_path_factory.mktemp("whole")
  two = start(command, folder / "two")
  assert main.main(in_folder(command, folder / "one")) == 0
  lead, other = end(two)
  assert (lead[0], other[0]) == (0, 0), lead[2] + other[2]
  assert "mesh: 4 devices (replica 1, fsdp 4, sequence 1, tensor 1)" in lead[1]
  assert other[1] == "" or "Gloo" in other[1]
  return command, folder / "two"


def test_two_processes_equal_one(whole, sft, tmp_path, read):
  """The lead alone prints and writes; the checkpoint is of both."""
  _, two = whole
  assert_equal_runs(two.with_name("one"), two, read, 1e-4)
  # One process of one device goes on from what two wrote.
  longer = shutil.copytree(two, tmp_path / "longer")
  command = in_folder(sft(22, checkpoint__every_steps=5), longer)
  assert main.main([*command, "--extend"]) == 0
  assert len(read(longer / "metrics.jsonl")) == 22


@pytest.mark.slow
@pytest.mark.parametrize("method", ["superhf", "ppo"])
def test_online_methods_equal_one_process(
  method, start, superhf, online, tmp_path, read
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
  two = start(command, tmp_path / "two")
  assert main.main(in_folder(command, tmp_path / "one")) == 0
  for status, _, errors in end(two, 600):
    assert status == 0, errors
  assert_equal_runs(tmp_path / "one", tmp_path / "two", read, 1e-4)


@pytest.mark.slow
def test_two_processes_begin_from_a_checkpoint(
  whole, sft, start, tmp_path, read
):
  """The lead alone copies its weights."""
  _, two = whole
  place = two / "checkpoints" / "00000015"
  words = [w for w in sft(1) if not w.startswith("--config.policy=")]
  for status, _, errors in end(
    start([*words, f"--init_from={place}"], tmp_path / "run")
  ):
    assert status == 0, errors
  assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


def wait_for(path, running):
  until = time.monotonic() + 240
  while not path.exists():
    assert all(process.poll() is None for process in running), end(running)
    assert time.monotonic() < until, path
    time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on(start, whole, tmp_path, read):
  """They end as if nothing was.

  The lead is killed after the first save, then the other one after the second:
  with a message the one that is left ends, by the limit of its watch. After the
  third one process is asked to stop, and both do.
  """
  # The lead would spin for 30 s: gloo looks again and again for who is gone.
  watchful = "from jaxalign.parallel import hosts; hosts.SILENT_SECONDS = 12"
  assert hosts.SILENT_SECONDS + hosts.GRACE_SECONDS < 60
  command, wanted = whole
  folder, alone = tmp_path / "run", tmp_path / "alone"
  for victim, step in enumerate((5, 10)):
    running = start(command, folder, first=watchful)
    wait_for(folder / "checkpoints" / f"{step:08}", running)
    running[victim].kill()
    begin = time.monotonic()
    status, _, errors = end(running, 90)[1 - victim]
    assert time.monotonic() - begin < 40
    assert status == 1
    assert error_of(errors).startswith(f"error: host {victim} (")
    assert "goes on from its last checkpoint" in error_of(errors)
  running = start(command, folder)
  wait_for(folder / "checkpoints" / "00000015", running)
  running[1].send_signal(signal.SIGTERM)
  lead, other = end(running, 60)
  assert (lead[0], other[0]) == (143, 143), lead[2] + other[2]
  assert "stopped after step" in lead[1]
  shutil.copytree(folder, alone)
  for status, _, errors in end(start(command, folder)):
    assert status == 0, errors
  assert_equal_runs(wanted, folder, read, 0)
  # One process of another number of devices goes on as well.
  assert main.main(in_folder(command, alone)) == 0
  assert_equal_runs(wanted, alone, read, 1e-4)


@pytest.mark.slow
def test_wrong_starts_are_one_line(sft, start, tmp_path):
  """Other flags, other devices, too few devices, nobody there."""
  impatient = "from jaxalign.parallel import hosts; hosts.START_SECONDS = 5"

  def begin(**wrong):
    return start(sft(), tmp_path / "run", first=impatient, **wrong)

  def errors(running):
    found = end(running, 90)
    assert not (tmp_path / "run").exists()
    return [(status, error_of(errors)) for status, _, errors in found]

  # These wait, so they are started first.
  no_other, no_lead = begin(devices=(2, 0)), begin(devices=(0, 2))
  flag = "--config.optimizer.learning_rate=0.5"
  for status, error in errors(begin(flags=([], [flag]))):
    assert status == 2
    assert "config.optimizer.learning_rate is 0.001 on host 0" in error
    assert "and 0.5 on host 1" in error
  for status, error in errors(begin(devices=(2, 1))):
    assert status == 2
    assert "the number of its devices is 2 on host 0" in error
  for status, error in errors(begin(flags=[["--config.mesh.fsdp=2"]] * 2)):
    assert status == 2
    assert "= 2 devices, but a run on 2 hosts needs all 4" in error
  ((status, _, log),) = end(no_lead, 90)
  error = error_of(log)
  assert status == 1
  assert "process 1 of 2 joins 127.0.0.1" in log
  assert "cannot be reached within 5 s: [Errno 111]" in error
  ((status, error),) = errors(no_other)
  assert status == 1
  assert "not all 2 processes came to 127.0.0.1" in error
