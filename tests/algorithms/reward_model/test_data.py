"""Rows to batches for reward models."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredRows, load_data
from jaxalign.errors import UserError

BUCKETS = (32, 64, 128)


def columns(lengths):
  """Rows whose ids are their own number, so that they can be told apart."""
  count = len(lengths)
  return ScoredRows(
    ids=[[i + 1] * n for i, n in enumerate(lengths)],
    types=[[0] * n for n in lengths],
    reward=[float(i) for i in range(count)],
    margin=[0.0] * count,
    group=[i // 2 for i in range(count)],
    chars=list(lengths),
    judge=[""] * count,
  )


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
  batch = columns(lengths).pack(np.arange(len(lengths)), 128, BUCKETS, 1)
  assert (batch.short, batch.tokens.shape[-1]) == (short, width)
  assert not batch.mask[0, :short, batch.half :].any()
  # Sorted by length, every column with its row.
  rows = batch.tokens[0, :, 0] - 1
  np.testing.assert_array_equal(batch.mask[0].sum(1), np.sort(lengths))
  np.testing.assert_array_equal(batch.reward[0], rows)
  np.testing.assert_array_equal(batch.group[0], rows // 2)


@pytest.mark.parametrize(
  ("parts", "short"), [(1, 12), (4, 12), (8, 8), (16, 0)]
)
def test_rows_of_each_width_divide_over_the_mesh(parts, short):
  """Or every device would compute all of them."""
  lengths = [120, 100, 90] + [30] * 13
  batch = columns(lengths).pack(np.arange(16), 128, BUCKETS, 1, parts=parts)
  assert batch.short == short


def test_micro_batches_keep_their_rows_and_filler_counts_in_nothing():
  lengths = [120, 20, 64, 30, 100, 60, 50, 10]
  batch = columns(lengths).pack(np.arange(8), 128, BUCKETS, 2)
  assert [set(row) for row in batch.group] == [{0, 1}, {2, 3}]
  assert batch.short == 3  # one of each micro-batch is too long
  filled = columns(lengths).pack(np.arange(3), 128, BUCKETS, 1, fill=8)
  assert filled.tokens.shape == (1, 8, 128)
  assert sorted(filled.reward[filled.real]) == [0, 1, 2]


@pytest.fixture
def tokenizer(word_tokenizer):
  return word_tokenizer(["a", "b", "c", "d"])


def written(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_scores_in_a_column_of_another_name_and_long_rows(tokenizer, tmp_path):
  rows = [
    {"prompt": "a", "completion": answer, "score": score}
    for answer, score in ((" b", 1.5), (" c", 0.5), (" b c d a b", 9.0))
  ]
  config = RewardModelConfig(
    encoding="concat",
    policy="x",
    data=written(tmp_path / "rows.jsonl", rows),
    loss="distill",
    reward_column="score",
    max_example_chars=6,
    batch_size=2,
  )
  data = load_data(config, tokenizer, 32, "score_last")
  assert data.config.steps == 1
  assert sorted(data.batch(0).reward.reshape(-1)) == [0.5, 1.5]
  config = dataclasses.replace(config, max_example_chars=2)
  with pytest.raises(
    UserError, match=r"left of 3 \(3 above max_ex.*; raise config\.max_ex"
  ):
    load_data(config, tokenizer, 32, "score_last")


@pytest.mark.parametrize("head", ["score_last", "score_eos"])
def test_a_score_at_the_end_of_text_needs_one(head, tokenizer, tmp_path):
  """Whatever the config says: the model's own head decides."""
  row = {"prompt": "a", "chosen": " b", "rejected": " c"}
  config = RewardModelConfig(
    encoding="concat",
    data=written(tmp_path / "rows.jsonl", [row]),
    batch_size=2,
  )
  batch = load_data(config, tokenizer, 32, head).batch(0)
  last = batch.tokens[0][np.arange(2), batch.mask[0].sum(axis=1) - 1]
  assert (last == tokenizer.eos_id).all() == (head == "score_eos")


def judged(tmp_path, *rows, **changes):
  """Comparisons `(prompt, chosen, rejected, who)` as a config's data."""
  names = ("prompt", "chosen", "rejected", "who")
  found = [dict(zip(names, row, strict=True)) for row in rows]
  fields = {
    "data": written(tmp_path / "rows.jsonl", found),
    "group_column": "who",
    "batch_size": 2,
  }
  return RewardModelConfig(**{"encoding": "concat"} | fields | changes)


def loaded(config, tokenizer, known=()):
  return load_data(config, tokenizer, 32, "score_last", known)


TWO = (("a", " b", " c", "zoe"), ("a", " c", " b", 7), ("d", " a", " b", "zoe"))


def test_rows_carry_the_head_of_who_judged_them(
  tokenizer, tmp_path, caplog, capsys
):
  config = judged(tmp_path, *TWO)
  held = dataclasses.replace(config, validation_data=config.data)
  data = loaded(held, tokenizer)
  assert data.config.groups == ("7", "zoe")
  assert data.config.steps == 3
  steps = [data.batch(step) for step in range(3)]
  for batches in (steps, data.validation):
    heads = [batch.head.reshape(-1).tolist() for batch in batches]
    assert sorted(heads) == [[0, 0], [1, 1], [1, 1]]
  assert "completions by group: 7 2, zoe 4" in capsys.readouterr().out
  assert (
    "fewer than 20 completions by 7, zoe; heads of their own" in caplog.text
  )


def test_a_run_without_groups_carries_no_heads(tokenizer, tmp_path):
  config = judged(tmp_path, *TWO, group_column="")
  data = loaded(config, tokenizer)
  assert data.config.groups == ()
  assert data.batch(0).head is None


def test_scores_by_two_groups_are_never_compared(tokenizer, tmp_path):
  """Both score both answers to one prompt; each has a number of its own."""
  rows = [
    {"prompt": "a", "completion": answer, "reward": reward, "who": who}
    for who in ("x", "y")
    for reward, answer in enumerate((" b", " c"))
  ]
  path = written(tmp_path / "rows.jsonl", rows)
  config = RewardModelConfig(
    encoding="concat", data=path, loss="both", group_column="who", batch_size=4
  )
  batch = loaded(config, tokenizer).batch(0)
  assert sorted(
    zip(batch.head[0].tolist(), batch.group[0].tolist(), strict=True)
  ) == [(0, 0), (0, 0), (1, 1), (1, 1)]
  alone = dataclasses.replace(config, group_column="")
  assert set(loaded(alone, tokenizer).batch(0).group[0]) == {0}


def test_the_heads_keep_their_order(tokenizer, tmp_path):
  config = judged(tmp_path, *TWO, groups=("zoe", "7", "eve"))
  data = loaded(config, tokenizer)
  assert data.config.groups == ("zoe", "7", "eve")
  assert {int(data.batch(step).head[0, 0]) for step in range(3)} == {0, 1}
  known = ("7", "eve", "zoe")
  config = dataclasses.replace(config, groups=())
  assert loaded(config, tokenizer, known).config.groups == known


@pytest.mark.parametrize(
  ("rows", "changes", "known", "message"),
  [
    (TWO[:1], {}, (), "config.group_column: who is 'zoe' in every row of"),
    (
      TWO,
      {},
      ("7", "eve"),
      "has rows of zoe, for whom there is no head; the groups are 7, eve",
    ),
    (
      TWO,
      {"groups": ("7", "eve")},
      (),
      "has rows of zoe, for whom there is no head; the groups are 7, eve",
    ),
    (
      TWO,
      {"group_column": ""},
      ("7", "zoe"),
      "config.policy: lab has a score head for each of 7, zoe; name the column",
    ),
    (
      TWO,
      {"groups": ("zoe", "7")},
      ("7", "zoe"),
      "config.groups=zoe,7 differs from the heads that lab has, 7, zoe; leave",
    ),
  ],
)
def test_groups_that_do_not_fit(
  rows, changes, known, message, tokenizer, tmp_path
):
  with pytest.raises(UserError, match=re.escape(message)):
    loaded(judged(tmp_path, *rows, **changes), tokenizer, known)


def test_held_out_rows_of_a_stranger(tokenizer, tmp_path):
  held = judged(tmp_path / "held", ("a", " b", " c", "eve"))
  config = judged(tmp_path, *TWO, validation_data=held.data)
  with pytest.raises(
    UserError, match=r"config\.validation_data: .* has rows of eve, for whom"
  ):
    loaded(config, tokenizer)
