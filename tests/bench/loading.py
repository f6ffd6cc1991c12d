"""What loading a model takes beyond its arrays: memory and seconds.

Random weights in a LLaMA shape of 0.5 GB, float32, written once and read by a
new process onto pretended CPU devices, split over all of them. On a CPU the
arrays are host memory themselves, so the peak of resident memory less the
arrays is what loading adds: mapped pages of the file and buffers. Prints one
JSON line.

    python tests/bench/loading.py [--devices 8]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.hf import folder
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes


def peak():
  """Bytes; `ru_maxrss` would begin with the parent's."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) * 1024


def read(path):
  """Reads the model of a folder and prints what that took."""
  jax.block_until_ready(jnp.zeros(4) + 1)  # the backend's own memory
  opened = folder.open_pretrained(path)
  shardings = meshes.shardings(opened.model.shapes, meshes.make_mesh(fsdp=-1))
  before, start, cpu = peak(), time.perf_counter(), time.process_time()
  leaves = jax.tree.leaves(jax.block_until_ready(opened.read(shardings)))
  took, work = time.perf_counter() - start, time.process_time() - cpu
  arrays = sum(leaf.nbytes for leaf in leaves)
  shard = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
  beyond = peak() - before - arrays
  values = {
    "devices": jax.device_count(),
    "arrays_mb": arrays / 1e6,
    "largest_shard_mb": shard / 1e6,
    "beyond_mb": beyond / 1e6,
    "beyond_per_shard": beyond / shard,
    "seconds": took,
    "cpu_seconds": work,
  }
  print(json.dumps({name: round(value, 3) for name, value in values.items()}))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--read", help="a folder: reads it in this process")
  args = parser.parse_args()
  if args.read:
    read(args.read)
    return
  model = Model.build(LlamaConfig(32000, 768, 8, 8, 8, 96, 3072))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.random(s.shape, np.float32), model.shapes)
  flags = f"--xla_force_host_platform_device_count={args.devices}"
  with tempfile.TemporaryDirectory() as path:
    folder.save(model, params, path)
    command = [sys.executable, __file__, "--read", path]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
  main()
