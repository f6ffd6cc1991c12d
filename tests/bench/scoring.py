"""Reward scoring against transformers, both measured in one run.

256 texts of 32 to 512 tokens, random weights in DeBERTa-base's shape with
three layers, float32. transformers gets batches of 16 padded to their longest
text, in the given order and, as a further figure, sorted by length (batches of
32 are slower). The repeats of all sides take turns, so that other load on the
machine hits them alike, and each side's median counts. A repeat takes three
minutes on two cores. Prints one JSON line.

    python tests/bench/scoring.py [--repeats 1] [--texts 256]
"""

import argparse
import json
import statistics
import time
import types

import jax
import numpy as np
import torch
import transformers

from jaxalign.data.tokenizer import Notes
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.model import Model
from jaxalign.scoring.scorer import Scorer

VOCABULARY, WIDTH, HEADS, INNER, LAYERS = 32000, 768, 12, 3072, 3
SHORTEST, LONGEST, BATCH = 32, 512, 16


def texts(count):
  rng = np.random.default_rng(0)
  lengths = rng.integers(SHORTEST, LONGEST + 1, count)
  return [(rng.integers(1, VOCABULARY, n).tolist(), [0] * n) for n in lengths]


def ours(rows):
  """Scores the rows with this package."""
  config = DebertaConfig(VOCABULARY, WIDTH, LAYERS, HEADS, INNER)
  model = Model.build(config)
  params = model.init(jax.random.key(0))
  # The rows are ids already; of the tokenizer only its notes are asked.
  scorer = Scorer(model, params, tokenizer=types.SimpleNamespace(notes=Notes()))
  return lambda: scorer.score_ids(rows), scorer


def theirs():
  """Scores rows in batches, in the order they come."""
  config = transformers.DebertaV2Config(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=INNER,
    relative_attention=True,
    position_biased_input=False,
    position_buckets=256,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    num_labels=1,
  )
  torch.manual_seed(0)
  model = transformers.DebertaV2ForSequenceClassification(config).eval()

  @torch.inference_mode()
  def score(rows):
    out = []
    for start in range(0, len(rows), BATCH):
      batch = [ids for ids, _ in rows[start : start + BATCH]]
      longest = max(map(len, batch))
      ids = torch.tensor([x + [0] * (longest - len(x)) for x in batch])
      mask = torch.tensor(
        [[1] * len(x) + [0] * (longest - len(x)) for x in batch]
      )
      out.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
    return torch.cat(out).numpy()

  return score


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--texts", type=int, default=256)
  flags = parser.parse_args()
  rows = texts(flags.texts)
  in_order = sorted(rows, key=lambda row: len(row[0]))
  mine, scorer = ours(rows)
  torch_score = theirs()
  sides = {
    "ours": mine,
    "torch": lambda: torch_score(rows),
    "torch_sorted": lambda: torch_score(in_order),
  }
  mine()  # compiles
  torch_score(rows[:BATCH])
  wall = {name: [] for name in sides}
  work = {name: [] for name in sides}
  for _ in range(flags.repeats):
    for name, run in sides.items():
      start, spent = time.perf_counter(), time.process_time()
      assert np.isfinite(run()).all()
      wall[name].append(time.perf_counter() - start)
      work[name].append(time.process_time() - spent)
  seconds = {name: statistics.median(found) for name, found in wall.items()}
  cpu = {name: statistics.median(found) for name, found in work.items()}
  print(
    json.dumps(
      {
        "benchmark": "scoring",
        "shape": f"DeBERTa-base, {LAYERS} layers, {flags.texts} texts of "
        f"{SHORTEST}-{LONGEST} tokens, float32",
        "device": jax.devices()[0].device_kind,
        "tokens": sum(len(ids) for ids, _ in rows),
        "programs": scorer.traces,
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "cpu_seconds": {name: round(s, 2) for name, s in cpu.items()},
        "speedup": round(seconds["torch"] / seconds["ours"], 2),
        "speedup_cpu_seconds": round(cpu["torch"] / cpu["ours"], 2),
        "speedup_over_sorted": round(
          seconds["torch_sorted"] / seconds["ours"], 2
        ),
      }
    )
  )


if __name__ == "__main__":
  main()
