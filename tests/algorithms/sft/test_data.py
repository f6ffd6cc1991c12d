"""Rows to batches for SFT."""

import json

import pytest

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.data import load_data


@pytest.fixture
def tokenizer(word_tokenizer):
  return word_tokenizer(["a", "b", "c", "d"])


def written(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_the_last_validation_batch_is_filled_up(tokenizer, tmp_path):
  """A mesh splits every batch alike; empty rows count in nothing."""
  rows = [{"prompt": "a", "completion": " b c"[: 2 * n]} for n in (1, 2, 1)]
  path = written(tmp_path / "rows.jsonl", rows)
  config = SFTConfig(
    data=path, validation_data=path, batch_size=2, max_length=32
  )
  data = load_data(config, tokenizer, 32)
  assert [batch.tokens.shape[:2] for batch in data.validation] == [(1, 2)] * 2
  last = data.validation[1]
  assert last.loss_mask[0, 0].any()
  assert not last.loss_mask[0, 1].any()
  assert not last.segment_ids[0, 1].any()


def test_the_lab_among_other_sources(tokenizer, tmp_path, capsys):
  mine = written(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
  config = SFTConfig(data=f"lab, {mine}", batch_size=1, max_length=512)
  alone = SFTConfig(data="lab", batch_size=1, max_length=512)
  counts = [load_data(c, tokenizer, 512).config.steps for c in (config, alone)]
  assert counts[0] == counts[1] + 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
  ("loss_on", "counted"), [("assistant", "bcd"), ("completion", "d")]
)
def test_which_turns_count(tokenizer, tmp_path, packing, loss_on, counted):
  turns = [
    ("user", "a"),
    ("assistant", "b c"),
    ("user", "b"),
    ("assistant", "d"),
  ]
  row = {"messages": [{"role": r, "content": c} for r, c in turns]}
  path = written(tmp_path / "rows.jsonl", [row, row])
  config = SFTConfig(
    data=path, batch_size=1, max_length=64, packing=packing, loss_on=loss_on
  )
  batch = load_data(config, tokenizer, 64).batch(0)
  said = tokenizer.decode(batch.tokens[batch.loss_mask])
  texts = 2 if packing else 1
  assert said.replace(" ", "") == counted * texts
  # The end of text is in the loss as well.
  assert batch.loss_mask.sum() == (len(counted) + 1) * texts


def test_what_became_of_the_rows_is_a_metric(tokenizer, tmp_path):
  texts = [("a", " b"), ("a", " "), ("a b c d", " b"), ("a", " b c d")]
  rows = [{"prompt": p, "completion": c} for p, c in texts]
  path = written(tmp_path / "rows.jsonl", rows)
  data = load_data(SFTConfig(data=path, max_length=3), tokenizer, 64)
  assert data.counts == {
    "data/rows": 2,
    "data/empty": 1,
    "data/no_room": 1,
    "data/cut": 1,
  }
