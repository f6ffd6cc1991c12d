"""Where a SuperHF step's time goes, and what it is beside a plain torch loop.

By itself: the lab preset with the models that ship, 8 prompts x 16 samples x 48
tokens. The command is started twice with an empty compilation cache, and the
seconds from the second start to the end of its first step are taken. Then a
run in this process, in which the three compiled programs are timed until
their results are there; the rest of a step is what the host has the device wait
for: prompts, decoding, truncation, encoding, filtering. Medians
over the steps after the first ones, which compile.

    python tests/bench/superhf_step.py [--steps 12]

Against torch: one superbatch as the 2023 code takes it, written out in `theirs`
with torch and transformers alone. It has the same prompts, models and settings,
and nothing ends a completion early, so both sides draw, score and train on as
many tokens; the loss has no KL and no end of text. It gets what serves it best
on a CPU: float32, all cores, `generate` with its cache, 64 rows a batch and a
score call (the 2023 default), no dropout, the fused AdamW, and no padding where
it trains: a text at a time or, with --together, a batch padded to its longest.
Ours is the unchanged command, metrics and files included. The sides are
processes of their own that take turns, step by step. Ours may have an
environment of its own: this package does not need torch, but transformers
imports it, 200 MB, where it is installed.

    python tests/bench/superhf_step.py --against=torch [--shape=pythia-70m]
      [--python=/path/to/ours]

Prints one JSON line.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import operator
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import versus

CONFIG = "configs/superhf.py:lab"
WARM_UP = 4  # steps; each length bucket compiles when it first comes
AHEAD = 6  # of our steps against torch, for the same reason
ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("sample", "score", "update")
BATCH = 64  # rows in a call of the 2023 code
# Against torch: preset, prompts, samples of each, new tokens, sampling.
SHAPES = {
  "lab": ("lab", 8, 16, 48, {"top_p": 1.0, "repetition_penalty": 1.0}),
  "pythia-70m": (
    "pythia-1b",
    2,
    32,
    64,
    {"top_p": 0.9, "repetition_penalty": 1.05},
  ),
}
RATE = 1e-5


def start(folder, name):
  """Seconds from the start of the command to the end of its first step."""
  words = ["-m", "jaxalign.main", "--config", CONFIG, "--config.steps=1"]
  words += ["--workdir", str(folder / name)]
  env = os.environ | {"JAXALIGN_CACHE": str(folder / "cache")}
  began = time.perf_counter()
  with subprocess.Popen(
    [sys.executable, "-u", *words],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    done = [
      time.perf_counter() - began
      for line in process.stdout
      if line.startswith("step 1/")
    ]
  assert process.returncode == 0
  return done[0]


def run(folder, steps):
  """Runs the lab preset here; the programs' spans and the steps' ends."""
  import jax

  from jaxalign import main as command
  from jaxalign.sampling import sampler
  from jaxalign.scoring import scorer
  from jaxalign.training.recorder import Recorder
  from jaxalign.training.run import Run

  spans, ends = [], []
  jit, report = Run.jit, Recorder.report

  def timed(name, fn):
    """`fn`, noting when it ran, until its results were there."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
      began = time.perf_counter()
      out = jax.block_until_ready(fn(*args, **kwargs))
      spans.append((name, began, time.perf_counter()))
      return out

    return run

  def noticed(name, fn):
    """`fn`, whose end a thread notes: the host goes on meanwhile."""

    @functools.wraps(fn)
    def run(*args):
      began = time.perf_counter()
      out = fn(*args)
      # Not the state, which the next update consumes.
      last = out[1] if isinstance(out, tuple) else out

      def wait():
        jax.block_until_ready(last)
        spans.append((name, began, time.perf_counter()))

      threading.Thread(target=wait).start()
      return out

    return run

  def timed_jit(self, update):
    return noticed("update", jit(self, update))

  def noted(*args, **kwargs):
    report(*args, **kwargs)
    ends.append(time.perf_counter())

  sampler.Sampler.__call__ = timed("sample", sampler.Sampler.__call__)
  scorer._Program.__call__ = noticed("score", scorer._Program.__call__)
  Run.jit, Recorder.report = timed_jit, noted
  os.chdir(ROOT)
  words = ["--config", CONFIG, f"--config.steps={steps}"]
  with contextlib.redirect_stdout(io.StringIO()):
    assert command.main([*words, "--workdir", str(folder / "timed")]) == 0
  return spans, ends


def alone(steps):
  """The figures of the command by itself."""
  sys.path.insert(0, str(ROOT))
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    first, second = start(folder, "first"), start(folder, "second")
    os.environ["JAXALIGN_CACHE"] = str(folder / "cache")
    spans, ends = run(folder, steps)
  parts = {name: [] for name in (*STAGES, "host")}
  for began, ended in list(itertools.pairwise(ends))[WARM_UP - 1 :]:
    left = ended - began
    # Calls wait for each other: of each counts what the one before left.
    spent, busy = dict.fromkeys(STAGES, 0.0), began
    for label, a, b in sorted(spans, key=operator.itemgetter(1)):
      if began <= a < ended:
        spent[label] += max(b - max(a, busy), 0)
        busy = max(busy, b)
    for label, seconds in spent.items():
      parts[label].append(seconds)
    parts["host"].append(left - sum(spent.values()))
  seconds = {n: statistics.median(found) for n, found in parts.items()}
  total = sum(seconds.values())
  return {
    "shape": "lab: 8 prompts x 16 samples x 48 tokens, float32",
    "seconds": {n: round(s, 3) for n, s in seconds.items()},
    "share": {n: round(s / total, 3) for n, s in seconds.items()},
    "step_s": round(total, 3),
    "first_step_cold_s": round(first, 1),
    "first_step_warm_s": round(second, 1),
  }


def make(folder, shape):
  """Policy, reward model and prompts; no text can end."""
  import transformers

  if shape == "lab":
    lab = ROOT / "jaxalign/lab"
    kinds = {
      "policy": transformers.AutoModelForCausalLM,
      "reward-train": transformers.AutoModelForSequenceClassification,
    }
    for name, kind in kinds.items():
      model = kind.from_pretrained(lab / name, dtype="float32")
      tokenizer = transformers.AutoTokenizer.from_pretrained(lab / name)
      if name == "policy":
        tokenizer.eos_token = None
        model.config.eos_token_id = model.generation_config.eos_token_id = None
      else:  # the 2023 code reads a prompt and its completion as one text
        del model.config.jaxalign_encoding
      target = folder / name.removesuffix("-train")
      model.save_pretrained(target)
      tokenizer.save_pretrained(target)
    lines = (lab / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
  else:
    versus.make_model(folder / "policy", eos=False)
    versus.make_model(folder / "reward", scores=True, eos=False, seed=1)
    rng = random.Random(0)
    prompts = [versus.prompt(rng, rng.randint(16, 80)) for _ in range(100)]
  rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
  (folder / "prompts.jsonl").write_text("".join(rows))


def ours(folder, shape):
  """Takes turns until none is left, by this package."""
  sys.path.insert(0, str(ROOT))
  from jaxalign.sampling.generator import Generator

  preset, prompts, samples, tokens, sampling = SHAPES[shape]
  call = Generator.__call__

  def noted(self, params, prompts, samples, key):
    (folder / "asked.json").write_text(json.dumps(list(prompts)))
    return call(self, params, prompts, samples, key)

  Generator.__call__ = noted
  return versus.ours(
    "superhf",
    ("score/mean", "loss/nll", "num_sampled_tokens"),
    f"configs/superhf.py:{preset}",
    folder / "ours",
    policy=folder / "policy",
    prompts=folder / "prompts.jsonl",
    reward_model=folder / "reward",
    test_reward_model="",
    validation_interval=0,
    max_prompt_chars=10**4,
    system_prompt="",
    superbatch__mode="prompt_accumulation",
    superbatch__prompts=prompts,
    superbatch__samples_per_prompt=samples,
    sampling__max_new_tokens=tokens,
    sampling__truncation="none",
    sampling__top_p=sampling["top_p"],
    sampling__repetition_penalty=sampling["repetition_penalty"],
    scoring__encoding="concat",
    scoring__max_length=1024,
    max_length=1024,
    train_eos=False,
    kl_coefficient=-1.0,
    optimizer__learning_rate=RATE,
    optimizer__clip_norm=0.0,
  )


def theirs(folder, shape, together):
  """Takes turns until none is left: generate, score, one update."""
  import torch
  import transformers

  turns = versus.Turns()
  _, prompts, samples, tokens, sampling = SHAPES[shape]
  policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
  reward = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder / "reward"
  )
  policy.eval(), reward.eval()  # no dropout on either side
  load = transformers.AutoTokenizer.from_pretrained
  left = load(folder / "policy", padding_side="left")
  right, read = (
    load(folder / "policy", padding_side="right"),
    load(folder / "reward"),
  )
  optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, fused=True)
  while True:
    turns.take()
    asked = json.loads((folder / "asked.json").read_text())
    asked = [prompt for prompt in asked for _ in range(samples)]
    parts = [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]
    with turns.stage("sample"), torch.inference_mode():
      texts, drawn = [], 0
      for part in parts:
        batch = left(part, padding=True, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        out = policy.generate(
          input_ids=batch["input_ids"],
          attention_mask=batch["attention_mask"],
          do_sample=True,
          top_k=0,
          max_new_tokens=tokens,
          pad_token_id=left.pad_token_id,
          **sampling,
        )[:, width:]
        drawn += out.numel()
        found = left.batch_decode(out, skip_special_tokens=True)
        texts += [
          f"{prompt} {text.strip()}"
          for prompt, text in zip(part, found, strict=True)
        ]
    with turns.stage("score"), torch.inference_mode():
      scores = []
      for i in range(0, len(texts), BATCH):
        batch = read(texts[i : i + BATCH], padding=True, return_tensors="pt")
        scores.append(reward(**batch).logits[:, 0])
      scores = torch.cat(scores).reshape(prompts, samples)
    with turns.stage("update"):
      best = scores.argmax(1) + samples * torch.arange(prompts)
      kept = [texts[i] for i in best]
      groups = [kept] if together else [[text] for text in kept]
      starts = [len(right(asked[i])["input_ids"]) for i in best]
      batches = [right(x, padding=True, return_tensors="pt") for x in groups]
      for batch in batches:
        labels = batch["input_ids"].masked_fill(
          batch["attention_mask"] == 0, -100
        )
        for row in labels:
          row[: starts.pop(0)] = -100
        batch["labels"] = labels
      count = sum((x["labels"][:, 1:] >= 0).sum() for x in batches)
      total = 0.0
      for batch in batches:
        batch.pop("token_type_ids", None)
        loss = policy(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
      optimizer.step()
      optimizer.zero_grad()
    turns.note(
      **{"score/mean": scores.mean().item(), "loss/nll": total},
      num_sampled_tokens=drawn,
    )


def stages(steps):
  """Median seconds of a step's stages and of what is left of it."""
  steps = steps[2:]
  rest = [s["seconds"] - sum(s["waits"][n] for n in STAGES) for s in steps]
  found = {n: [s["waits"][n] for s in steps] for n in STAGES} | {"rest": rest}
  return {n: round(statistics.median(x), 4) for n, x in found.items()}


def spread(found, seconds):
  """The least, the median and the largest ratio over the pairs of steps."""
  mine, other = ([seconds(s) for s in steps[2:]] for steps in found.values())
  times = sorted(b / a for a, b in zip(mine, other, strict=True))
  chosen = times[0], statistics.median(times), times[-1]
  return [round(x, 2) for x in chosen]


def against_torch(shape, together, repeats, python):
  """Both sides' figures."""
  _, prompts, samples, tokens, _ = SHAPES[shape]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    side = [__file__, "--folder", name, "--shape", shape]
    side += ["--together"] if together else []
    subprocess.run([sys.executable, *side, "--side=make"], check=True)
    sides = {
      "jaxalign": [python, *side, "--side=ours"],
      "torch": [sys.executable, *side, "--side=theirs"],
    }
    found = versus.alternate(folder, sides, repeats, AHEAD)
  for side in found.values():
    for step in side[1:]:
      assert step["num_sampled_tokens"] == prompts * samples * tokens, step

  def reported(steps):
    means = {
      name: statistics.mean(s[name] for s in steps[1:])
      for name in ("score/mean", "loss/nll")
    }
    return versus.summary(steps) | {
      "stages": stages(steps),
      **{name: round(mean, 3) for name, mean in means.items()},
    }

  both = {name: reported(steps) for name, steps in found.items()}
  return {
    "shape": f"{shape}: {prompts} prompts x {samples} samples x {tokens} "
    "tokens, float32",
    **both,
    **versus.ratios(*both.values()),
    "speedup_of_each_step": spread(found, lambda s: s["seconds"]),
    "speedup_of_stages": {
      n: spread(found, lambda s, n=n: s["waits"][n]) for n in STAGES
    },
  }


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--against", choices=("torch",))
  parser.add_argument("--shape", choices=SHAPES, default="lab")
  parser.add_argument("--together", action="store_true")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--folder", type=pathlib.Path)  # these two: of a side
  parser.add_argument("--side", choices=("make", "ours", "theirs"))
  flags = parser.parse_args()
  if flags.side == "make":
    return make(flags.folder, flags.shape)
  if flags.side == "ours":
    return ours(flags.folder, flags.shape)
  if flags.side == "theirs":
    return theirs(flags.folder, flags.shape, flags.together)
  if flags.against:
    found = against_torch(
      flags.shape, flags.together, flags.repeats, flags.python
    )
  else:
    found = alone(flags.steps)
  print(json.dumps({"bench": "superhf_step", **versus.machine(), **found}))


if __name__ == "__main__":
  main()
