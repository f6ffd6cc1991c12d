"""Do two checkouts compute the same? The net under a refactoring.

  git worktree add ../old REV
  python tests/bench/same_numbers.py ../old . [--only superhf,ppo]
  python tests/bench/same_numbers.py ../old --save old.json
  python tests/bench/same_numbers.py old.json . --same "kl/old_name=kl/name"

Runs every method for a few steps in both checkouts, one run that is stopped
and started again, and one on two devices, and compares metrics, samples and
weights bit for bit. A number that is meant to change goes into docs/log.md.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

RUNS = {
  "sft": "sft.py",
  "reward_model": "reward_model.py",
  "superhf": "superhf.py",
  "dpo": "dpo.py",
  "online_dpo": "dpo.py:online",
  "kto": "kto.py",
  "ppo": "ppo.py",
  "rloo": "ppo.py:lab-rloo",
  "best_of_n": "best_of_n.py",
  "superhf_resumed": "superhf.py",
  "ppo_resumed": "ppo.py",
  "superhf_two_devices": "superhf.py",
  "dpo_two_devices": "dpo.py",
}
# Seconds and bytes differ from run to run.
LEFT_OUT = ("time/", "throughput/", "memory/", "host/")


def flags_of(name: str, steps: int) -> list[str]:
  if name == "best_of_n":  # one pass, whatever it is asked for
    return ["--config.num_prompts=24", "--config.evaluation.num_prompts=8"]
  flags = [f"--config.steps={steps}"]
  if name.endswith("_two_devices"):
    flags.append("--config.mesh.fsdp=2")
  return flags


def stop_after_one_step(command, tree, env, folder) -> None:
  """Starts the run and asks it to stop once its first line is written."""
  run = subprocess.Popen(
    command,
    cwd=tree,
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.STDOUT,
  )
  log = folder / "metrics.jsonl"
  while run.poll() is None and not (log.exists() and log.stat().st_size):
    time.sleep(0.05)
  run.send_signal(signal.SIGTERM)
  assert run.wait() in (0, 143), f"{command} ended with {run.returncode}"


def outcome(tree: pathlib.Path, name: str, steps: int) -> dict | str:
  """What a run left: metric rows, digests of its weights and its samples."""
  with tempfile.TemporaryDirectory(prefix="same-") as parent:
    folder = pathlib.Path(parent) / name
    command = [sys.executable, "-m", "jaxalign.main"]
    command += ["--config", f"configs/{RUNS[name]}", "--workdir", str(folder)]
    command += flags_of(name, steps)
    env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    if name.endswith("_two_devices"):
      # A device that waits for its turn on few cores is not a dead one.
      env["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
      )
    if name.endswith("_resumed"):
      stop_after_one_step(command, tree, env, folder)
    done = subprocess.run(
      command, cwd=tree, env=env, capture_output=True, text=True
    )
    if done.returncode:
      last = (done.stdout + done.stderr).strip().splitlines()[-1:]
      return f"ended with {done.returncode}: {last}"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [
      {k: v for k, v in json.loads(line).items() if not k.startswith(LEFT_OUT)}
      for line in lines
    ]
    weights = sorted((folder / "model").glob("*.safetensors"))
    samples = folder / "samples.jsonl"
    return {
      "rows": rows,
      "weights": digest(b"".join(path.read_bytes() for path in weights)),
      "samples": digest(samples.read_bytes() if samples.exists() else b""),
    }


def digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def compare(old: dict | str, new: dict | str, names: dict[str, str]) -> str:
  """ "same", or what differs."""
  if isinstance(old, str) or isinstance(new, str):
    return f"DIFFERS: old {old if isinstance(old, str) else 'ran'}, " + (
      f"new {new if isinstance(new, str) else 'ran'}"
    )
  rows = [{names.get(k, k): v for k, v in row.items()} for row in old["rows"]]
  wrong = [
    name
    for a, b in zip(rows, new["rows"], strict=False)
    for name in sorted(a.keys() | b.keys())
    if a.get(name) != b.get(name)
  ]
  if len(rows) != len(new["rows"]):
    wrong.append(f"{len(rows)} rows, {len(new['rows'])} rows")
  wrong += [part for part in ("weights", "samples") if old[part] != new[part]]
  return "DIFFERS: " + ", ".join(dict.fromkeys(wrong)) if wrong else "same"


def outcomes(source: str, names: list[str], steps: int, jobs: int) -> dict:
  path = pathlib.Path(source).resolve()
  if path.is_file():
    return json.loads(path.read_text())
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    found = pool.map(lambda name: outcome(path, name, steps), names)
    return dict(zip(names, found, strict=True))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("old", help="a checkout, or a file of --save")
  parser.add_argument("new", nargs="?", help="a checkout")
  parser.add_argument("--only", default=",".join(RUNS))
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--jobs", type=int, default=1, help="runs at once")
  parser.add_argument("--save", help="keep OLD's outcomes in this file")
  parser.add_argument("--same", default="", help="renamed metrics, old=new,...")
  args = parser.parse_args()
  names = args.only.split(",")
  old = outcomes(args.old, names, args.steps, args.jobs)
  if args.save:
    pathlib.Path(args.save).write_text(json.dumps(old))
  if not args.new:
    return 0
  new = outcomes(args.new, names, args.steps, args.jobs)
  renamed = dict(p.split("=") for p in args.same.split(",") if p)
  verdicts = {name: compare(old[name], new[name], renamed) for name in names}
  for name, verdict in verdicts.items():
    print(f"{name}: {verdict}")
  return int(any(verdict != "same" for verdict in verdicts.values()))


if __name__ == "__main__":
  sys.exit(main())
