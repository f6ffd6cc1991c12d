"""Preference data that cannot be used: one line, before a tensor is read."""

import json

import pytest

ASK = "\n\nHuman: Why?\n\nAssistant:"
PAIR = {"prompt": ASK, "chosen": " So.", "rejected": " No."}
CONFIGS = ("dpo.py", "kto.py")

# What stands in the data, and what the line must say; {} is the file.
PAIRS = {
  "other columns": (
    [{"question": "a", "winner": "b", "loser": "c"}],
    ("{} has the columns (loser, question, winner), need",),
  ),
  "no rejected": (
    [{"prompt": "a", "chosen": "b"}],
    ("has the columns (chosen, prompt)", "add the column rejected"),
  ),
  "sharegpt": (
    [{"conversations": [], "chosen": {"from": "gpt", "value": "b"}}],
    ("ShareGPT: write @sharegpt after the source's name",),
  ),
  "equal answers": (
    [PAIR | {"chosen": " No. "}],
    ("{}: nothing is left of 1 rows (1 without a preference, 0 bad)",),
  ),
  "empty answers": (
    [PAIR | {"chosen": " "}, PAIR | {"rejected": ""}],
    ("{}: nothing is left of 2 rows (2 empty, 0 bad)",),
  ),
  "other prompts": (
    [
      {
        "chosen": ASK + " So.",
        "rejected": ASK.replace("Why", "How") + " No.",
      }
    ],
    (
      "{}:1 has no \\n\\nAssistant: that chosen and rejected share",
      "write it into a column prompt",
    ),
  ),
  "other questions": (
    [
      {
        "chosen": [
          {"role": "user", "content": "Why?"},
          {"role": "assistant", "content": "So."},
        ],
        "rejected": [
          {"role": "user", "content": "How?"},
          {"role": "assistant", "content": "No."},
        ],
      }
    ],
    ("{}:1 has no turns before the completions that", "a column prompt"),
  ),
  "a number": (
    [PAIR, PAIR | {"chosen": 3}],
    ("{}:2 has a int in chosen, need a string", "1 of 2 rows", "raise the"),
  ),
  "long prompts": (
    [PAIR | {"prompt": "a" * 300}],
    (
      "is left of",
      "without room for a completion, in 96 tokens",
      "config.max_length",
    ),
  ),
}
ANSWER = {"prompt": ASK, "completion": " So.", "label": True}
LABELS = {
  "no label": (
    [{"prompt": "a", "completion": "b"}],
    (
      "{} has the columns (completion, prompt), need (prompt, completion, "
      "label) or (messages, label) or (chosen, rejected); nearest format: add "
      "the column label",
    ),
  ),
  "a grade": (
    [ANSWER, ANSWER | {"label": 4}],
    (
      "{}:2 has 4 in label, need true or false",
      "say label = grade > 3",
      "1 of 2 rows",
    ),
  ),
  "a word": (
    [ANSWER | {"label": "good"}],
    ("{}:1 has 'good' in label, need true or false",),
  ),
  "a gap": ([ANSWER | {"label": None}, ANSWER], ("{}:1 has no label",)),
  "empty answers": (
    [ANSWER | {"completion": ""}],
    ("{}: nothing is left of 1 rows (1 empty, 0 bad)",),
  ),
}
CASES = [
  *((config, *case) for case in PAIRS.values() for config in CONFIGS),
  *(("kto.py", *case) for case in LABELS.values()),
]
IDS = [
  *(f"{name}, {config[:3]}" for name in PAIRS for config in CONFIGS),
  *LABELS,
]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.mark.parametrize("name", ["data", "validation_data"])
@pytest.mark.parametrize(("config", "rows", "words"), CASES, ids=IDS)
def test_bad_comparisons(
  name, config, rows, words, lab, supervised, run, fail, tmp_path
):
  path = write(tmp_path / "mine.jsonl", rows)
  sources = {"data": lab.pairs} | {name: path}
  line = fail(supervised(config, run, policy=lab.policy, **sources))
  for word in words:
    assert word.replace("{}", str(path)) in line


@pytest.mark.parametrize("reference", ["auto", "stored"])
def test_a_batch_of_one(reference, lab, supervised, run, fail):
  line = fail(
    supervised(
      "kto.py",
      run,
      policy=lab.policy,
      data=lab.pairs,
      batch_size=1,
      reference=reference,
    )
  )
  assert "config.batch_size must be at least 2 while loss='kto', got 1" in line
  assert "prompts with completions of other rows" in line
