"""One SFT step against torch, both measured in one run.

Random weights in Pythia-70M's shape, float32, 8 rows of 128 tokens whose
completion (half of a row, give or take) alone counts, AdamW. torch gets
transformers' model, the same rows with labels -100 on the prompt, its own
loss and `torch.optim.AdamW`. Both sides start from the same weights and must
report the same losses. The repeats take turns, so that other load on the
machine hits both alike, and each side's median counts. Prints one JSON line.

    python tests/bench/sft_step.py [--repeats 7]
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers
import versus

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.train import make_update
from jaxalign.core import optim
from jaxalign.core.types import TextBatch
from jaxalign.models.hf import folder

SIZE = {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048}
LAYERS, HEADS, ROWS, LENGTH = 6, 8, 8, 128
RATE, BETAS, EPS, DECAY = 1e-5, (0.9, 0.999), 1e-8, 0.01


def rows(seed):
  """Tokens `[B, T]` and the mask of the completions, 32 to 96 tokens each."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, SIZE["vocab_size"], (ROWS, LENGTH), np.int32)
  prompts = np.linspace(32, LENGTH - 32, ROWS).round().astype(int)
  return tokens, np.arange(LENGTH) >= prompts[:, None]


def ours(path):
  """A function that takes one step and returns its loss."""
  model, params = folder.load(path)
  optimizer = optim.make_optimizer(
    "adamw",
    beta1=BETAS[0],
    beta2=BETAS[1],
    eps=EPS,
    weight_decay=DECAY,
    clip_norm=0.0,
  )
  run = versus.bare_run(SFTConfig(), model, params, optimizer, RATE)
  update = run.jit(make_update(run))
  held = {"state": run.state}

  def step(tokens, mask):
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape)
    batch = TextBatch(tokens, positions, np.ones_like(tokens), mask)
    batch = jax.tree.map(lambda x: x[None], batch)
    held["state"], metrics = update(held["state"], batch, run.key)
    jax.block_until_ready(held["state"])
    return float(metrics["loss/nll"])

  return step


def theirs(model):
  """A function that takes one step and returns its loss."""
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY
  )
  model.train()

  def step(tokens, mask):
    ids = torch.from_numpy(tokens.astype(np.int64))
    labels = torch.where(torch.from_numpy(mask), ids, -100)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=7)
  repeats = parser.parse_args().repeats
  config = transformers.GPTNeoXConfig(
    **SIZE, num_hidden_layers=LAYERS, num_attention_heads=HEADS
  )
  torch.manual_seed(0)
  model = transformers.GPTNeoXForCausalLM(config)
  with tempfile.TemporaryDirectory() as path:
    model.save_pretrained(path)
    sides = {"jaxalign": ours(path), "torch": theirs(model)}
  wall = {name: [] for name in sides}
  work = {name: [] for name in sides}
  losses = {name: [] for name in sides}
  for repeat in range(repeats + 1):  # the first compiles
    for name, step in sides.items():
      start, spent = time.perf_counter(), time.process_time()
      losses[name].append(step(*rows(repeat)))
      wall[name].append(time.perf_counter() - start)
      work[name].append(time.process_time() - spent)
  np.testing.assert_allclose(losses["jaxalign"], losses["torch"], rtol=1e-4)
  seconds = {n: statistics.median(found[1:]) for n, found in wall.items()}
  cpu = {n: statistics.median(found[1:]) for n, found in work.items()}
  report = {
    "bench": "sft_step",
    "shape": f"{ROWS}x{LENGTH} Pythia-70M float32, half of it counted, AdamW",
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[0], 1),
    "seconds": {name: round(s, 3) for name, s in seconds.items()},
    "cpu_seconds": {name: round(s, 3) for name, s in cpu.items()},
    "speedup": round(seconds["torch"] / seconds["jaxalign"], 2),
    "speedup_cpu_seconds": round(cpu["torch"] / cpu["jaxalign"], 2),
    "tokens_per_s": round(ROWS * LENGTH / seconds["jaxalign"]),
  }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
