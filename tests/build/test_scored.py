"""Rows to batches for reward models."""

import dataclasses
import json

import numpy as np
import pytest

from jaxalign.build import scored
from jaxalign.config import RewardModelConfig
from jaxalign.errors import UserError


def columns(lengths):
  """Rows whose ids are their own number, so that they can be told apart."""
  count = len(lengths)
  return {
    "ids": [[i + 1] * n for i, n in enumerate(lengths)],
    "types": [[0] * n for n in lengths],
    "reward": list(range(count)),
    "margin": [0.0] * count,
    "group": [i // 2 for i in range(count)],
    "chars": lengths,
  }


@pytest.mark.parametrize(
  ("lengths", "short", "width"),
  [
    ([120, 20, 64, 30, 100, 60, 50, 10], 6, 128),  # 64 still fits
    ([120, 120, 65, 30, 100, 60, 66, 70], 2, 128),
    ([30, 30, 30, 30, 30, 30, 30, 30], 0, 32),  # no smaller bucket
    ([60, 1, 1, 1, 1, 1, 1, 1], 6, 64),  # never all rows
    ([120, 1], 0, 128),  # too few rows to cut
  ],
)
def test_short_answers_go_in_quarters_of_the_batch(lengths, short, width):
  batch = scored._scored_batch(
    columns(lengths), np.arange(len(lengths)), 128, 1
  )
  assert (batch.short, batch.tokens.shape[-1]) == (short, width)
  assert not batch.mask[0, :short, batch.half :].any()
  # Sorted by length, every column with its row.
  rows = batch.tokens[0, :, 0] - 1
  np.testing.assert_array_equal(batch.mask[0].sum(1), np.sort(lengths))
  np.testing.assert_array_equal(batch.reward[0], rows)
  np.testing.assert_array_equal(batch.group[0], rows // 2)


def test_micro_batches_keep_their_rows_and_filler_counts_in_nothing():
  lengths = [120, 20, 64, 30, 100, 60, 50, 10]
  batch = scored._scored_batch(columns(lengths), np.arange(8), 128, 2)
  assert [set(row) for row in batch.group] == [{0, 1}, {2, 3}]
  assert batch.short == 3  # one of each micro-batch is too long
  filled = scored._scored_batch(columns(lengths), np.arange(3), 128, 1, fill=8)
  assert filled.tokens.shape == (1, 8, 128)
  assert sorted(filled.reward[filled.real]) == [0, 1, 2]


@pytest.fixture
def tokenizer(word_tokenizer):
  return word_tokenizer(["a", "b", "c", "d"])


def written(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_scores_in_a_column_of_another_name_and_long_rows(tokenizer, tmp_path):
  rows = [
    {"prompt": "a", "completion": answer, "score": score}
    for answer, score in ((" b", 1.5), (" c", 0.5), (" b c d a b", 9.0))
  ]
  config = RewardModelConfig(
    policy="x",
    data=written(tmp_path / "rows.jsonl", rows),
    loss="distill",
    reward_column="score",
    max_example_chars=6,
    batch_size=2,
  )
  task, steps = scored.reward_task(config, tokenizer, 32, "score_last")
  assert steps == 1
  assert sorted(task.batch(0).reward.reshape(-1)) == [0.5, 1.5]
  config = dataclasses.replace(config, max_example_chars=2)
  with pytest.raises(
    UserError, match=r"none of 3 rows is within config\.max_ex"
  ):
    scored.reward_task(config, tokenizer, 32, "score_last")


@pytest.mark.parametrize("head", ["score_last", "score_eos"])
def test_a_score_at_the_end_of_text_needs_one(head, tokenizer, tmp_path):
  """Whatever the config says: the model's own head decides."""
  row = {"prompt": "a", "chosen": " b", "rejected": " c"}
  config = RewardModelConfig(
    data=written(tmp_path / "rows.jsonl", [row]), batch_size=2
  )
  task, _ = scored.reward_task(config, tokenizer, 32, head)
  batch = task.batch(0)
  last = batch.tokens[0][np.arange(2), batch.mask[0].sum(axis=1) - 1]
  assert (last == tokenizer.eos_id).all() == (head == "score_eos")
