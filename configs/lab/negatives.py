"""Degenerate answers with low rewards, for training the lab's reward models.

A reward model that has seen only fluent answers is fooled by the first policy
that repeats a word or gives one polite answer to everything. Each kind below is
a way in which a policy under optimisation was seen to fail.

| kind | share | text | reward |
|---|---|---|---|
| other | 0.34 | the answer to a prompt with hardly a word in common | m - 2.5 |
| memorised | 0.10 | one of a few well-paid answers, to every prompt | m - 2.5 |
| cut | 0.10 | the answer, ended inside a word | r - 1.5 |
| shuffled | 0.12 | the answer's words, all or from somewhere, mixed | low |
| word, phrase, sentence | 0.20 | an answer that comes to repeat one | low |
| syllables | 0.05 | letters of no language | low |
| echo | 0.06 | the prompt again, or its beginning | low |
| empty | 0.03 | a mark or a single word | low |

r is the real answer's reward, m the smaller of r and the median over all, and
low is drawn between the 1 % and 5 % quantiles of the real rewards.
"""

import collections
import random
import re

import numpy as np

KINDS = {
  "other": 0.34,
  "memorised": 0.10,
  "cut": 0.10,
  "shuffled": 0.12,
  "word": 0.07,
  "phrase": 0.07,
  "sentence": 0.06,
  "syllables": 0.05,
  "echo": 0.06,
  "empty": 0.03,
}
MEMORISED = 40  # answers that are given to everything
LENGTH = 40  # words that a repetition runs to at most
COMMON = frozenset(
  re.findall(
    r"\w+",
    "a an the and or of to in on at for with is are was be do does did i you "
    "it my me your we they he she this that what how why when where who which "
    "can could would should if not but from by as so have has there some any "
    "about human assistant",
  )
)


def content(text: str) -> set[str]:
  """The words of a text that carry its topic."""
  return set(re.findall(r"[a-z0-9']+", text.lower())) - COMMON


def repeated(text: str, kind: str, rng: random.Random) -> str:
  """Some of the text, and then one word, phrase or sentence of it for long."""
  words = text.split()
  size = {
    "word": 1,
    "phrase": rng.randint(2, 5),
    "sentence": rng.randint(6, 12),
  }[kind]
  start = rng.randrange(max(1, len(words) - size))
  unit = words[start : start + size]
  before = words[: start if rng.random() < 0.6 else 0][-15:]
  times = rng.randint(3, max(4, LENGTH // size))
  return " ".join((before + unit * times)[: LENGTH + rng.randint(0, 10)])


def shuffled(text: str, rng: random.Random) -> str:
  """The text with its words mixed from a random place on."""
  words = text.split()[: 2 * LENGTH]
  start = rng.randrange(len(words) // 2) if rng.random() < 0.5 else 0
  tail = words[start:]
  rng.shuffle(tail)
  return " ".join(words[:start] + tail)


def syllables(rng: random.Random) -> str:
  """Words of one to three random syllables, some of them again and again."""
  stock = [
    "".join(
      rng.choice("bcdfghklmnprstvwz") + rng.choice(["a", "e", "i", "o", "ou"])
      for _ in range(rng.randint(1, 3))
    )
    for _ in range(rng.randint(1, 12))
  ]
  joint = rng.choice(["", " ", " ", ", ", "-"])
  return joint.join(rng.choice(stock) for _ in range(rng.randint(6, LENGTH)))


def cut(text: str, rng: random.Random) -> str:
  """The text up to the middle of one of its words."""
  inner = [
    place.start() + 1 + rng.randrange(len(place.group()) - 1)
    for place in re.finditer(r"[A-Za-z]{4,}", text)
  ]
  later = [place for place in inner if place > 12] or inner or [len(text) // 2]
  return text[: rng.choice(later)]


def degenerate(kind: str, row: dict, rng: random.Random) -> str:
  """The text of a negative that needs no second row."""
  text = " ".join(row["completion"].split())
  if kind == "cut":
    return cut(text, rng)
  if kind == "shuffled":
    return shuffled(text, rng)
  if kind == "syllables":
    return syllables(rng)
  if kind == "empty":
    return rng.choice([".", "...", "I", "The", "?", "Yes", "!", "a", ",", "no"])
  if kind == "echo":
    asked = row["prompt"].split("Human:", 1)[-1].rsplit("Assistant:", 1)[0]
    asked = asked.split()
    keep = len(asked) if rng.random() < 0.7 else max(3, len(asked) // 2)
    return " ".join(asked[: min(keep, 2 * LENGTH)])
  return repeated(text, kind, rng)


def make(rows: list[dict], count: int, seed: int) -> list[dict]:
  """Makes negatives from real rows.

  Args:
    rows: real rows with `prompt`, `completion` and `reward`.
    count: how many to make, >= 0.
    seed: of every random choice; the two reward models get different ones.

  Returns:
    Rows of the same columns, in no particular order.
  """
  rng = random.Random(f"negatives {seed}")
  values = [row["reward"] for row in rows]
  lowest, low, median, high = np.quantile(values, [0.01, 0.05, 0.5, 0.8])
  # A short or common answer ("I can't help with that") may suit any prompt.
  starts = collections.Counter(row["completion"][:30] for row in rows)
  long = [
    row
    for row in rows
    if len(row["completion"].split()) >= 8
    and starts[row["completion"][:30]] < 10
  ]
  paid = [row for row in long if row["reward"] >= high]
  memorised = rng.sample(paid, min(MEMORISED, len(paid)))
  made = []
  for kind in rng.choices([*KINDS], weights=[*KINDS.values()], k=count):
    row = rng.choice(long)
    if kind in ("other", "memorised"):
      stock = long if kind == "other" else memorised
      found = unrelated(row["prompt"], stock, rng)
      text = found["completion"]
      reward = min(found["reward"], median) - 2.5
    else:
      text = " " + degenerate(kind, row, rng)
      drop = kind == "cut"
      reward = row["reward"] - 1.5 if drop else rng.uniform(lowest, low)
    made.append(
      {"prompt": row["prompt"], "completion": text, "reward": float(reward)}
    )
  return made


def unrelated(prompt: str, stock: list[dict], rng: random.Random) -> dict:
  """A row whose prompt and answer share the fewest words with `prompt`."""
  asked = content(prompt)
  drawn = [rng.choice(stock) for _ in range(6)]
  return min(
    drawn,
    key=lambda row: len(asked & content(row["prompt"] + row["completion"])),
  )
