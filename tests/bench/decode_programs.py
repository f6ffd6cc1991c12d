"""The sampler's programs: predicates a token, and compile time by depth.

Compiles a narrow model's sampler for a target that need not be there, once for
each kind of sampling settings, and counts the loops and conditionals of the
decoding loop whose course is computed: a GPU waits for the host at each. Then
once for each depth. Prints JSON lines.

    python tests/bench/decode_programs.py a6000
    python tests/bench/decode_programs.py v5litepod-1 --depths 24,36,80
    python tests/bench/decode_programs.py v5litepod-1 --depths 36 --unrolled 99
"""

import argparse
import json
import re
import time

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxalign.models import cache, causal
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.plan import hlo, targets
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler

SETTINGS = {
  "pure": {},
  "top_p": {"top_p": 0.9},
  "paper": {"top_p": 0.9, "repetition_penalty": 1.05},
  "top_k, top_p": {"top_k": 50, "top_p": 0.9},
  "greedy, no_repeat_ngram": {"temperature": 0, "no_repeat_ngram": 3},
}
PROMPTS, LENGTH, SAMPLES, NEW = 2, 16, 4, 16


def compiled(target, layers: int, width: int, chosen) -> tuple[str, float]:
  """The sampler's compiled program as text, and the seconds it took."""
  sizes = {"hidden_size": width, "intermediate_size": 4 * width}
  model = Model.build(
    NeoXConfig(vocab_size=512, layers=layers, heads=2, **sizes)
  )
  sharding = SingleDeviceSharding(target.devices()[0])
  drawn = settings.make(max_new_tokens=NEW, **chosen)
  tokens = np.ones((PROMPTS, LENGTH), np.int32)
  inputs = tokens, tokens > 0, np.arange(PROMPTS, dtype=np.int32), drawn
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (model.shapes, *inputs, jax.eval_shape(lambda: jax.random.key(0))),
  )
  start = time.perf_counter()
  lowered = Sampler(model)._jitted.sample.lower(
    *arguments, samples_per_prompt=SAMPLES, capacity=NEW
  )
  options = target.compiler_options
  text = lowered.compile(compiler_options=options).as_text()
  return text, time.perf_counter() - start


def predicates(module: hlo.Module, name: str) -> int:
  """Conditionals, and loops of unknown length, in a computation."""
  count = 0
  for line in module.computations[name].values():
    inner = re.findall(
      r"(?:body|to_apply|_computation)=%?([\w.\-]+)", line.line
    )
    for names in re.findall(r"branch_computations=\{([^}]*)\}", line.line):
      inner += re.findall(r"[\w.\-]+", names)
    if line.opcode in ("while", "conditional", "call"):
      known = line.opcode == "call" or "known_trip_count" in line.line
      count += not known
      count += sum(predicates(module, part) for part in inner)
  return count


def main() -> None:
  """Prints a line for each kind of settings, or for each depth."""
  parser = argparse.ArgumentParser()
  parser.add_argument("target", help="cpu, or as `jaxalign.plan --on` has it")
  parser.add_argument("--depths", help="layers, several by commas")
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--unrolled", type=int, default=cache.UNROLLED)
  args = parser.parse_args()
  target = targets.find(args.target)
  targets.prepare([target])
  # Both rooms have the name.
  cache.UNROLLED = causal.UNROLLED = args.unrolled
  bench = {"bench": "decode_programs", "target": args.target}
  if args.depths:
    for depth in map(int, args.depths.split(",")):
      _, seconds = compiled(target, depth, args.width, SETTINGS["paper"])
      row = {"layers": depth, "unrolled": depth <= args.unrolled}
      print(
        json.dumps(bench | row | {"seconds": round(seconds, 1)}), flush=True
      )
    return
  for name, chosen in SETTINGS.items():
    text, seconds = compiled(target, 2, args.width, chosen)
    module = hlo.parse(text, 1)
    loops = [
      1 + predicates(module, re.search(r"body=%?([\w.\-]+)", line.line)[1])
      for computation in module.computations.values()
      for line in computation.values()
      if line.opcode == "while" and "known_trip_count" not in line.line
    ]
    # The loop over tokens, in which a search may be.
    row = {"settings": name, "predicates": max(loops)}
    print(json.dumps(bench | row | {"seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
  main()
