"""Answers of 8 to 256 tokens: whole batches against batches that shrink.

Random weights in Pythia-70M's width and depth, float32, with a vocabulary of
1,024 of which eight tokens end an answer: lengths are geometric from 8 tokens
on, mean about 120, cut at 256. Once 64 samples of one prompt, once 4 of 16
prompts. Both sides by turns; the tokens must be equal. Prints one JSON line.

    python tests/bench/compaction.py [--repeats 3]
"""

import argparse
import dataclasses
import json
import os
import statistics
import time

import jax
import numpy as np

from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler

SIZE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048}
SHAPES = {"1x64": (1, 64), "16x4": (16, 4)}  # prompts x samples
SHORTEST, LONGEST, ENDS = 8, 256, range(0, 1024, 128)


def main() -> None:
  """Draws the same samples both ways, by turns."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=3)
  repeats = parser.parse_args().repeats
  model = Model.build(NeoXConfig(**SIZE, layers=6, heads=8))
  params = model.init(jax.random.key(0))
  whole = Sampler(model)
  sides = {"whole": whole, "compact": dataclasses.replace(whole, compact=True)}
  drawn = settings.make(
    min_new_tokens=SHORTEST, max_new_tokens=LONGEST, eos_ids=ENDS
  )
  report = {
    "bench": "compaction",
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
  }
  for name, (prompts, samples) in SHAPES.items():
    rows = [list(range(1 + i, 65 + i)) for i in range(prompts)]
    times = {side: [] for side in sides}
    lengths = []
    for repeat in range(repeats + 1):  # the first turn compiles
      found = {}
      for side, sampler in sides.items():
        start = time.perf_counter()
        found[side] = sampler(
          params, rows, drawn, jax.random.key(0), samples_per_prompt=samples
        )
        times[side].append(time.perf_counter() - start)
      same = np.array_equal(found["whole"].tokens, found["compact"].tokens)
      assert same, f"{name}, turn {repeat}: other tokens"
      lengths = found["whole"].lengths
    spread = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1))
    medians = {s: statistics.median(x[1:]) for s, x in times.items()}
    report[name] = {
      "lengths": spread.astype(int).tolist(),
      **{f"{s}_s": round(x, 2) for s, x in medians.items()},
      "first_s": {s: round(x[0], 1) for s, x in times.items()},
      "ratio": round(medians["whole"] / medians["compact"], 2),
    }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
