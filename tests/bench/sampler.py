"""Sampler against transformers.generate, both measured in one run.

Random weights in Pythia-70M's shape, float32, one 64-token prompt, 32
samples, 64 new tokens; once with pure sampling, once with top-p 0.9 and
repetition penalty 1.05. Prints one JSON line.

    python tests/bench/sampler.py [--repeats 5]
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
import torch
import transformers

from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler

SIZE = {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048}
LAYERS, HEADS, SAMPLES, PROMPT, NEW = 6, 8, 32, 64, 64
SETTINGS = {
  "paper": {"top_p": 0.9, "repetition_penalty": 1.05},
  "pure": {},
}


def ours():
  """A function that draws with the given settings, by this package."""
  model = Model.build(NeoXConfig(**SIZE, layers=LAYERS, heads=HEADS))
  params = model.init(jax.random.key(0))
  sampler = Sampler(model)
  prompt = list(range(1, PROMPT + 1))

  def draw(seed, **chosen):
    drawn = settings.make(max_new_tokens=NEW, **chosen)
    key = jax.random.key(seed)
    out = sampler(params, [prompt], drawn, key, samples_per_prompt=SAMPLES)
    assert out.tokens.shape == (SAMPLES, NEW)
    assert (out.lengths == NEW).all()

  return draw


def theirs():
  """A function that draws with the given settings, by transformers."""
  config = transformers.GPTNeoXConfig(
    **SIZE, num_hidden_layers=LAYERS, num_attention_heads=HEADS
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  prompt = torch.arange(1, PROMPT + 1)[None]

  def draw(seed, **chosen):
    torch.manual_seed(seed)
    with torch.inference_mode():
      out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        num_return_sequences=SAMPLES,
        min_new_tokens=None,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        top_k=0,
        **chosen,
      )
    assert out.shape == (SAMPLES, PROMPT + NEW)

  return draw


def main() -> None:
  """Interleaves the two sides, so that a busy machine slows both."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=5)
  repeats = parser.parse_args().repeats
  sides = {"jaxalign": ours(), "transformers": theirs()}
  times = {(name, side): [] for name in SETTINGS for side in sides}
  for repeat in range(repeats + 1):
    for (name, side), seconds in times.items():
      start = time.perf_counter()
      sides[side](repeat, **SETTINGS[name])
      seconds.append(time.perf_counter() - start)
  report = {
    "bench": "sampler",
    "shape": f"{SAMPLES}x({PROMPT}+{NEW}) Pythia-70M float32",
    "device": jax.devices()[0].device_kind,
    "cores": len(__import__("os").sched_getaffinity(0)),
  }
  for name in SETTINGS:
    both = {s: np.array(times[name, s][1:]) for s in sides}
    medians = {s: statistics.median(x) for s, x in both.items()}
    report[name] = {
      **{f"{s}_s": round(x, 3) for s, x in medians.items()},
      "ratio": round(medians["transformers"] / medians["jaxalign"], 2),
      "tokens_per_s": round(SAMPLES * NEW / medians["jaxalign"]),
    }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
