"""Measures policies on all prompts of the lab: what the default run changes.

  python configs/lab/measure.py jaxalign/lab/policy runs/superhf-lab/model

Each policy answers every prompt four times at temperature 1, with the same
random numbers; both reward models of the lab score the answers. A run's own
curves show the same with fewer answers and with the first steps' rise in the
first means already.
"""

import argparse
import json
import pathlib

import numpy as np

import jaxalign
from jaxalign.text import similarity
from jaxalign.text.truncate import truncate

LAB = pathlib.Path(jaxalign.__file__).parent / "lab"


def main() -> None:
  """Prints one JSON line a policy."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("policies", nargs="+", help="folders of models")
  parser.add_argument("--answers", type=int, default=4, help="per prompt")
  flags = parser.parse_args()
  lines = (LAB / "prompts.jsonl").read_text().splitlines()
  prompts = [json.loads(line)["prompt"] for line in lines]
  judges = {
    name: jaxalign.load(LAB / f"reward-{name}") for name in ("train", "test")
  }
  for folder in flags.policies:
    asked, texts = answered(jaxalign.load(folder), prompts, flags.answers)
    scores = {
      name: jaxalign.score(judge, asked, texts, encoding="pair")
      for name, judge in judges.items()
    }
    found = {name: float(np.mean(score)) for name, score in scores.items()}
    found["overlap"] = similarity.mean_overlap(asked, texts, max_pairs=4000)
    rounded = {name: round(value, 3) for name, value in found.items()}
    print(json.dumps({"policy": folder, "answers": len(texts), **rounded}))


def answered(
  policy: jaxalign.Loaded, prompts: list[str], each: int
) -> tuple[list[str], list[str]]:
  """The prompt and the text of every answer that is not empty."""
  asked, texts = [], []
  for start in range(0, len(prompts), 64):
    part = prompts[start : start + 64]
    drawn = jaxalign.generate(
      policy, part, samples_per_prompt=each, max_new_tokens=48, seed=start
    )
    for prompt, answers in zip(part, drawn, strict=True):
      kept = [text for text in map(truncate, answers) if text]
      asked += [prompt] * len(kept)
      texts += kept
  return asked, texts


if __name__ == "__main__":
  main()
