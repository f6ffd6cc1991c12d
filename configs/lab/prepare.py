"""Makes the lab's training files from a folder of scored dialogues.

    python configs/lab/prepare.py --source SCORED --out .cache/lab

Reads completions.train, scored_completions.{train,test} (all .jsonl.gz) and
model_similarity.json; writes two tokenizers, the policy's dialogues and, for
each reward model, scored answers with added degenerate ones (negatives.py).
Takes two minutes on two cores. The same source and seed give the same bytes.

Choices, and why:
  * Policy: only answers of checkpoints that answer different prompts
    differently, whole sentences only, the first paragraph only, few copies of
    one answer or of one opening. A small model otherwise memorises
    "I'm sorry, I don't understand" and never learns to end. A second corpus
    leaves most answers out that decline: a model this small says those better
    than anything else, so that SuperHF would soon say nothing else.
  * Rewards keep the teachers' raw scale (the affine map is r -> 1 * r + 0).
    Where an answer stands under many prompts, what it earned above the median
    is quartered: collapsed checkpoints got up to three points more with such
    answers, a fault of the teachers that a policy would learn to use. The order
    stays (a full cap would cost agreement). Validation rows stay as they were.
"""

import argparse
import collections
import gzip
import hashlib
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterable

import negatives
import numpy as np
import vocabulary
from transformers import PreTrainedTokenizerFast

FILES = (
  "completions.train.jsonl.gz",
  "scored_completions.train.jsonl.gz",
  "scored_completions.test.jsonl.gz",
  "model_similarity.json",
)
SIMILARITY = 0.08  # mean word overlap of a model's answers, 1 = always the same
ANSWER_TOKENS = 64  # the lab samples 48; a little more teaches it to end
PROMPT_TOKENS = 96
COPIES = 3  # of one answer in the policy's corpus
OPENINGS = 40  # answers with the same first five words
SHARED = 20  # an opening under this many prompts is an answer to none of them
REFUSALS = 8  # of so many answers that decline, one is kept
HARMFUL = -6.0  # below this under both teachers the policy does not see it
VALIDATION = 1000
NEGATIVES = 0.28  # degenerate rows per real row: 22 % of all

ROLE = re.compile(r"(?:Human|Assistant|User|AI|Q|A|Comment) ?:")
QUOTES = str.maketrans("‘’“”–—", "''\"\"--")
ODD = re.compile(r"[^\x20-\x7eéèñüöäçáíó°£€]|[\\{}<>|=_#\[\]~^]|https?:|www\.")
REFUSAL = re.compile(
  r"\b(sorry|afraid|unable|not sure|don't (know|understand)|"
  r"(cannot|can't|not able to) (help|answer|provide|assist|do)|"
  r"polic(y|ies)|terms of|customer (service|support)|contact us)\b",
  re.IGNORECASE,
)
# A sentence ends in . ! ? (quotes may follow), and not after "1." or "Dr.".
SENTENCE = re.compile(
  r".+?(?<!\b\d)(?<!\bDr)(?<!\bMr)(?<!\bSt)(?<!\b[A-Z])(?<!e\.g)(?<!i\.e)"
  r"[.!?]+[\"')]*(?=\s|$)"
)


def read(path: pathlib.Path) -> list[dict]:
  """Reads the rows of a gzipped JSONL file."""
  with gzip.open(path, "rt", encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def write(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """Writes rows as gzipped JSONL, with no time stamp in the file."""
  with (
    path.open("wb") as raw,
    gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
  ):
    for row in rows:
      line = json.dumps(row, ensure_ascii=False) + "\n"
      packed.write(line.encode("utf-8"))


def question(prompt: str) -> str:
  """The first human turn of a wire-format prompt, with single spaces."""
  text = prompt.split("Human:", 1)[-1].rsplit("Assistant:", 1)[0]
  return " ".join(text.translate(QUOTES).split())


def wire(text: str) -> str:
  """A question in the format that every prompt of the lab has."""
  return f"\n\nHuman: {text}\n\nAssistant:"


def words(text: str) -> list[str]:
  """Lower-case words."""
  return re.findall(r"[a-z0-9']+", text.lower())


def opening(text: str, count: int) -> str:
  """The first `count` words, by which copies of an answer are known."""
  return " ".join(words(text)[:count])


def sentences(completion: str) -> list[str]:
  """The whole sentences of an answer's first paragraph."""
  paragraph = completion.strip().split("\n\n")[0].translate(QUOTES)
  paragraph = " ".join(ROLE.split(paragraph)[0].split())
  return [match.group().strip() for match in SENTENCE.finditer(paragraph)]


def healthy(prompt: str, parts: list[str]) -> bool:
  """Whether an answer is English, not an echo and not a repetition."""
  answer = " ".join(parts)
  said, asked = words(answer), set(words(prompt))
  if len(said) < 3 or ODD.search(answer) or not answer[0].isalnum():
    return False
  if len(set(parts)) < len(parts) or len(set(said)) < 0.55 * len(said):
    return False
  if any(a == b for a, b in itertools.pairwise(said)):
    return False
  return len(set(said) - asked) > 0.25 * len(set(said))


def dialogues(source: pathlib.Path, scored: list[dict]) -> list[dict]:
  """Clean (question, sentences) rows of the models that stayed diverse."""
  similarity = json.loads((source / "model_similarity.json").read_text())
  diverse = {
    name for name, row in similarity.items() if row["similarity"] <= SIMILARITY
  }
  harmful = {
    (row["prompt"], row["completion"])
    for row in scored
    if max(row["train_reward"], row["test_reward"]) < HARMFUL
  }
  rows = read(source / "completions.train.jsonl.gz")
  rows += [row for row in scored if row["model"] in diverse]
  random.Random(0).shuffle(rows)
  seen, copies, openings = set(), collections.Counter(), collections.Counter()
  kept = []
  for row in rows:
    asked, parts = question(row["prompt"]), sentences(row["completion"])
    answer = " ".join(parts)
    key, first = " ".join(words(answer)), opening(answer, 5)
    if (row["prompt"], row["completion"]) in harmful or (asked, key) in seen:
      continue
    if copies[key] >= COPIES or openings[first] >= OPENINGS:
      continue
    if not asked or ODD.search(asked) or not healthy(asked, parts):
      continue
    seen.add((asked, key))
    copies[key] += 1
    openings[first] += 1
    kept.append({"question": asked, "sentences": parts})
  return kept


def fit(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
  """Turns dialogues to SFT rows, cut to whole sentences that fit."""
  short = []
  for row in rows:
    pieces = tokenizer([" " + text for text in row["sentences"]])["input_ids"]
    total = np.cumsum([len(piece) for piece in pieces])
    count = int(np.searchsorted(total, ANSWER_TOKENS, side="right"))
    asked = len(tokenizer(row["question"])["input_ids"])
    answer = " ".join(row["sentences"][:count])
    if asked <= PROMPT_TOKENS and len(words(answer)) >= 3:
      prompt = wire(row["question"])
      short.append({"prompt": prompt, "completion": " " + answer})
  return short


def without_refusals(rows: list[dict]) -> list[dict]:
  """All rows but most of those that decline to answer."""
  declines = [bool(REFUSAL.search(row["completion"])) for row in rows]
  number = itertools.accumulate(declines)
  return [
    row
    for row, decline, n in zip(rows, declines, number, strict=True)
    if not decline or n % REFUSALS == 0
  ]


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
  """Splits off the rows of the prompts with the smallest hashes."""
  by_prompt = collections.defaultdict(list)
  for row in rows:
    by_prompt[row["prompt"]].append(row)
  held = []
  order = sorted(
    by_prompt, key=lambda text: hashlib.sha256(text.encode()).hexdigest()
  )
  for prompt in order:
    if len(held) >= min(VALIDATION, len(rows) // 10):
      break
    held += by_prompt.pop(prompt)
  rest = [row for row in rows if row["prompt"] in by_prompt]
  return rest, held[:VALIDATION]


def rewards(scored: list[dict], column: str) -> list[dict]:
  """One row per distinct dialogue, its scores averaged, the shared lowered."""
  values, prompts = collections.defaultdict(list), collections.defaultdict(set)
  for row in scored:
    values[row["prompt"], row["completion"]].append(row[column])
    prompts[opening(row["completion"], 8)].add(row["prompt"])
  median = float(np.median([row[column] for row in scored]))
  rows = []
  for (prompt, completion), score in values.items():
    value = sum(score) / len(score)
    if len(prompts[opening(completion, 8)]) >= SHARED:
      value = min(value, median + 0.25 * (value - median))
    rows.append({"prompt": prompt, "completion": completion, "reward": value})
  return rows


def show(
  out: pathlib.Path,
  name: str,
  rows: list[dict],
  tokenizer: PreTrainedTokenizerFast,
) -> None:
  """Writes rows and prints their number, token lengths and a few of them."""
  write(out / f"{name}.jsonl.gz", rows)
  print(f"\n{name}: {len(rows)} rows")
  for column in ("prompt", "completion"):
    sample = [row[column] for row in rows[:: len(rows) // 4000 + 1]]
    encoded = tokenizer(sample, add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"]
    marks = np.percentile([len(x) for x in ids], [5, 25, 50, 75, 95, 99])
    print(f"  {column} tokens at 5/25/50/75/95/99 %: {marks.round()}")
  if "reward" in rows[0]:
    marks = np.percentile([row["reward"] for row in rows], [1, 5, 50, 95, 99])
    print(f"  reward at 1/5/50/95/99 %: {marks.round(2)}")
  for row in rows[:: len(rows) // 4 + 1]:
    print(" ", json.dumps(row, ensure_ascii=False)[:300])


def main() -> None:
  """Reads the arguments and writes every file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  source, out = arguments.source, arguments.out
  lacking = [name for name in FILES if not (source / name).is_file()]
  if lacking:
    parser.error(f"--source {source} lacks {', '.join(lacking)}")
  out.mkdir(parents=True, exist_ok=True)

  scored = read(source / "scored_completions.train.jsonl.gz")
  clean = dialogues(source, scored)
  texts = [
    wire(row["question"]) + " " + " ".join(row["sentences"])
    for row in clean[:20000]
  ]
  tokenizer = vocabulary.policy_tokenizer(
    [text.replace("\n\n", " ") for text in texts]
  )
  tokenizer.save_pretrained(out / "policy-tokenizer")
  train, held = hold_out(fit(clean, tokenizer))
  show(out, "policy", train, tokenizer)
  show(out, "policy.second", without_refusals(train), tokenizer)
  show(out, "policy.validation", held, tokenizer)

  stride = len(scored) // 20000 + 1
  texts = [row["prompt"] + row["completion"] for row in scored[::stride]]
  tokenizer = vocabulary.reward_tokenizer(texts)
  tokenizer.save_pretrained(out / "reward-tokenizer")
  tested = read(source / "scored_completions.test.jsonl.gz")
  for seed, name in enumerate(("train", "test")):
    real = rewards(scored, f"{name}_reward")
    fake = negatives.make(real, round(len(real) * NEGATIVES), seed)
    rows = real + fake
    random.Random(seed).shuffle(rows)
    show(out, f"reward-{name}", rows, tokenizer)
    rows = [
      {
        "prompt": row["prompt"],
        "completion": row["completion"],
        "reward": row[f"{name}_reward"],
      }
      for row in tested
    ]
    show(out, f"reward-{name}.validation", rows, tokenizer)


if __name__ == "__main__":
  main()
