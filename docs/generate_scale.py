"""Writes docs/scale.md: the papers' models on GPUs and TPU slices, planned.

    python docs/generate_scale.py             makes the rows that are missing
    python docs/generate_scale.py --estimate  the same, TPU programs for CPUs
    python docs/generate_scale.py --page      writes the page alone

Each row is one `python -m jaxalign.plan`, kept in docs/scale.json; delete a row
there to make it again. Needs the extras plan-gpu and plan-tpu. A TPU's compiler
takes five to ten minutes a row, an estimate one or two; without the flag what
was estimated is made again.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROWS, PAGE = HERE / "scale.json", HERE / "scale.md"
GIB = 2**30

# The architectures' public numbers, as their config.json has them.


def neox(width, layers, heads, vocabulary):
  """A Pythia model."""
  return {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "intermediate_size": 4 * width,
    "max_position_embeddings": 2048,
    "vocab_size": vocabulary,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
  }


def llama(width, layers, heads, inner):
  """A first LLaMA."""
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "intermediate_size": inner,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
  }


SCORE = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
MODELS = {
  "pythia-1b": neox(2048, 16, 8, 50304),
  "pythia-6.9b": neox(4096, 32, 32, 50432),
  "pythia-12b": neox(5120, 36, 40, 50688),
  "llama-7b": llama(4096, 32, 32, 11008),
  "llama-65b": llama(8192, 80, 64, 22016),
  # OpenAssistant/reward-model-deberta-v3-large-v2.
  "deberta-v3-large": SCORE
  | {
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2ForSequenceClassification"],
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "vocab_size": 128100,
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
  },
  # SuperHF's own reward models are of this size.
  "gpt-neo-1.3b": SCORE
  | {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForSequenceClassification"],
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "vocab_size": 50257,
    "window_size": 256,
    "attention_types": [[["global", "local"], 12]],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
  },
}

# Run -> config, models by field, further fields.
OWN = {"reward_model": "gpt-neo-1.3b", "test_reward_model": "gpt-neo-1.3b"}
RUNS = {
  "Pythia-1B SuperHF": (
    "configs/superhf.py:pythia-1b",
    {"policy": "pythia-1b", "reward_model": "deberta-v3-large"},
    {},
  ),
  "Pythia-6.9B SuperHF, LoRA": (
    "configs/superhf.py:pythia-6.9b",
    {"policy": "pythia-6.9b", **OWN},
    {},
  ),
  "Pythia-12B SuperHF, LoRA": (
    "configs/superhf.py:pythia-12b",
    {"policy": "pythia-12b", **OWN},
    {},
  ),
  "LLaMA-7B SuperHF, LoRA": (
    "configs/superhf.py:llama-7b",
    {"policy": "llama-7b", **OWN},
    {},
  ),
  "LLaMA-7B PPO, LoRA": (
    "configs/ppo.py:superhf-rlhf",
    {"policy": "llama-7b", "reward_model": "gpt-neo-1.3b"},
    {
      "lora.rank": 4,
      "lora.targets": "q_proj,v_proj",
      "precision.params": "bfloat16",
    },
  ),
  "LLaMA-65B SuperHF, LoRA": (
    "configs/superhf.py:llama-7b",
    {"policy": "llama-65b", **OWN},
    {},
  ),
}
TARGETS = (
  "a6000",
  "8xh100",
  "v5litepod-16",
  "v5litepod-256",
  "v5p-128",
  "v5p-1024",
)
# A row a chip at constant work: full fine-tuning and adapters.
SCALING = ("Pythia-1B SuperHF", "LLaMA-7B SuperHF, LoRA")
CHIPS = (16, 32, 64, 128, 256, 512)
# A generation's prefix, what its names count a chip, and slices of it.
GENERATIONS = (("v5p", 2, CHIPS), ("v5litepod", 1, CHIPS[:-1]))
AIM = 0.85  # efficiency of a doubling
LIMIT = 3600  # seconds of a row


def chips_of(target):
  """Chips behind a target's name."""
  from jaxalign.plan.targets import find

  return find(target).chips


def fields_of(run, target):
  """The flags of a run whose rows fill the target's chips, one row a chip."""
  config, models, fields = RUNS[run]
  fields, chips = dict(fields), chips_of(target)
  if chips > 1:
    fields["mesh"] = "auto"
  if "superhf.py" in config and chips > 2:
    fields |= {
      "superbatch.mode": "prompt_accumulation",
      "superbatch.prompts": chips,
      "superbatch.samples_per_prompt": 16,
      "batch_size": chips,
    }
  elif chips > 8:
    fields |= {"rollout.prompts": chips, "batch_size": chips}
  return config, models, fields


def plan(run, target, folder, *, estimate=False):
  """One plan as the command prints it, or what kept it from one."""
  config, models, fields = fields_of(run, target)
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  flags += [f"--config.{name}={folder / m}" for name, m in models.items()]
  if estimate:
    flags.append("--estimate")
  command = [sys.executable, "-m", "jaxalign.plan", f"--config={config}"]
  command += [*flags, f"--on={target}", "--json", "--quick", "--tokens=256"]
  start = time.monotonic()
  try:
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      timeout=LIMIT,
      cwd=HERE.parent,
      env=os.environ | {"PYTHONPATH": str(HERE.parent)},
      check=False,
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not compiled within {LIMIT} s"}
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    return {"error": lines[-1][:300]}
  found = json.loads(done.stdout)
  del found["notes"]  # of folders that no longer exist
  found["planned_seconds"] = round(time.monotonic() - start)
  return found


def wanted():
  """Every row: its name, run and target, the most important first."""
  gpus = [(run, name) for name in TARGETS[:2] for run in RUNS]
  tpus = [(run, name) for name in TARGETS[2:] for run in RUNS]
  weak, also = (
    [(run, f"{prefix}-{n * chips}") for run in SCALING for chips in sizes]
    for prefix, n, sizes in GENERATIONS
  )
  rows = list(dict.fromkeys(gpus + weak + tpus + also))
  return [(f"{run} | {target}", run, target) for run, target in rows]


def make(rows, *, estimate):
  """Makes the rows that are missing, one after another."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for model, config in MODELS.items():
      (folder / model).mkdir()
      (folder / model / "config.json").write_text(json.dumps(config))
    for key, run, target in wanted():
      known = rows.get(key, {"error": "missing"})
      # What the target's own compiler has compiled is not made again.
      if "error" not in known and (estimate or not known["estimate"]):
        continue
      by_cpu = estimate and target.startswith("v")
      rows[key] = plan(run, target, folder, estimate=by_cpu)
      ROWS.write_text(json.dumps(rows, indent=1) + "\n")
      took = rows[key].get("planned_seconds", 0)
      print(f"{key}: {rows[key].get('error', f'{took} s')}", flush=True)


def gib(value):
  """Bytes in GiB."""
  return f"{value / GIB:.1f}"


def cells(row):
  """A row's figures as a table shows them."""
  if "error" in row:
    return ["-"] * 8 + [row["error"]]
  longest = max(
    row["programs"],
    key=lambda p: p["calls_a_step"] * max(p["seconds"].values()),
  )
  _, sent = of_step(row)
  mark = "*" if row["estimate"] else ""
  axes = [f"{name} {n}" for name, n in row["mesh"].items() if n > 1]
  counted = all(p["seconds"]["memory"] for p in row["programs"])
  more = "" if counted else "> "
  return [
    ", ".join(axes) or "-",
    gib(sum(row["resident_bytes"].values())),
    gib(row["peak_bytes"]) + mark,
    gib(row["memory_bytes"]),
    "yes" if row["fits"] else "**no**",
    f"{more}{sent / 1e9:.1f}",
    f"{more}{row['step_seconds']:.2f}",
    f"{more}{row['hours']:.2g}",
    f"{longest['name']}, {longest['bound_by']}",
  ]


HEAD = """# What the papers' models need

Written by `docs/generate_scale.py` with `python -m jaxalign.plan`; do not edit.
[Planning a run](plan.md) explains the figures. Nothing here was run: memory is
what XLA's compiler reserves, times are rooflines (arithmetic, memory and
exchange at the data sheet's rates, all overlapped), which real runs miss by a
factor of two to three.{estimates} Where a program does not fit, its compiler
stops and its arithmetic alone is counted, so what a step sends and takes is
more (>) than what stands there.

What the hosts do between programs, decoding and encoding texts, is not counted.
Each does its part, but all of them read the whole, so on many hosts it does not
shrink with their number ([Several hosts](hosts.md)).

Prompts of 256 tokens, completions of the presets' length, texts to train on of
`max_length`. From 8 chips on a step has one prompt a chip, 16 samples of each,
and trains on the best of each prompt, so that every chip has one row of an
update; PPO has one completion a chip. On one card the rows are the preset's.

"""


STAR = """ A star marks an estimate: the program was
compiled for CPUs in the place of the target, with the same mesh{error}. CPUs
compute bfloat16 in float32, so memory and its traffic come out up to twice too
high."""


def page(rows):
  """The page's text."""
  lines = []
  titles = [
    "on",
    "mesh",
    "state, GiB a chip",
    "peak",
    "of",
    "fits",
    "sent, GB a chip and step",
    "step, s",
    "run, h",
    "longest",
  ]
  for run in RUNS:
    config, _, fields = RUNS[run]
    flags = " ".join(f"--config.{k}={v}" for k, v in fields.items())
    lines += [f"## {run}", "", f"`{config} {flags}`".replace(" `", "`"), ""]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for target in TARGETS:
      row = rows.get(f"{run} | {target}", {"error": "not planned yet"})
      lines.append("| " + " | ".join([target, *cells(row)]) + " |")
    lines.append("")
  lines += [*weak_scaling(rows), *bounds(rows)]
  estimated = any(
    row.get("estimate")
    for key, row in rows.items()
    if not key.startswith("estimate")
  )
  star = STAR.format(error=estimate_error(rows)) if estimated else ""
  return HEAD.format(estimates=star) + "\n".join(lines) + "\n"


def weak_scaling(rows):
  """Constant rows a chip on more and more chips of a generation."""
  lines = [
    "## Weak scaling",
    "",
    "One row of an update and one prompt a chip, on more and more chips. The",
    "efficiency of a doubling is the time of a step on half the chips over",
    f"that on all; the aim is {AIM:.0%}. Of plans several doublings apart it",
    "is the geometric mean. Next to it the same if nothing overlapped, but",
    "arithmetic, memory and exchange came one after another. Small slices have",
    "no closed rings, which is why efficiencies above 100 % occur.",
    "",
  ]
  for run in SCALING:
    for prefix, cores, sizes in GENERATIONS:
      lines += _scaled(rows, run, prefix, cores, sizes)
  return lines


def _scaled(rows, run, prefix, cores, sizes):
  """One run on one generation: its table, and what bounds it in words."""
  head = ["chips", "step, s", "efficiency", "nothing overlapped"]
  head += ["sent, GB a chip", "arithmetic, s", "memory, s", "exchange, s"]
  lines = [f"### {run}, {prefix}", "", "| " + " | ".join(head) + " |"]
  lines.append("|---" * len(head) + "|")
  last, least, found = None, 1.0, []
  for chips in sizes:
    row = rows.get(f"{run} | {prefix}-{cores * chips}", {})
    if "step_seconds" not in row:
      why = row.get("error", "not planned yet")
      lines.append(f"| {chips} | {why} |" + " |" * (len(head) - 2))
      continue
    times, sent = of_step(row)
    step, apart = row["step_seconds"], sum(times.values())
    shares = ["", ""]
    if last is not None:
      doublings = math.log2(chips / last[0])
      ratios = [
        (before / now) ** (1 / doublings)
        for before, now in ((last[1], step), (last[2], apart))
      ]
      shares, least = [f"{r:.0%}" for r in ratios], min(least, *ratios)
    last = chips, step, apart
    found.append((chips, times))
    mark = "*" if row["estimate"] else ""
    values = [f"{chips}{mark}", f"{step:.3f}", *shares, f"{sent / 1e9:.1f}"]
    values += [f"{t:.3f}" for t in times.values()]
    lines.append("| " + " | ".join(values) + " |")
  if found:
    chips, times = found[-1]
    first = max(times, key=times.__getitem__)
    spare = times[first] / times["exchange"] if times["exchange"] else math.inf
    words = f"On {chips} chips {first} bounds a step"
    if first != "exchange":
      words += f"; exchange could take {spare:.1f} times as long"
    if len(found) > 1:
      words += f"; the least efficient doubling has {least:.0%}"
    lines += ["", words + "."]
  return [*lines, ""]


def of_step(row):
  """Seconds of a step by resource, each alone, and bytes that a chip sends."""
  times, sent = {}, 0
  for program in row["programs"]:
    calls = program["calls_a_step"]
    for name, seconds in program["seconds"].items():
      times[name] = times.get(name, 0.0) + calls * seconds
    sent += calls * sum(program["exchanged_bytes"].values())
  return times, sent


def bounds(rows):
  """What bounds the update of each planned run."""
  lines = [
    "## What bounds an update",
    "",
    "Milliseconds of one call, each resource alone.",
    "",
    "| run, on | arithmetic | memory | exchange |",
    "|---|---|---|---|",
  ]
  for key, row in rows.items():
    if key.startswith("estimate") or "error" in row:
      continue
    for program in row["programs"]:
      counted = program["seconds"]["memory"]  # not where it does not fit
      if program["name"] in ("update", "learn") and counted:
        ms = [f"{1e3 * t:.1f}" for t in program["seconds"].values()]
        lines.append(f"| {key.replace(' |', ',')} | " + " | ".join(ms) + " |")
  return [*lines, ""]


def estimate_error(rows):
  """The range of estimated over compiled peaks, where both are there."""
  found = []
  for key, row in rows.items():
    other = rows.get(f"estimate: {key}", {})
    if "peak_bytes" in other and "peak_bytes" in row:
      found.append(other["peak_bytes"] / row["peak_bytes"] - 1)
  if not found:
    return ""
  least, most = min(found), max(found)
  return f"; where both are known it is off by {least:+.0%} to {most:+.0%}"


def main():
  """Makes rows, and the page of all that are there."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--page", action="store_true")
  parser.add_argument("--estimate", action="store_true")
  args = parser.parse_args()
  rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
  if not args.page:
    make(rows, estimate=args.estimate)
  PAGE.write_text(page(rows))


if __name__ == "__main__":
  main()
