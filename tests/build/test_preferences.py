"""Comparisons to batches, and what is told of those that are left out."""

import json

import pytest

from jaxalign.build import labelled, preferences
from jaxalign.config import DPOConfig, KTOConfig
from jaxalign.errors import UserError


@pytest.fixture
def tokenizer(word_tokenizer):
  return word_tokenizer(["q", "a", "b", "c"])


@pytest.fixture
def source(tmp_path):
  """Rows -> the path of a file of them."""

  def write(rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

  return write


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b c"}
ODD = [
  GOOD,
  GOOD | {"rejected": "a"},
  GOOD | {"rejected": "  "},
  GOOD | {"chosen": ""},
  GOOD | {"chosen": "c"},
]


@pytest.mark.parametrize(
  ("task", "config", "rows"),
  [
    (preferences.pair_task, DPOConfig, 2),
    (labelled.labelled_task, KTOConfig, 4),
  ],
)
def test_useless_rows_are_counted_and_said(
  task, config, rows, tokenizer, source, capsys
):
  path = source(ODD)
  _, steps = task(config(data=path, batch_size=2), tokenizer, 32)
  assert steps == rows // 2
  assert capsys.readouterr().out == (
    f"{path}: {rows} rows from 5 (left out: 2 empty, 1 without a preference)\n"
  )


def test_a_batch_holds_chosen_answers_first(tokenizer, source):
  rows = [GOOD, GOOD | {"chosen": "c", "rejected": "b"}]
  cfg = DPOConfig(data=source(rows), batch_size=2, micro_batch=1)
  task, _ = preferences.pair_task(cfg, tokenizer, 32)
  batch = task.batch(0)
  assert batch.tokens.shape[:2] == (2, 2)  # a pair in each micro-batch
  answers = {
    tuple(
      tokenizer.decode(ids[mask])
      for ids, mask in zip(micro, masks, strict=True)
    )
    for micro, masks in zip(batch.tokens, batch.loss_mask, strict=True)
  }
  assert answers == {("a", "b c"), ("c", "b")}


def test_texts_are_every_row_once(tokenizer, source):
  rows = [GOOD | {"rejected": "b " * n} for n in (1, 9, 3, 40, 2)]
  cfg = DPOConfig(data=source(rows), batch_size=4, micro_batch=2)
  task, _ = preferences.pair_task(cfg, tokenizer, 64)
  found = list(task.texts())
  assert [text.tokens.shape for text in found] == [
    (1, 4, 32),
    (1, 4, 32),
    (1, 4, 64),
  ]  # by length, the last one filled up
  count = sum(text.loss_mask.any(axis=-1).sum() for text in found)
  assert count == 10


def test_no_pair_is_left(tokenizer, source):
  path = source([GOOD | {"prompt": "q " * 40}])
  with pytest.raises(UserError, match=r"no pair is left of 1: 1 are within"):
    preferences.pair_task(DPOConfig(data=path), tokenizer, 16)
