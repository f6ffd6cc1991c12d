"""Does a plan say how much memory a run takes? Each method's lab run on a CPU.

Plans a run for this machine and runs its first steps in a process that finds no
compiled program; with `--warm` once more in one that finds all of them. Peaks
are those of the whole process (`memory/peak_bytes`).

    python tests/bench/plan_memory.py [--only=sft,superhf] [--steps=2] [--warm]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

RUNS = {
  "sft": ["configs/sft.py"],
  "superhf": ["configs/superhf.py"],
  "dpo": ["configs/dpo.py"],
  "kto": ["configs/kto.py"],
  "ppo": ["configs/ppo.py"],
  "reward_model": ["configs/reward_model.py"],
  # Arrays are most of its memory: 91 M parameters.
  "sft, 91 M": [
    "configs/sft.py",
    "--config.policy=init",
    "--config.init.tokenizer=jaxalign/lab/policy",
    "--config.init.hidden_size=768",
    "--config.init.num_hidden_layers=12",
    "--config.init.num_attention_heads=12",
    "--config.init.max_position_embeddings=512",
    "--config.checkpoint.every_steps=0",
    "--config.checkpoint.every_minutes=0",
  ],
}
ROOT = pathlib.Path(__file__).parents[2]


def command(module, config, *flags, cache):
  """Runs a command of the package; its standard output."""
  env = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }
  path, *fields = config
  line = [sys.executable, "-m", f"jaxalign.{module}", f"--config={path}"]
  done = subprocess.run(
    [*line, *fields, *flags], cwd=ROOT, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def measured(config, steps, folder, cache):
  """The peak of a run's process, in bytes."""
  flags = [f"--config.steps={steps}", f"--workdir={folder}"]
  command("main", config, *flags, cache=cache)
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  return max(json.loads(row)["memory/peak_bytes"] for row in rows)


def main():
  """Prints a line for each run."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--only", default=",".join(RUNS))
  parser.add_argument("--steps", type=int, default=2)
  parser.add_argument("--warm", action="store_true")
  args = parser.parse_args()
  for name, config in RUNS.items():
    if name.partition(",")[0] not in args.only.split(","):
      continue
    with tempfile.TemporaryDirectory() as folder:
      place = pathlib.Path(folder)
      flags = [f"--config.steps={args.steps}", "--on=cpu", "--quick", "--json"]
      text = command("plan", config, *flags, cache=place / "cache")
      plan = json.loads(text)
      peaks = {
        run: measured(config, args.steps, place / run, place / "cache")
        for run in ("cold", "warm")[: 1 + args.warm]
      }
    row = {
      "run": name,
      "process": plan["process_bytes"],
      "arrays": plan["peak_bytes"] - plan["process_bytes"],
      "planned": plan["peak_bytes"],
      **peaks,
      "error": round(plan["peak_bytes"] / peaks["cold"] - 1, 3),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
