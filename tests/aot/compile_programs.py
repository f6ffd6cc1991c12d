"""Compiles every program of every method for devices that are not there.

    JAX_PLATFORMS=cpu python tests/aot/compile_programs.py v5e:2x2
    JAX_PLATFORMS=cpu python tests/aot/compile_programs.py a6000 [sft ppo ...]

A process of its own, because a compiler's fault may end it. Prints a JSON line
before each program and one after it: method, program, seconds, bytes.
"""

import json
import os
import pathlib
import sys
import time

from jax.experimental import topologies

from jaxalign import algorithms

# Else libtpu asks the cloud for minutes which machine it is on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

ROOT = pathlib.Path(__file__).parents[2]
LAB = ROOT / "jaxalign" / "lab"

# What XLA has to know of a card, from NVIDIA's data sheet and CUDA's tables.
A6000 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 102400
  shared_memory_per_block_optin: 101376 threads_per_core_limit: 1536
  core_count: 84 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 memory_bandwidth: 768096000000 l2_cache_size: 6291456
  clock_rate_ghz: 1.8 device_memory_size: 51041271808
  cuda_compute_capability { major: 8 minor: 6 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA RTX A6000"
"""

POLICY = {
  "policy": "init",
  "init": {
    "tokenizer": str(LAB / "policy"),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
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
    },
  },
  "ppo": ONLINE
  | {
    "rollout": {"prompts": 8, "samples_per_prompt": 4},
    "value_model": "separate",
    "target_kl": 0.1,
  },
  "ppo, shared values": {"value_model": "shared", "target_kl": 0.0},
  "online_dpo": ONLINE,
  "sft": HELD_OUT | {"packing": True},
  # Texts of the length from which kernels compute attention: on a GPU cuDNN,
  # and Triton for what that does not take.
  "sft, long": {"max_length": 128},
  "sft, long, float32": {
    "max_length": 128,
    "precision": {"compute": "float32"},
  },
  "dpo": HELD_OUT,
  "dpo, stored": {"reference": "stored"},
  "kto": HELD_OUT,
  "reward_model": HELD_OUT | {"head": "score_last"},
  "reward_model, pair": {"policy": "lab", "head": "auto"},
}


def devices(target):
  """Of a TPU slice by its topology, or one card."""
  if target == "a6000":
    found = topologies.get_topology_desc(
      "plan", "cuda", target_config=A6000, topology="1x1x1"
    )
  else:
    found = topologies.get_topology_desc(target, "tpu")
  return found.devices


def main(target, *methods):
  there = devices(target)
  # XLA cannot try tiles on a card that is not there.
  gpu = {"xla_gpu_enable_triton_gemm": False}
  options = gpu if target == "a6000" else None
  known = {}
  for case in methods or CASES:
    method = case.split(",")[0]
    fields = CASES[method] | CASES[case] | {"algorithm": method}
    spec = algorithms.describe(algorithms.read_config(fields), there)
    for program in algorithms.programs(spec):
      began = time.perf_counter()
      row = {"case": case, "program": program.name}
      print(json.dumps(row), flush=True)
      lowered = program.lower()
      text = lowered.as_text()
      # Methods share programs.
      if text not in known:
        known[text] = lowered.compile(compiler_options=options)
      memory = known[text].memory_analysis()
      row["temporary_bytes"] = memory.temp_size_in_bytes
      row["seconds"] = round(time.perf_counter() - began, 2)
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
