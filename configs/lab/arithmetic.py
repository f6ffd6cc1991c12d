"""Small sums with answers that can be checked, and their rewards.

  python configs/lab/arithmetic.py  # writes the two sets again

`sums.jsonl` has the 36 sums of two numbers up to 5, `{"prompt": "What is 3 +
4?", "answer": 7}`. `numbers.jsonl` shows the form of an answer, a number alone.
Its numbers are drawn at random: what a sum is can only be learned from the
reward. docs/reward_functions.md has the runs.
"""

import json
import pathlib
import random
import re

HERE = pathlib.Path(__file__).parent
NUMBER = re.compile(r"\d+")


def correct(completions: list[str], answer: list[int], **_) -> list[float]:
  """1 where the first number of a completion is the answer, else 0."""
  found = [NUMBER.search(text) for text in completions]
  return [
    float(match is not None and int(match[0]) == right)
    for match, right in zip(found, answer, strict=True)
  ]


def bare(completions: list[str], **_) -> list[float]:
  """1 where a completion is a number and nothing else, else 0."""
  return [
    float(NUMBER.fullmatch(text.strip().removesuffix(".")) is not None)
    for text in completions
  ]


def write() -> None:
  """Writes both sets next to this file."""
  sums = [
    {"prompt": f"What is {a} + {b}?", "answer": a + b}
    for a in range(6)
    for b in range(6)
  ]
  rng = random.Random(0)
  numbers = [
    {"prompt": row["prompt"], "completion": f" {number}"}
    for row in sums
    for number in rng.sample(range(11), 8)
  ]
  for name, rows in (("sums", sums), ("numbers", numbers)):
    lines = [json.dumps(row) + "\n" for row in rows]
    (HERE / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
  write()
