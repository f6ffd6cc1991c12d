"""Every program of every method compiles for a TPU and for a GPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign.algorithms import METHODS
from jaxalign.plan import targets

SCRIPT = pathlib.Path(__file__).parent / "compile_programs.py"
# Programs are listed by hand: one that is no longer compiled is a failure too.
ONLINE = [
  "sample",
  "score reward_model",
  "evaluate: sample",
  "evaluate: score reward_model",
]
COMPACT = [
  prefix + name
  for prefix in ("", "evaluate: ")
  for name in ("sample: begin", "sample: unstack", "sample: fewer rows")
]
PAIRS = ["update", "update, shared prompts", "evaluate: loss"]
# Of a layer's four matrices two are gathered while others are multiplied, or
# more where a token's arithmetic takes longer; else none is gathered there.
SPLIT = "superhf, split layers"
PROGRAMS = {
  "superhf": [
    *ONLINE,
    "score test_reward_model",
    "evaluate: score test_reward_model",
    "update",
  ],
  "superhf, adapters": [*ONLINE, "update"],
  SPLIT: [
    *ONLINE,
    "score test_reward_model",
    "evaluate: score test_reward_model",
    "update",
  ],
  "ppo": [*ONLINE, "learn"],
  "ppo, shared values": [*ONLINE, "learn"],
  "online_dpo": [*ONLINE, *PAIRS[:2]],
  "sft": ["update", "evaluate: loss"],
  "sft, float32": ["update"],
  "sft, offload": ["update"],
  "sft, sequence": ["update"],
  "dpo": PAIRS,
  "dpo, stored": ["reference", "update"],
  "kto": ["update", "evaluate: loss", "evaluate: kl"],
  "kto, stored": ["reference"],
  "reward_model": ["update", "evaluate: score"],
  "reward_model, pair": ["update", "evaluate: score"],
}
# Attention's, in the update of texts that are long enough.
KERNELS = {
  "sft": {"v5litepod-4": "tpu_custom_call", "a6000": "__cudnn$fmha"},
  "sft, sequence": {"v5litepod-4": "tpu_custom_call", "a6000": "__cudnn$fmha"},
  "sft, float32": {"v5litepod-4": "tpu_custom_call", "a6000": "triton"},
}


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5litepod-4", "a6000"])
def test_every_program_compiles(target):
  if missing := targets.find(target).missing:
    pytest.skip(f"no compiler for {target}: {missing}")
  out = subprocess.run(
    [sys.executable, str(SCRIPT), target],
    capture_output=True,
    text=True,
    # Compiled as for users.
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
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
      # What `auto` means on the devices, not on the CPU of this process.
      asked = "float32" if row["case"].endswith("float32") else "bfloat16"
      assert row["dtype"] == asked, row
      if row["case"] in KERNELS and row["program"] == "update":
        assert row["kernels"] == [KERNELS[row["case"]][target]], row
      if target == "v5litepod-4":  # of a GPU's host the compiler knows nothing
        assert (row["host_bytes"] > 0) == (row["case"] == "sft, offload"), row
      if row["program"] == "sample":
        gathers = row["gathers_at_a_token"]
        if row["case"] == SPLIT and target == "v5litepod-4":
          assert gathers["overlapped"] >= 2, row
          assert gathers["waited"] <= 2, row
        else:
          assert gathers == {"waited": 0, "overlapped": 0}, row
      done.setdefault(row["case"], []).append(row["program"])
  wanted = dict(PROGRAMS)
  if target == "a6000":  # rows move on one device alone
    wanted["superhf, adapters"] = [*ONLINE, "update", *COMPACT]
  assert {case: sorted(names) for case, names in done.items()} == {
    case: sorted(names) for case, names in wanted.items()
  }
  assert {case.split(",")[0] for case in done} == set(METHODS)
