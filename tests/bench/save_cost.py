"""What a checkpoint costs the steps around it.

Random weights in Pythia-70M's shape, float32, AdamW (a state of 0.8 GB), SFT
steps on 8 rows of 128 tokens. Groups of steps with a save after the first one
and groups without take turns; the difference of their medians is what a save
costs, the wait for the writer to finish included. Prints one JSON line: the
cost as a share of `--every` steps, in wall time and, for busy machines, in CPU
time.

    python tests/bench/save_cost.py [--group 3] [--repeats 3] [--every 50]
"""

import argparse
import json
import tempfile
import time

import jax
import numpy as np
import versus

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.train import make_update
from jaxalign.core import optim
from jaxalign.core.types import TextBatch
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import cpu
from jaxalign.runtime.checkpoint import Checkpointer

ROWS, LENGTH = 8, 128


def make_run():
  """A run with its first state; no folder."""
  model = Model.build(NeoXConfig(50304, 512, 6, 8, 2048))
  optimizer = optim.make_optimizer(
    "adamw", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0.0
  )
  params = model.init(jax.random.key(0))
  return versus.bare_run(SFTConfig(), model, params, optimizer, 1e-5)


def now():
  return np.array([time.perf_counter(), time.process_time()])


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--group", type=int, default=3)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--every", type=int, default=50)
  parser.add_argument("--sha256", action="store_true")
  args = parser.parse_args()
  cpu.keep_freed_memory()  # as jaxalign.main
  run = make_run()
  update = run.jit(make_update(run))
  tokens = np.random.default_rng(0).integers(0, 50304, (1, ROWS, LENGTH))
  tokens = tokens.astype(np.int32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  batch = TextBatch(tokens, positions, ones, ones == 1)
  state, _ = update(run.state, batch, run.key)  # compiled
  # (by the clock, of the CPU)
  spent = {"plain": [], "saved": []}
  blocked = []
  with tempfile.TemporaryDirectory() as folder:
    saver = Checkpointer(folder, keep=1, sha256=args.sha256)
    for i in range(2 * args.repeats):
      kind = "saved" if i % 2 else "plain"
      jax.block_until_ready(state)
      start = now()
      for step in range(args.group):
        state, _ = update(state, batch, run.key)
        if kind == "saved" and step == 0:
          jax.block_until_ready(state)
          begun = now()
          saver.save(i + 1, state, {})
          blocked.append(now() - begun)
      jax.block_until_ready(state)
      saver.wait()
      spent[kind].append(now() - start)
    saver.close()
  plain, saved = (np.median(spent[k], axis=0) for k in ("plain", "saved"))
  step = plain / args.group
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  print(
    json.dumps(
      {
        "state_gb": round(size / 1e9, 3),
        "sha256": args.sha256,
        "step_s": step.round(3).tolist(),
        "save_s": (saved - plain).round(3).tolist(),
        "of_it_blocked_s": np.median(blocked, axis=0).round(3).tolist(),
        "share": ((saved - plain) / (args.every * step)).round(4).tolist(),
        "all_s": {k: np.round(v, 2).tolist() for k, v in spent.items()},
      }
    )
  )


if __name__ == "__main__":
  main()
