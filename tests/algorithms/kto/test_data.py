"""Labelled rows to batches with mismatched pairs."""

import dataclasses
import json

import numpy as np
import pytest

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import load_data
from jaxalign.errors import UserError

WORDS = [f"{kind}{i}" for kind in "qab" for i in range(12)]


@pytest.fixture
def tokenizer(word_tokenizer):
  return word_tokenizer(WORDS)


@pytest.fixture
def source(tmp_path):
  """Rows -> the path of a file of them."""

  def write(rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

  return write


def comparisons(count):
  """Prompt i is `qi`, its answers are `ai` and `bi`."""
  return [
    {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i} b{i}"}
    for i in range(count)
  ]


def answers(labels):
  return [
    {"prompt": f"q{i}", "completion": f"a{i}", "label": label}
    for i, label in enumerate(labels)
  ]


def texts(tokenizer, batch):
  """(prompt, answer) of every row, read back from its tokens."""
  found = []
  for ids, mask, segments in zip(
    batch.tokens.reshape(-1, batch.tokens.shape[-1]),
    batch.loss_mask.reshape(-1, batch.tokens.shape[-1]),
    batch.segment_ids.reshape(-1, batch.tokens.shape[-1]),
    strict=True,
  ):
    ids, mask = ids[segments > 0], mask[segments > 0]
    found.append((tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])))
  return found


def config(data, **changes):
  return KTOConfig(
    **{"data": data, "batch_size": 4, "max_length": 32} | changes
  )


def test_a_batch_of_comparisons(tokenizer, source):
  """Each row's prompt has, mismatched, an answer to another prompt."""
  cfg = config(source(comparisons(6)), batch_size=6, micro_batch=2)
  data = load_data(cfg, tokenizer, 32)
  assert data.config.steps == 2
  seen = []
  for step in range(2):
    batch = data.batch(step)
    assert batch.text.tokens.shape[:2] == batch.desirable.shape == (3, 2)
    own = texts(tokenizer, batch.text)
    crossed = texts(tokenizer, batch.mismatched)
    assert [prompt for prompt, _ in crossed] == [prompt for prompt, _ in own]
    # The same answers, each once, none to its own prompt.
    assert sorted(a for _, a in crossed) == sorted(a for _, a in own)
    for (prompt, answer), good, number in zip(
      own, batch.desirable.flat, batch.group.flat, strict=True
    ):
      assert prompt == f"q{number}"
      assert answer == (f"a{number}" if good else f"b{number} b{number}")
    for prompt, answer in crossed:
      assert prompt[1:] not in [word[1:] for word in answer.split()]
    seen += own
    assert batch.text.tokens.shape == batch.mismatched.tokens.shape
  assert len(set(seen)) == 12  # a pass over the data


def test_a_step_is_a_pure_function_and_cut_alike(tokenizer, source):
  """Micro-batches hold the same rows and the same mismatched pairs."""
  path = source(comparisons(6))
  whole, cut = (
    load_data(config(path, micro_batch=m), tokenizer, 32) for m in (0, 1)
  )
  for step in (5, 0):
    a, b = whole.batch(step), cut.batch(step)
    for name in ("text", "mismatched"):
      assert texts(tokenizer, getattr(a, name)) == texts(
        tokenizer, getattr(b, name)
      )


def test_apo_needs_no_mismatched_pairs(tokenizer, source):
  path = source(comparisons(2))
  cfg = config(
    path, loss="apo_zero_unpaired", batch_size=1, validation_data=path
  )
  data = load_data(cfg, tokenizer, 32)
  assert data.config.steps == 4
  assert data.batch(0).mismatched is None
  assert all(batch.mismatched is None for batch in data.validation())


def test_the_last_validation_batch_is_filled_up(tokenizer, source):
  path = source(comparisons(3))
  cfg = config(path, validation_data=path)
  validation = load_data(cfg, tokenizer, 32).validation()
  assert [b.text.tokens.shape[:2] for b in validation] == [(1, 4)] * 2
  last = validation[1]
  assert last.group[0].tolist()[2:] == [-1, -1]
  for text in (last.text, last.mismatched):
    assert text.loss_mask[0].any(axis=1).tolist() == [True, True, False, False]
  found = [row for b in validation for row in texts(tokenizer, b.mismatched)]
  assert all(p[1:] != a[1:2] for p, a in found[:6])


@pytest.mark.parametrize(
  ("labels", "weights", "wanted"),
  [
    ([True] * 6 + [False] * 5, {}, None),  # 1.2
    ([True, False], {}, None),
    ([True] * 4 + [False] * 3, {}, None),  # 4/3
    (
      [True] * 6 + [False] * 2,
      {},
      "config.desirable_weight=1 x 6 desirable rows over "
      "config.undesirable_weight=1 x 2 undesirable rows is 3, advised are 1 to "
      "4/3; set config.desirable_weight to 0.333 to 0.444",
    ),
    (
      [True] * 2 + [False] * 6,
      {"undesirable_weight": 2.0},
      "is 0.167, advised are 1 to 4/3; set config.undesirable_weight to 0.25 "
      "to 0.333",
    ),
    ([True] * 6 + [False] * 2, {"desirable_weight": 0.4}, None),
    ([True] * 4, {}, "all 4 rows are desirable, so only this side is learned"),
    ([False] * 4, {}, "all 4 rows are undesirable, so only"),
  ],
)
def test_labels_out_of_balance(
  labels, weights, wanted, tokenizer, source, caplog
):
  """One line with the numbers; what it advises is then in order."""
  cfg = config(source(answers(labels)), **weights)
  data = load_data(cfg, tokenizer, 32)
  assert data.batch(0).text.loss_mask.any()
  assert len(caplog.messages) == (wanted is not None)
  if wanted is not None:
    assert wanted in caplog.text
    assert "\n" not in caplog.messages[0]
  if wanted and "; set config." in wanted:
    name, _, low, _, high = wanted.split("; set config.")[1].split()
    caplog.clear()
    value = (float(low) + float(high)) / 2
    cfg = dataclasses.replace(cfg, **{name: value})
    load_data(cfg, tokenizer, 32)
    assert not caplog.messages


def test_no_row_is_left(tokenizer, source):
  rows = [{"prompt": "q1 " * 40, "completion": "a1", "label": True}]
  with pytest.raises(
    UserError, match=r"left of 1 \(1 without room .* 32 tokens\); raise config"
  ):
    load_data(config(source(rows)), tokenizer, 512)


def test_prompts_without_room_are_left_out(tokenizer, source):
  rows = [
    *comparisons(2),
    {"prompt": "q9 " * 32, "chosen": "a9", "rejected": "b9"},
  ]
  data = load_data(config(source(rows), max_length=16), tokenizer, 512)
  assert data.config.steps == 1
  prompts = {prompt for prompt, _ in texts(tokenizer, data.batch(0).text)}
  assert prompts == {"q0", "q1"}
  assert np.unique(data.batch(0).group).tolist() == [0, 1]
