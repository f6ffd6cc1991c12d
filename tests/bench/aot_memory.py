"""Memory and traffic of a program on chips that are not there.

Compiles a step for a TPU topology ahead of time (needs libtpu, no TPU) and
prints one JSON line: bytes a chip of state and of temporary arrays, and what
the chips send each other, in all and in a layer.

    JAX_PLATFORMS=cpu python tests/bench/aot_memory.py sft
    JAX_PLATFORMS=cpu python tests/bench/aot_memory.py superhf --fsdp 16
    JAX_PLATFORMS=cpu python tests/bench/aot_memory.py sample --rows 512
"""

import argparse
import collections
import dataclasses
import json
import operator
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxalign.algorithms.sft import train as sft
from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.superhf import train as superhf
from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.algorithms.superhf.data import KeptBatch
from jaxalign.core import memory, optim
from jaxalign.core.types import TextBatch
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.plan import collectives, hlo
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler
from jaxalign.training.run import Run

SHAPES = {
  "pythia-70m": (512, 6, 8, 2048),
  "pythia-1b": (2048, 16, 8, 8192),
  "pythia-6.9b": (4096, 32, 32, 16384),
  "65b": (8192, 80, 64, 32768),
}
GIB = 2**30
UNKNOWN = 1_000_003  # a prime, to be found again in products


def model_of(args):
  width, layers, heads, inner = SHAPES[args.model]
  config = NeoXConfig(
    vocab_size=50304,
    hidden_size=width,
    layers=args.layers or layers,
    heads=heads,
    intermediate_size=inner,
    dtype="bfloat16",
    remat=args.remat,
    attention=args.attention,
  )
  return Model.build(config)


def update_of(args, model, mesh):
  """The compiled update of SFT, or of SuperHF with a live reference."""
  optimizer = optim.make_optimizer(
    "adamw", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0
  )
  schedule = optim.make_schedule("constant", peak=1e-5, warmup_steps=0, steps=9)
  state = meshes.with_shardings(
    jax.eval_shape(lambda p: optim.init_state(p, optimizer), model.shapes), mesh
  )
  if args.offload:
    waiting = memory.to_host(state.opt_state)
    state = dataclasses.replace(state, opt_state=waiting)
  with_kl = args.program == "superhf"
  reference = model, meshes.with_shardings(model.shapes, mesh)
  run = Run(
    SuperHFConfig(kl_coefficient=0.1) if with_kl else SFTConfig(),
    model,
    state,
    frozen={},
    reference=reference if with_kl else None,
    mesh=mesh,
    recorder=None,
    optimizer=optimizer,
    schedule=schedule,
    shardings=jax.tree.map(operator.attrgetter("sharding"), state),
  )
  shape = (1, args.rows, args.length)
  ids = np.broadcast_to(np.int32(0), shape)
  batch = TextBatch(ids, ids, ids, ids.astype(bool))
  if with_kl:
    shifted = np.broadcast_to(np.float32(0), (*shape[:2], shape[2] - 1))
    batch = KeptBatch(batch, shifted, shifted.astype(bool))
  update = (superhf if with_kl else sft).make_update(run)
  return run.jit(update).program(batch).lower()


def sample_of(args, model, mesh):
  sampler = Sampler(model, mesh=mesh, gather=not args.split)
  prompts = args.rows // args.samples
  drawn = settings.make(max_new_tokens=args.new, top_p=0.9, eos_ids=(1,))
  params = meshes.with_shardings(model.shapes, mesh)
  program, *_ = sampler.programs(
    params, prompts, args.length, drawn, args.samples
  )
  return program.lower()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("program", choices=("sft", "superhf", "sample"))
  parser.add_argument("--on", default="v5e:4x4")
  parser.add_argument("--model", default="pythia-1b", choices=SHAPES)
  parser.add_argument("--layers", type=int, default=0, help="0 = all")
  parser.add_argument("--replica", type=int, default=1)
  parser.add_argument("--fsdp", type=int, default=0, help="0 = all chips left")
  parser.add_argument("--tensor", type=int, default=1)
  parser.add_argument("--sequence", type=int, default=1)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--samples", type=int, default=16, help="a prompt")
  parser.add_argument("--new", type=int, default=64, help="tokens to sample")
  parser.add_argument(
    "--split", action="store_true", help="layers are gathered token by token"
  )
  parser.add_argument("--remat", default="none")
  parser.add_argument("--attention", default="dense", help="or splash")
  parser.add_argument(
    "--offload", action="store_true", help="the optimizer's state, to the host"
  )
  parser.add_argument("--hlo", help="a file to write the program to")
  args = parser.parse_args()
  devices = topologies.get_topology_desc(args.on, "tpu").devices
  others = args.replica * args.sequence * args.tensor
  fsdp = args.fsdp or len(devices) // others
  sizes = (args.replica, fsdp, args.sequence, args.tensor)
  mesh = Mesh(
    np.array(devices[: int(np.prod(sizes))]).reshape(sizes), meshes.AXES
  )
  model = model_of(args)
  start = time.monotonic()
  make = sample_of if args.program == "sample" else update_of
  compiled = make(args, model, mesh).compile()
  text = compiled.as_text()
  if args.hlo:
    with open(args.hlo, "w") as file:
      file.write(text)
  used = compiled.memory_analysis()
  # Loops that do not say how often they run are those of tokens or chunks.
  module = hlo.parse(text, trips=UNKNOWN)
  found, arrays = collections.Counter(), collections.Counter()
  for line, times in collectives.exchanges(module):
    kind, size = collectives.kind_and_bytes(module, line)
    unknown, times = times % UNKNOWN == 0, times // UNKNOWN or times
    where = f"{'a loop, ' if unknown else ''}{times} x"
    arrays[f"{where} {kind} {line.type.partition('{')[0]}"] += 1
    found[f"{where} {kind}"] += size
  for name, times in arrays.most_common():
    print(f"{times:4} {name}")
  print(
    json.dumps(
      {
        "program": args.program,
        "on": args.on,
        "mesh": sizes,
        "model": args.model,
        "layers": model.config.layers,
        "rows": args.rows,
        "length": args.length,
        "state_gib": round(used.argument_size_in_bytes / GIB, 3),
        "host_gib": round(used.host_argument_size_in_bytes / GIB, 3),
        "temp_gib": round(used.temp_size_in_bytes / GIB, 3),
        "peak_gib": round(used.peak_memory_in_bytes / GIB, 3),
        # Of one chip; a loop's body counts once.
        "gflop": round(compiled.cost_analysis()["flops"] / 1e9, 1),
        "mb": {k: round(v / 1e6, 1) for k, v in found.items()},
        "compile_s": round(time.monotonic() - start, 1),
      }
    )
  )


if __name__ == "__main__":
  main()
