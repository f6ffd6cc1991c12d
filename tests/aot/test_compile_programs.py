"""Every program of every method compiles for a TPU and for a GPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign.algorithms import METHODS

SCRIPT = pathlib.Path(__file__).parent / "compile_programs.py"
# Programs are listed by hand: one that is no longer compiled is a failure too.
ONLINE = [
  "sample",
  "score reward_model",
  "evaluate: sample",
  "evaluate: score reward_model",
]
PAIRS = ["update", "update, shared prompts", "evaluate: loss"]
PROGRAMS = {
  "superhf": [
    *ONLINE,
    "score test_reward_model",
    "evaluate: score test_reward_model",
    "update",
  ],
  "superhf, adapters": [*ONLINE, "update"],
  "ppo": [*ONLINE, "learn"],
  "ppo, shared values": [*ONLINE, "learn"],
  "online_dpo": [*ONLINE, *PAIRS[:2]],
  "sft": ["update", "evaluate: loss"],
  "sft, long": ["update", "evaluate: loss"],
  "sft, long, float32": ["update", "evaluate: loss"],
  "dpo": PAIRS,
  "dpo, stored": ["reference", *PAIRS],
  "kto": ["update", "evaluate: loss", "evaluate: kl"],
  "reward_model": ["update", "evaluate: score"],
  "reward_model, pair": ["update", "evaluate: score"],
}


@pytest.mark.aot
@pytest.mark.parametrize(
  ("target", "module", "extra"),
  [
    ("v5e:2x2", "libtpu", "plan-tpu"),
    ("a6000", "jax_plugins.xla_cuda13", "plan-gpu"),
  ],
)
def test_every_program_compiles(target, module, extra):
  if not _installed(module):
    pytest.skip(f"the compiler is missing: pip install -e '.[{extra}]'")
  out = subprocess.run(
    [sys.executable, str(SCRIPT), target],
    capture_output=True,
    text=True,
    # Compiled as for users, and each time: nothing is taken from a cache.
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "",
      "JAX_COMPILATION_CACHE_DIR": "",
    },
  )
  rows = [
    json.loads(line) for line in out.stdout.splitlines() if line[:1] == "{"
  ]
  # The last row says what was being compiled when the process ended.
  last = rows[-1] if rows else {}
  assert out.returncode == 0, f"{last}\n{out.stderr[-4000:]}"
  done: dict[str, list[str]] = {}
  for row in rows:
    if "seconds" in row:
      print(row)
      done.setdefault(row["case"], []).append(row["program"])
  assert {case: sorted(names) for case, names in done.items()} == {
    case: sorted(names) for case, names in PROGRAMS.items()
  }
  assert {case.split(",")[0] for case in done} == set(METHODS)


def _installed(module: str) -> bool:
  parent = module.partition(".")[0]
  return bool(
    importlib.util.find_spec(parent) and importlib.util.find_spec(module)
  )
