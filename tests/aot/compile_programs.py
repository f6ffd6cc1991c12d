"""Compiles every program of every method for devices that are not there.

    python tests/aot/compile_programs.py v5litepod-4
    python tests/aot/compile_programs.py a6000 [sft ppo ...]

A process of its own, because a fault in a compiler may end it. Prints a JSON
line before each program and one after it: case, program, number format,
seconds, temporary bytes.
"""

import json
import sys
import time

from jaxalign import algorithms
from jaxalign.plan import hlo, targets
from jaxalign.setup.models import LAB

LAYERS = 2
POLICY = {
  "policy": "init",
  "init": {
    "tokenizer": str(LAB / "policy"),
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
  },
  "batch_size": 8,
}
ONLINE = POLICY | {
  "prompts": "lab",
  "num_prompts": 24,
  "max_prompt_chars": 200,
  "sampling": {"max_new_tokens": 8},
  "evaluation": {"interval": 2, "num_prompts": 8, "best_of_n": 4},
  "steps": 4,
}
HELD_OUT = POLICY | {
  "max_length": 64,
  "validation_data": "lab",
  "validation_rows": 8,
}
# What the calls of attention kernels are named: splash, cuDNN, Pallas-Triton.
KERNELS = ("tpu_custom_call", "__cudnn$fmha", "triton")
# What follows a comma is added to the case of the method alone.
CASES = {
  "superhf": ONLINE
  | {
    "superbatch": {
      "mode": "prompt_accumulation",
      "prompts": 8,
      "samples_per_prompt": 4,
    },
    "kl_coefficient": 0.1,
    "test_reward_model": "lab",
    "validation_interval": 2,
  },
  # Everything that reshapes what is drawn, and texts without a reference.
  "superhf, adapters": {
    "policy": "lab",
    "lora": {"rank": 4},
    "kl_coefficient": -1.0,
    "test_reward_model": "",
    "validation_interval": 0,
    "sampling": {
      "max_new_tokens": 8,
      "min_new_tokens": 2,
      "temperature": 0.7,
      "top_p": 0.9,
      "top_k": 20,
      "repetition_penalty": 1.1,
      "no_repeat_ngram": 3,
      "compact": True,  # on one device
    },
  },
  # Layers that are gathered at each token, while others are multiplied.
  "superhf, split layers": {
    "mesh": {"fsdp": -1, "gather_for_generation": False}
  },
  "ppo": ONLINE
  | {
    "rollout": {"prompts": 8, "samples_per_prompt": 4},
    "value_model": "separate",
    "target_kl": 0.1,
  },
  # Over tensor where there are several devices, as replica and fsdp else.
  "ppo, shared values": {
    "value_model": "shared",
    "target_kl": 0.0,
    "mesh": {"tensor": -1},
  },
  "online_dpo": ONLINE,
  # Texts of the length from which kernels compute attention: on a GPU cuDNN,
  # and Triton for what that does not take.
  "sft": HELD_OUT | {"packing": True, "max_length": 128},
  "sft, float32": {"precision": {"compute": "float32"}},
  # What waits in the host's memory, and tokens of a row over all devices.
  "sft, offload": {
    "max_length": 64,
    "optimizer": {"offload": True},
    "remat": "offload",
  },
  "sft, sequence": {"mesh": {"fsdp": 1, "sequence": -1}},
  "dpo": HELD_OUT,
  "dpo, stored": {"reference": "stored"},
  "kto": HELD_OUT,
  "kto, stored": {"reference": "stored"},
  "reward_model": HELD_OUT | {"head": "score_last"},
  "reward_model, pair": {"policy": "lab", "head": "auto"},
}
# Of these cases, what differs most from the method's own.
ONLY = {
  "sft, float32": ["update"],
  "sft, offload": ["update"],
  "sft, sequence": ["update"],
  "dpo, stored": ["reference", "update"],
  "kto, stored": ["reference"],
}


def gathers_at_a_token(text):
  """Counts the gathers of a layer's parameters that each token causes.

  `waited`: nothing else is computed meanwhile; `overlapped`: something is. A
  TPU's program starts the latter in a fusion named `async-collective-start`. A
  loop over layers runs `LAYERS` times for the prompts, and again at each token.
  """
  found = {"waited": 0, "overlapped": 0}
  for line, _, times in hlo.parse(text, trips=1).runs():
    if times > LAYERS:
      gather = line.opcode == "all-gather"
      found["waited"] += gather and line.type.startswith("bf16")
      found["overlapped"] += line.name.startswith("async-collective-start")
  return found


def main(name, *chosen):
  target = targets.find(name)
  targets.prepare([target])
  devices = target.devices()
  known = {}
  for case in chosen or CASES:
    method = case.split(",")[0]
    fields = CASES[method] | CASES[case] | {"algorithm": method}
    spec = algorithms.describe(algorithms.read_config(fields), devices)
    for program in algorithms.programs(spec):
      if program.name not in ONLY.get(case, [program.name]):
        continue
      began = time.perf_counter()
      dtype = spec.policy.model.config.dtype
      row = {"case": case, "program": program.name, "dtype": dtype}
      print(json.dumps(row), flush=True)
      lowered = program.lower()
      text = lowered.as_text()
      row["kernels"] = [name for name in KERNELS if name in text]
      # Methods share programs.
      if text not in known:
        known[text] = lowered.compile(target.compiler_options)
      if program.name == "sample":
        row["gathers_at_a_token"] = gathers_at_a_token(known[text].as_text())
      memory = known[text].memory_analysis()
      row["temporary_bytes"] = memory.temp_size_in_bytes
      row["host_bytes"] = memory.host_argument_size_in_bytes
      row["seconds"] = round(time.perf_counter() - began, 2)
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
