"""How near an accelerator's limits the compiled programs come.

An SFT step, a SuperHF step (sample, score, update) and decoding, with random
weights in the shapes of Pythia-1B and 410M: tokens a second, the share of the
peak in arithmetic (MFU) and in memory traffic (HBM), and beside each the time
that the roofline allows. On a CPU the same with Pythia-70M's shape, against
the machine's own matrix product and copy.

    python tests/bench/accelerator.py
    python tests/bench/accelerator.py --against=transformers,vllm
    python tests/bench/accelerator.py --shapes=pythia-1b --only=sft,decode-32x64
    python tests/bench/accelerator.py --only=sft --attention=dense

It needs jax, flax, optax and what these bring, and no network: of this package
it imports the models, the sampler, the scorer, `plan.targets` (the makers'
peaks), and `training.run` with the `train.py` of two methods, which reach Orbax
(a part of flax) through the run's recorder. It reads no config file, data set
or tokenizer, so ml_collections, datasets and transformers are not imported.
jaxtyping, whose annotations do nothing here, is replaced where it is not
installed. `--against` needs torch.

What is counted: 2 operations a parameter and token forward and twice that
backward, the table of embeddings left out; 4 T D more a layer and token for
attention over T tokens; nothing for what is computed again. Bytes: an update
reads and writes parameters, gradients and Adam's averages, 32 a parameter; a
decoded token reads all weights once and every row's keys and values. A
roofline's time is the sum over phases (update: gradients, optimizer; decoding:
each token) of what takes longer, arithmetic or memory.

Every measurement has a process of its own. One that runs out of memory is
tried again with half the rows. Prints a JSON line each, then a table.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = ("jax", "flax", "optax", "numpy")
SIDES = {"transformers": ("torch", "transformers"), "vllm": ("vllm",)}

# A part of jax's `device_kind` -> the chip's name in `jaxalign.plan.targets`;
# the first that fits. Others are held against their own products.
CHIPS = {
  " H200": "h200",  # not GH200
  "H100 80GB HBM3": "h100",
  "A100-SXM4-40GB": "a100-40",
  "A100-SXM4-80GB": "a100-80",
  "RTX A6000": "a6000",
  "RTX 4090": "rtx4090",
  "TPU v6 lite": "v6e",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v4": "v4",
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """A policy's sizes, and those of the reward model that judges it."""

  hidden: int
  layers: int
  heads: int
  reward: tuple[int, int, int]  # DeBERTa's width, layers, vocabulary
  vocab: int = 50304


SHAPES = {
  "pythia-1b": Shape(2048, 16, 8, (1024, 24, 128100)),
  "pythia-410m": Shape(1024, 24, 16, (1024, 24, 128100)),
  "pythia-70m": Shape(512, 6, 8, (768, 3, 8192)),
}
# Rows, tokens of a row. On a CPU a step must end within seconds.
SFT = {"accelerator": (8, 1024), "cpu": (4, 128)}
# Prompts, completions of each, tokens of a prompt, new tokens.
SUPERHF = {"accelerator": (8, 32, 64, 64), "cpu": (2, 8, 32, 32)}
DECODE = {"32x64": (1, 32, 64, 64), "256x256": (8, 32, 64, 256)}
PAPER = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.05}


@dataclasses.dataclass(frozen=True)
class Peaks:
  """What a machine can do at most, a second."""

  flops: float
  bytes: float

  def seconds(self, flops: float, moved: float) -> float:
    """The least time of a phase."""
    return max(flops / self.flops, moved / self.bytes)


@dataclasses.dataclass
class Work:
  """What a program has to do at least."""

  flops: float = 0.0
  bytes: float = 0.0
  seconds: float = 0.0  # by the roofline, over its phases

  def phase(self, peaks: Peaks, flops: float, moved: float) -> None:
    """Adds a phase, which ends before the next one begins."""
    self.flops += flops
    self.bytes += moved
    self.seconds += peaks.seconds(flops, moved)


def update_work(peaks, params, multiplied, layers, width, rows, length):
  """A forward and backward pass, then AdamW in float32."""
  work = Work()
  tokens = rows * length
  flops = 6 * multiplied * tokens + 12 * layers * width * length * tokens
  work.phase(peaks, flops, 0.0)
  work.phase(peaks, 0.0, 32 * params)
  return work


def decode_work(peaks, multiplied, layers, width, itemsize, sizes):
  """Reading the prompts, then a token of each row at a time."""
  prompts, samples, prompt, new = sizes
  rows, weights = prompts * samples, multiplied * itemsize
  pair = 2 * layers * width * itemsize  # a token's key and value
  work = Work()
  read = 2 * multiplied * prompts * prompt
  read += 4 * layers * width * prompt * prompts * prompt
  work.phase(peaks, read, weights)
  # The first token comes from the prompt's last state.
  for own in range(1, new):
    flops = 2 * multiplied * rows + 4 * layers * width * (prompt + own) * rows
    moved = weights + pair * (prompts * prompt + rows * own)
    work.phase(peaks, flops, moved)
  return work


def score_work(peaks, multiplied, layers, width, itemsize, rows, length):
  """An encoder with DeBERTa's two products of contents and distances."""
  work = Work()
  flops = 2 * multiplied * rows * length
  flops += 12 * layers * width * length * rows * length
  work.phase(peaks, flops, multiplied * itemsize)
  return work


# One measurement, in a process of its own.


def stand_in_for_jaxtyping() -> None:
  """Lets annotations be made, which nobody reads here."""
  if importlib.util.find_spec("jaxtyping"):
    return
  module = types.ModuleType("jaxtyping")

  class Annotation:
    def __class_getitem__(cls, item):
      return item[0] if isinstance(item, tuple) else item

  module.__getattr__ = lambda name: Annotation  # Float, Int, PyTree, ...
  sys.modules["jaxtyping"] = module


def seconds_of(call, repeats):
  """Median seconds, and those of the first call, which compiles."""
  spent = []
  for repeat in range(repeats + 1):
    began = time.perf_counter()
    call(repeat)
    spent.append(time.perf_counter() - began)
  return statistics.median(spent[1:]), spent[0]


def peak_gb(device):
  """The most memory the process had on its device, in GB."""
  import resource

  found = (device.memory_stats() or {}).get("peak_bytes_in_use")
  if found is None:  # a CPU: the whole process, kilobytes but on a Mac
    unit = 1 if sys.platform == "darwin" else 1024
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return round(found / 1e9, 2)


def measure_machine(repeats):
  """The device, and what products with a matrix and a vector reach on it."""
  import jax
  import jax.numpy as jnp

  from jaxalign.plan.targets import GPUS, TPUS

  device = jax.devices()[0]
  on_cpu = device.platform == "cpu"
  size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda x: x @ x)
  # Large enough that the start of a program does not count.
  limit = (device.memory_stats() or {}).get("bytes_limit", 0)
  rows = 2**13 if on_cpu else 2**16 if limit > 2**34 else 2**14
  y = jnp.ones((rows, 2**13 if on_cpu else 2**16), dtype)
  read = jax.jit(lambda y: y @ y[0])
  best = {}
  for name, call in (
    ("product", lambda _: product(x).block_until_ready()),
    ("read", lambda _: read(y).block_until_ready()),
  ):
    best[name] = min(seconds_of(call, 1)[0] for _ in range(max(repeats, 5)))
  versions = {
    name: importlib.import_module(name).__version__ for name in NEEDED
  }
  own = {
    "flops": 2 * size**3 / best["product"],
    "bytes": y.nbytes / best["read"],
  }
  chips = TPUS | {name: chip for name, (chip, _) in GPUS.items()}
  known = [chips[v] for k, v in CHIPS.items() if k in device.device_kind]
  sheet = known and {"flops": known[0].flops, "bytes": known[0].bandwidth}
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "cores": len(os.sched_getaffinity(0)),
    "versions": versions,
    "own": own,
    "peaks": sheet or own,
    "from": "data sheet" if sheet else "its own products",
  }


class Ours:
  """A model of this package and what its programs need."""

  def __init__(self, shape, on_cpu, asked="auto"):
    import jax

    from jaxalign.models import attention
    from jaxalign.models.model import Model
    from jaxalign.models.neox import NeoXConfig
    from jaxalign.parallel import mesh as meshes

    self.dtype = "float32" if on_cpu else "bfloat16"
    config = NeoXConfig(
      vocab_size=shape.vocab,
      hidden_size=shape.hidden,
      layers=shape.layers,
      heads=shape.heads,
      intermediate_size=4 * shape.hidden,
      dtype=self.dtype,
    )
    # As a run chooses it.
    device = jax.devices()[0]
    self.attention = attention.choose(
      asked,
      device.platform,
      self.dtype,
      config.head_dim,
      attention.Mask(),
      attention.parse_capability(getattr(device, "compute_capability", "")),
    ).kind
    config = dataclasses.replace(config, attention=self.attention)
    self.shape, self.model = shape, Model.build(config)
    self.mesh = meshes.make_mesh()
    self.params = meshes.put(self.model.init(jax.random.key(0)), self.mesh)
    sizes = [leaf.size for leaf in jax.tree.leaves(self.model.shapes)]
    self.size = sum(sizes)
    self.multiplied = self.size - shape.vocab * shape.hidden

  def update(self, config, make_update):
    """A method's compiled update, and its first state."""
    from jaxalign.core import optim
    from jaxalign.parallel import mesh as meshes
    from jaxalign.training.run import Run

    optimizer = optim.make_optimizer(
      "adamw", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0
    )
    schedule = optim.make_schedule(
      "constant", peak=1e-5, warmup_steps=0, steps=1000
    )
    state = optim.init_state(self.params, optimizer)
    shardings = meshes.shardings(state, self.mesh)
    run = Run(
      config,
      self.model,
      state,
      frozen={},
      reference=None,
      mesh=self.mesh,
      recorder=None,
      optimizer=optimizer,
      schedule=schedule,
      shardings=shardings,
    )
    # As a run does it; the state is given away with each step.
    return run.jit(make_update(run)), _put(state, shardings), run.key

  def sampler(self, sizes, settings):
    """Draws the completions of a call's prompts, all of full length."""
    import jax
    import numpy as np

    from jaxalign.sampling import settings as settings_lib
    from jaxalign.sampling.sampler import Sampler

    prompts, samples, prompt, new = sizes
    rng = np.random.default_rng(0)
    ids = rng.integers(1, self.shape.vocab, (prompts, prompt)).tolist()
    sampler = Sampler(self.model, mesh=self.mesh)
    drawn = settings_lib.make(max_new_tokens=new, **settings)

    def draw(params, seed):
      key = jax.random.key(seed)
      out = sampler(params, ids, drawn, key, samples_per_prompt=samples)
      assert (out.lengths == new).all(), "a completion ended early"
      return np.asarray(ids).repeat(samples, axis=0), out

    return draw


def _put(tree, shardings):
  import jax

  return jax.device_put(tree, shardings)


def _text(tokens, mask):
  """Numpy rows `[B, T]` as the batch of an update."""
  import numpy as np

  from jaxalign.core.types import TextBatch

  tokens = np.asarray(tokens, np.int32)
  positions = np.broadcast_to(
    np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
  )
  arrays = tokens, positions, np.ones_like(tokens), mask
  return TextBatch(*(x[None] for x in arrays))


def measure_sft(shape, peaks, on_cpu, repeats, sizes, asked):
  """An update on full rows, every token of which counts."""
  import jax
  import numpy as np

  from jaxalign.algorithms.sft.config import SFTConfig
  from jaxalign.algorithms.sft.train import make_update

  rows, length = sizes
  ours = Ours(shape, on_cpu, asked)
  update, state, key = ours.update(SFTConfig(), make_update)
  del ours.params
  held, losses = {"state": state}, []
  del state

  def step(seed):
    tokens = np.random.default_rng(seed).integers(
      0, shape.vocab, (rows, length)
    )
    batch = _text(tokens, np.ones((rows, length), bool))
    held["state"], metrics = update(held["state"], batch, key)
    jax.block_until_ready(held["state"])
    losses.append(float(metrics["loss/nll"]))

  seconds, first = seconds_of(step, repeats)
  # Of random tokens under random weights.
  assert abs(losses[0] - np.log(shape.vocab)) < 1, losses
  work = update_work(
    peaks,
    ours.size,
    ours.multiplied,
    shape.layers,
    shape.hidden,
    rows,
    length,
  )
  notes = {"attention": ours.attention}
  return rows * length, seconds, first, work, notes


def measure_decode(shape, peaks, on_cpu, repeats, sizes, settings):
  """The sampler's call: prompts read, completions drawn and fetched."""
  ours = Ours(shape, on_cpu)
  draw = ours.sampler(sizes, settings)
  seconds, first = seconds_of(lambda seed: draw(ours.params, seed), repeats)
  itemsize = 4 if on_cpu else 2
  work = decode_work(
    peaks, ours.multiplied, shape.layers, shape.hidden, itemsize, sizes
  )
  return sizes[0] * sizes[1] * sizes[3], seconds, first, work, {}


def measure_superhf(shape, peaks, on_cpu, repeats, sizes, asked):
  """Sample, score, keep the best of each prompt, update; ids in place of text.

  The host's part of a real step, from text to files, is not in it:
  `tests/bench/superhf_step.py` has that.
  """
  import jax
  import numpy as np

  from jaxalign.algorithms.superhf.config import SuperHFConfig
  from jaxalign.algorithms.superhf.data import KeptBatch
  from jaxalign.algorithms.superhf.train import make_update
  from jaxalign.data.tokenizer import Notes
  from jaxalign.models.deberta import DebertaConfig
  from jaxalign.models.model import Model
  from jaxalign.parallel import mesh as meshes
  from jaxalign.scoring.scorer import Scorer

  prompts, samples, prompt, new = sizes
  ours = Ours(shape, on_cpu, asked)
  update, state, key = ours.update(SuperHFConfig(), make_update)
  del ours.params
  held = {"state": state}
  del state
  width, layers, vocab = shape.reward
  judge = Model.build(
    DebertaConfig(
      vocab_size=vocab,
      hidden_size=width,
      layers=layers,
      heads=width // 64,
      intermediate_size=4 * width,
      dtype=ours.dtype,
    )
  )
  score = Scorer(
    judge,
    meshes.put(judge.init(jax.random.key(1)), ours.mesh),
    types.SimpleNamespace(notes=Notes()),
    tokens=prompts * samples * (prompt + new),
    rows=prompts * samples,
    mesh=ours.mesh,
  )
  draw = ours.sampler(sizes, PAPER)
  parts = {"sample": [], "score": [], "update": []}

  def step(seed):
    marks = [time.perf_counter()]
    asked, drawn = draw(held["state"].params, seed)
    marks.append(time.perf_counter())
    ids = np.concatenate([asked, drawn.tokens], axis=1)
    texts = [(row, np.zeros_like(row)) for row in ids % vocab]
    scores = score.score_ids(texts).reshape(prompts, samples)
    marks.append(time.perf_counter())
    best = scores.argmax(axis=1) + np.arange(prompts) * samples
    mask = np.broadcast_to(
      np.arange(prompt + new) >= prompt, (prompts, prompt + new)
    )
    logps = np.zeros(mask.shape, np.float32)
    logps[:, prompt:] = drawn.model_logps[best]
    batch = KeptBatch(
      _text(ids[best], mask), logps[None, :, 1:], mask[None, :, 1:]
    )
    held["state"], metrics = update(held["state"], batch, key)
    jax.block_until_ready(held["state"])
    marks.append(time.perf_counter())
    assert np.isfinite(float(metrics["loss/total"])), metrics
    for name, a, b in zip(parts, marks, marks[1:], strict=False):
      parts[name].append(b - a)

  seconds, first = seconds_of(step, repeats)
  itemsize = 4 if on_cpu else 2
  judged = sum(leaf.size for leaf in jax.tree.leaves(judge.shapes))
  works = {
    "sample": decode_work(
      peaks, ours.multiplied, shape.layers, shape.hidden, itemsize, sizes
    ),
    "score": score_work(
      peaks,
      judged - vocab * width,
      layers,
      width,
      itemsize,
      prompts * samples,
      prompt + new,
    ),
    "update": update_work(
      peaks,
      ours.size,
      ours.multiplied,
      shape.layers,
      shape.hidden,
      prompts,
      prompt + new,
    ),
  }
  total = Work(
    *(
      sum(getattr(w, f.name) for w in works.values())
      for f in dataclasses.fields(Work)
    )
  )
  notes = {
    name: {
      "seconds": round(statistics.median(parts[name][1:]), 4),
      "roofline_s": round(works[name].seconds, 4),
    }
    for name in parts
  }
  notes["attention"] = ours.attention
  return prompts * samples * new, seconds, first, total, notes


def torch_model(shape, on_cpu):
  """transformers' model of the shape, and where it is."""
  import torch
  import transformers

  place = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
  config = transformers.GPTNeoXConfig(
    vocab_size=shape.vocab,
    hidden_size=shape.hidden,
    intermediate_size=4 * shape.hidden,
    num_hidden_layers=shape.layers,
    num_attention_heads=shape.heads,
  )
  torch.manual_seed(0)
  with torch.device(place):
    model = transformers.AutoModelForCausalLM.from_config(config)
  return model, place


def torch_memory(place):
  """The most memory torch had on its GPU, in GB; None on a CPU."""
  import torch

  if place == "cpu":
    return None
  return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def transformers_decode(shape, on_cpu, repeats, sizes, settings):
  """`generate` with its cache, weights in the dtype that it computes in."""
  import torch

  prompts, samples, prompt, new = sizes
  model, place = torch_model(shape, on_cpu)
  model = model.eval().to(torch.float32 if on_cpu else torch.bfloat16)
  ids = torch.randint(1, shape.vocab, (prompts, prompt), device=place)

  def draw(seed):
    torch.manual_seed(seed)
    with torch.inference_mode():
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        num_return_sequences=samples,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        **{"top_k": 0} | settings,
      )
    assert out.cpu().shape == (prompts * samples, prompt + new)

  seconds, first = seconds_of(draw, repeats)
  return prompts * samples * new, seconds, first, torch_memory(place)


def transformers_sft(shape, on_cpu, repeats, rows, length):
  """transformers' loss, autocast to bf16 on a GPU, the fused AdamW."""
  import torch

  model, place = torch_model(shape, on_cpu)
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-5, weight_decay=0.01, fused=True
  )

  def step(seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, shape.vocab, (rows, length), device=place)
    with torch.autocast(place, torch.bfloat16, enabled=not on_cpu):
      loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert loss.item() > 0  # waits for the device

  seconds, first = seconds_of(step, repeats)
  return rows * length, seconds, first, torch_memory(place)


def vllm_decode(shape, on_cpu, repeats, sizes, settings):
  """vLLM with random weights; prompts as ids, so no tokenizer."""
  import random

  import vllm

  prompts, samples, prompt, new = sizes
  config = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": shape.vocab,
    "hidden_size": shape.hidden,
    "intermediate_size": 4 * shape.hidden,
    "num_hidden_layers": shape.layers,
    "num_attention_heads": shape.heads,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "torch_dtype": "float32" if on_cpu else "bfloat16",
  }
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
    model = vllm.LLM(
      folder,
      load_format="dummy",
      skip_tokenizer_init=True,
      enable_prefix_caching=False,
      max_model_len=prompt + new,
    )
  rng = random.Random(0)
  asked = [
    {"prompt_token_ids": rng.choices(range(1, shape.vocab), k=prompt)}
    for _ in range(prompts)
  ]
  sampling = vllm.SamplingParams(
    n=samples,
    max_tokens=new,
    min_tokens=new,
    ignore_eos=True,
    detokenize=False,
    **settings,
  )

  def draw(_):
    out = model.generate(asked, sampling, use_tqdm=False)
    drawn = [len(o.token_ids) for request in out for o in request.outputs]
    assert drawn == [new] * (prompts * samples)

  seconds, first = seconds_of(draw, repeats)
  return prompts * samples * new, seconds, first, None


def measure(case):
  """One case, in this process: a JSON-ready dict."""
  kind, side, repeats = case["kind"], case["side"], case["repeats"]
  if side == "jaxalign":
    sys.path.insert(0, str(ROOT))
    stand_in_for_jaxtyping()
  if kind == "machine":
    return measure_machine(repeats)
  shape, on_cpu = SHAPES[case["shape"]], case["on_cpu"]
  sizes, settings = case["sizes"], case["settings"]
  if side == "vllm":
    found = vllm_decode(shape, on_cpu, repeats, sizes, settings)
  elif side == "transformers" and kind == "sft":
    found = transformers_sft(shape, on_cpu, repeats, *sizes)
  elif side == "transformers":
    found = transformers_decode(shape, on_cpu, repeats, sizes, settings)
  if side != "jaxalign":
    tokens, seconds, first, memory = found
    return {
      "seconds": round(seconds, 4),
      "tokens_per_s": round(tokens / seconds),
      "first_s": round(first, 1),
      "peak_gb": memory,
    }

  import jax

  peaks, asked = Peaks(**case["peaks"]), case["attention"]
  if kind == "sft":
    found = measure_sft(shape, peaks, on_cpu, repeats, sizes, asked)
  elif kind == "superhf":
    found = measure_superhf(shape, peaks, on_cpu, repeats, sizes, asked)
  else:
    found = measure_decode(shape, peaks, on_cpu, repeats, sizes, settings)
  tokens, seconds, first, work, notes = found
  return {
    "seconds": round(seconds, 4),
    "roofline_s": round(work.seconds, 4),
    "of_roofline": round(work.seconds / seconds, 3),
    "tokens_per_s": round(tokens / seconds),
    "mfu": round(work.flops / peaks.flops / seconds, 3),
    "hbm": round(work.bytes / peaks.bytes / seconds, 3),
    "first_s": round(first, 1),
    "peak_gb": peak_gb(jax.devices()[0]),
    **notes,
  }


# The process that starts them.


def run_case(case, limit):
  """A case's figures, by a process of its own; `error` where it failed."""
  words = [sys.executable, __file__, "--case", json.dumps(case)]
  try:
    out = subprocess.run(
      words, capture_output=True, text=True, timeout=limit, check=False
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not done in {limit} s; raise --limit"}
  if out.returncode == 0:
    return json.loads(out.stdout.splitlines()[-1])
  text = out.stderr
  if any(s in text for s in ("RESOURCE_EXHAUSTED", "out of memory")):
    return {"error": "out of memory"}
  return {"error": text.strip()[-2000:] or f"ended with {out.returncode}"}


def halved(case):
  """The case with half the rows; None where one row is left."""
  rows = case["sizes"][0]
  if rows == 1:
    return None
  return case | {"sizes": (rows // 2, *case["sizes"][1:])}


def cases(flags, machine):
  """What is measured, in order."""
  on_cpu = machine["platform"] == "cpu"
  kind_of = "cpu" if on_cpu else "accelerator"
  shapes = flags.shapes or (["pythia-70m"] if on_cpu else list(SHAPES)[:2])
  kinds = {"sft": (SFT[kind_of], {}), "superhf": (SUPERHF[kind_of], PAPER)}
  for name, sizes in DECODE.items():
    kinds[f"decode-{name}"] = sizes, {}
  kinds["decode-32x64-paper"] = DECODE["32x64"], PAPER
  if on_cpu and not flags.only:
    del kinds["decode-256x256"]  # a minute for each call
  for shape in shapes:
    for name, (sizes, settings) in kinds.items():
      if flags.only and name not in flags.only:
        continue
      for side in ("jaxalign", *flags.against):
        # Whole SuperHF steps of others: tests/bench/superhf_step.py.
        if side != "jaxalign" and name == "superhf":
          continue
        if side == "vllm" and name == "sft":
          continue
        yield {
          "kind": name,
          "side": side,
          "shape": shape,
          "sizes": sizes,
          "settings": settings,
          "on_cpu": on_cpu,
          "attention": flags.attention,
        }


def missing(flags):
  """Packages that are not there: needed by us, and by whom we compare with."""
  there = importlib.util.find_spec
  needed = [name for name in NEEDED if not there(name)]
  others = {
    side: [name for name in SIDES[side] if not there(name)]
    for side in flags.against
  }
  return needed, {side: names for side, names in others.items() if names}


def table(rows):
  """The measurements as a table for docs/log.md."""
  lines = [
    "| shape | what | sizes | side | tokens/s | s | roofline s | of it | MFU "
    "| HBM | GB |",
    "|" + "---|" * 11,
  ]
  for row in rows:
    if "error" in row:
      figures = [row["error"].splitlines()[-1][:80], *[""] * 6]
    else:
      names = ("tokens_per_s", "seconds", "roofline_s", "of_roofline")
      names += ("mfu", "hbm", "peak_gb")
      found = (row.get(name) for name in names)
      figures = ["" if x is None else f"{x:,}" for x in found]
    sizes = " x ".join(map(str, row["sizes"]))
    cells = [row["shape"], row["kind"], sizes, row["side"], *figures]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def names_of(allowed):
  """A type of flag: names with commas between."""

  def read(text):
    found = [name for name in text.split(",") if name]
    for name in found:
      if name not in allowed:
        known = ", ".join(allowed)
        raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return found

  return read


def main():
  parser = argparse.ArgumentParser()
  kinds = ("sft", "superhf", *(f"decode-{name}" for name in DECODE))
  kinds += ("decode-32x64-paper",)
  parser.add_argument("--shapes", type=names_of(SHAPES), default=[])
  parser.add_argument("--only", type=names_of(kinds), default=[])
  parser.add_argument("--against", type=names_of(SIDES), default=[])
  kernels = ("auto", "dense", "cudnn", "triton", "splash")
  parser.add_argument("--attention", choices=kernels, default="auto")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--limit", type=int, default=600, help="seconds a case")
  parser.add_argument("--case", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.case:
    print(json.dumps(measure(json.loads(flags.case))))
    return 0
  needed, others = missing(flags)
  if needed:
    print(f"missing: {', '.join(needed)}; pip install them", file=sys.stderr)
    return 2
  for side, names in others.items():
    print(f"left out: {side}, without {', '.join(names)}", file=sys.stderr)
    flags.against.remove(side)
  if not importlib.util.find_spec("jaxtyping"):
    print("missing: jaxtyping; a stand-in serves", file=sys.stderr)
  machine = run_case(
    {"kind": "machine", "side": "jaxalign", "repeats": flags.repeats},
    flags.limit,
  )
  if "error" in machine:
    print(machine["error"], file=sys.stderr)
    return 1
  print(json.dumps({"bench": "accelerator", **machine}), flush=True)
  rows = []
  for case in cases(flags, machine):
    case |= {"repeats": flags.repeats, "peaks": machine["peaks"]}
    found = run_case(case, flags.limit)
    while found.get("error") == "out of memory" and halved(case):
      case = halved(case)
      found = run_case(case, flags.limit)
    named = ("shape", "kind", "sizes", "side")
    rows.append({name: case[name] for name in named} | found)
    print(json.dumps(rows[-1]), flush=True)
  print(table(rows), file=sys.stderr)
  return int(any("error" in row for row in rows))


if __name__ == "__main__":
  sys.exit(main())
