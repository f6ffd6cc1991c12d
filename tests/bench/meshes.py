"""Does a mesh change what a run computes? Every method on eight CPU devices.

Runs each method for three steps on one device and on four meshes of eight,
which a process pretends to have, and compares metrics to 1e-4 and the samples
letter for letter. SuperHF samples greedily; PPO and online DPO have to draw.

    python tests/bench/meshes.py [--only=sft,superhf] [--steps=3]
      [--meshes="1,8,1,1 1,2,1,4"]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROWS = ["--config.batch_size=8", "--config.max_length=64"]
GREEDY = [
  "--config.sampling.top_k=1",
  "--config.sampling.max_new_tokens=8",
]
METHODS = {
  "sft": ["sft.py", *ROWS],
  "reward_model": ["reward_model.py", *ROWS],
  "dpo": ["dpo.py", *ROWS],
  "kto": ["kto.py", *ROWS],
  "superhf": [
    "superhf.py",
    "--config.superbatch.samples_per_prompt=2",
    *GREEDY,
  ],
  "online_dpo": [
    "dpo.py:online",
    "--config.batch_size=8",
    "--config.validation_interval=0",
    "--config.sampling.max_new_tokens=8",
  ],
  "ppo": [
    "ppo.py",
    "--config.rollout.prompts=16",
    "--config.kl.coefficient=0.05",
    "--config.sampling.max_new_tokens=8",
    # Adam makes a whole step of a gradient that is nothing but rounding, and a
    # later draw may then fall the other way.
    "--config.optimizer.eps=1e-3",
  ],
}
# Devices of replica, fsdp, tensor and sequence.
MESHES = ("1,1,1,1", "1,8,1,1", "1,4,2,1", "2,2,2,1", "1,2,1,4")
LEFT_OUT = ("time/", "throughput/", "memory/", "host/")
TOLERANCE = 1e-4  # absolute, and relative to the one device's value
# Eight devices share few cores, so one may be late at a meeting point. XLA ends
# the process after 40 s of that.
PATIENCE = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
  "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
RUN = """
import sys
from jaxalign import main
for sizes in sys.argv.pop(1).split():
  names = "replica", "fsdp", "tensor", "sequence"
  axes = zip(names, sizes.split(","))
  status = main.main([
    *sys.argv[2:], f"--workdir={sys.argv[1]}/{sizes}",
    *[f"--config.mesh.{axis}={size}" for axis, size in axes],
  ])
  assert status == 0, (sizes, status)
"""


def run(name: str, steps: int, others: list[str], folder: pathlib.Path) -> str:
  """ "same", with the largest difference; or what went wrong."""
  config, *flags = METHODS[name]
  meshes = [MESHES[0], *others]
  done = subprocess.run(
    [
      *(sys.executable, "-c", RUN, " ".join(meshes), str(folder)),
      *("--config", f"configs/{config}", f"--config.steps={steps}", *flags),
      "--config.checkpoint.every_steps=0",
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {PATIENCE}",
    },
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    return "FAILED: " + "\n".join(done.stderr.strip().splitlines()[-3:])
  one, *found = (read(folder / sizes) for sizes in meshes)
  worst, where = 0.0, ""
  for sizes, (rows, samples) in zip(others, found, strict=True):
    if samples != one[1]:
      return f"DIFFERS: samples on {sizes}"
    for a, b in zip(one[0], rows, strict=True):
      for key in (a.keys() | b.keys()) - {
        key for key in a if key.startswith(LEFT_OUT)
      }:
        x, y = a.get(key), b.get(key)
        if x == y or not isinstance(x, float | int):
          continue
        off = abs(x - y) / max(1, abs(x))
        if off > worst:
          worst, where = off, f"{key} on {sizes}, {x} and {y}"
  verdict = "same" if worst <= TOLERANCE else "DIFFERS"
  return f"{verdict}: {worst:.1e}" + (f" ({where})" if where else "")


def read(folder: pathlib.Path) -> tuple[list[dict], list[str]]:
  """Metrics of each step, and what was written."""
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  samples = folder / "samples.jsonl"
  lines = samples.read_text().splitlines() if samples.exists() else []
  texts = [json.loads(line).get("completion") for line in lines]
  return [json.loads(row) for row in rows], texts


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default=",".join(METHODS))
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--meshes", default=" ".join(MESHES[1:]))
  args = parser.parse_args()
  verdicts = {}
  for name in args.only.split(","):
    with tempfile.TemporaryDirectory(prefix="meshes-") as folder:
      verdicts[name] = run(
        name, args.steps, args.meshes.split(), pathlib.Path(folder)
      )
    print(f"{name}: {verdicts[name]}", flush=True)
  return int(any(not v.startswith("same") for v in verdicts.values()))


if __name__ == "__main__":
  sys.exit(main())
