"""One DPO step against TRL's DPOTrainer, both measured in one run.

Random weights in Pythia-70M's shape, float32, 8 pairs of 128 tokens of which
the first 64 are their prompt, AdamW, gradients clipped at 1; once with the
reference in memory, once with its log-probabilities computed before. Ours is
the command as it stands (`configs/dpo.py:causal`), TRL's its `train()`: each
step counts whole, data and metrics included. Both read the same folder and the
same rows and must report the same losses and log-probabilities.

TRL (written for 1.16.0) lives in an environment of its own. It gets what serves
it best on a CPU: float32, no gradient checkpointing (its default is on), the
fused AdamW, no workers, no logging. Prints one JSON line.

    python tests/bench/dpo_step.py --trl=/path/to/its/python [--repeats 5]
"""

import argparse
import functools
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import versus

PAIRS, LENGTH, RATE = 8, 128, 1e-5
NOTED = ("loss/total", "logps/chosen", "logps/rejected")


def write_rows(path, shared):
  """Pairs of `LENGTH` tokens, end of text included, as text."""
  rng = random.Random(0)
  answer = functools.partial(versus.words, rng, LENGTH - shared - 1)
  with open(path, "w") as file:
    for _ in range(PAIRS):
      row = {"prompt": versus.prompt(rng, shared)}
      row |= {"chosen": " " + answer(), "rejected": " " + answer()}
      file.write(json.dumps(row) + "\n")


def ours(folder, reference):
  """Takes turns until none is left, by this package."""
  return versus.ours(
    "dpo",
    NOTED,
    "configs/dpo.py:causal",
    folder / f"ours-{reference}",
    policy=folder / "policy",
    data=folder / "rows.jsonl",
    reference=reference,
    batch_size=PAIRS,
    max_length=LENGTH,
    optimizer__learning_rate=RATE,
    optimizer__weight_decay=0.0,
  )


def theirs(folder, reference):
  """Takes turns until none is left, by TRL."""
  import datasets
  import transformers
  import trl

  turns = versus.Turns()

  class Noted(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
      turns.take()

  class Trainer(trl.DPOTrainer):
    def training_step(self, *args, **kwargs):
      loss = super().training_step(*args, **kwargs)
      found = self._metrics["train"]
      told = {name: sum(found[name][-1:]) for name in NOTED[1:]}
      turns.note(**told | {NOTED[0]: loss.item()})
      return loss

  rows = datasets.load_dataset(
    "json", data_files=str(folder / "rows.jsonl"), split="train"
  )
  path = str(folder / "policy")
  load = transformers.AutoModelForCausalLM.from_pretrained
  config = trl.DPOConfig(
    output_dir=str(folder / f"theirs-{reference}"),
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    precompute_ref_log_probs=reference == "stored",
    per_device_train_batch_size=PAIRS,
    max_length=LENGTH,
    max_steps=10**6,
    learning_rate=RATE,
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  Trainer(
    model=load(path, dtype="float32"),
    ref_model=load(path, dtype="float32") if reference == "auto" else None,
    args=config,
    train_dataset=rows,
    processing_class=transformers.AutoTokenizer.from_pretrained(path),
    callbacks=[Noted()],
  ).train()


def compare(folder, trl, reference, repeats):
  """Both sides' figures with one kind of reference."""
  side = [__file__, "--folder", str(folder), "--reference", reference]
  found = versus.alternate(
    folder,
    {
      "jaxalign": [sys.executable, *side, "--side=ours"],
      "trl": [trl, *side, "--side=theirs"],
    },
    repeats,
  )
  for step, (mine, other) in enumerate(zip(*found.values(), strict=True)):
    for name in NOTED if step else ():
      assert abs(mine[name] / other[name] - 1) < 1e-4, (step, mine, other)
  sides = {name: versus.summary(steps) for name, steps in found.items()}
  for figures in sides.values():
    tokens = 2 * PAIRS * LENGTH / figures["seconds"]
    figures["tokens_per_s"] = round(tokens)
  return sides | versus.ratios(*sides.values())


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--trl", default=sys.executable)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--prompt", type=int, default=LENGTH // 2)
  parser.add_argument("--reference", default="auto")  # the rest: of a side
  parser.add_argument("--folder", type=pathlib.Path)
  parser.add_argument("--side", choices=("make", "ours", "theirs"))
  flags = parser.parse_args()
  if flags.side == "make":
    return versus.make_model(flags.folder / "policy")
  if flags.side:
    side = {"ours": ours, "theirs": theirs}[flags.side]
    return side(flags.folder, flags.reference)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_rows(folder / "rows.jsonl", flags.prompt)
    made = [flags.trl, __file__, "--folder", name, "--side=make"]
    subprocess.run(made, check=True)
    report = {
      "bench": "dpo_step",
      "shape": f"{PAIRS} pairs x {LENGTH} Pythia-70M float32, AdamW, "
      f"{flags.prompt} of a text's tokens its prompt",
      **versus.machine(),
      "live": compare(folder, flags.trl, "auto", flags.repeats),
      "stored": compare(folder, flags.trl, "stored", flags.repeats),
    }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
