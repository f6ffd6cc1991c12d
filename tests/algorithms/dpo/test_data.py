"""Comparisons to batches, and what is told of those that are left out."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.data import load_data, pack_pairs
from jaxalign.algorithms.kto import data as kto_data
from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.core.types import PairBatch
from jaxalign.data.encode import FILLER, Encoded
from jaxalign.data.packing import pack
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.training.forward import completion_logps
from jaxalign.training.reference_cache import digests


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
  ("load", "config", "rows"),
  [
    (functools.partial(load_data, hidden_size=8), DPOConfig, 2),
    (kto_data.load_data, KTOConfig, 4),
  ],
)
def test_useless_rows_are_counted_and_said(
  load, config, rows, tokenizer, source, capsys
):
  path = source(ODD)
  data = load(config(data=path, batch_size=2), tokenizer, 32)
  assert data.config.steps == rows // 2
  assert capsys.readouterr().out == (
    f"{path}: {rows} rows from 5 (left out: 2 empty, 1 without a preference)\n"
  )


@pytest.mark.parametrize("length", [2, 58], ids=["shared", "apart"])
def test_a_batch_holds_chosen_answers_first(length, tokenizer, source):
  tail = " a" * length
  rows = [
    {"prompt": "q", "chosen": "a" + tail, "rejected": "b c" + tail},
    {"prompt": "q", "chosen": "c" + tail, "rejected": "b" + tail},
  ]
  cfg = DPOConfig(data=source(rows), batch_size=2, micro_batch=1)
  batch = load_data(cfg, tokenizer, 64, 8).batch(0)
  # A pair in each micro-batch: in one row of 32 tokens, or in two of 64.
  shape = (2, 1, 32) if length == 2 else (2, 2, 64)
  assert batch.tokens.shape == shape
  # Of the targets; both completions of a pair in one row, or in two.
  mask = np.asarray(batch.completion_mask)
  tokens = np.broadcast_to(batch.targets, mask.shape)
  answers = {
    tuple(tokenizer.decode(ids[on]) for ids, on in zip(*pair, strict=True))
    for pair in zip(tokens, mask, strict=True)
  }
  assert answers == {
    ("a" + tail, "b c" + tail),
    ("c" + tail, "b" + tail),
  }


def encoded(prompt, answer):
  ids, start = (*prompt, *answer), len(prompt)
  mask = tuple(i >= max(start, 1) for i in range(len(ids)))
  return Encoded(ids, start, mask, True)


SHARED = [  # prompt, chosen, rejected
  ((1, 2, 3, 4), (5, 6, 7), (8,)),
  ((9, 10), (3,), (4, 5)),
  ((7,), (8, 9), (1, 1)),
  ((), (5, 6), (6, 6, 7)),
]


@pytest.fixture(scope="module")
def layouts():
  """The same pairs with a shared prompt, filled up, and a text a row."""
  pairs = [tuple(encoded(p, y) for y in ys) for p, *ys in SHARED]
  shared = pack_pairs(pairs, 5, 32, 0, hidden_size=64, buckets=(32, 64))
  rows = [
    [pair[side]] for side in (0, 1) for pair in [*pairs, (FILLER, FILLER)]
  ]
  text = pack(rows, 32, 0)
  apart = PairBatch(
    text.tokens, text.position_ids, text.segment_ids, text.loss_mask
  )
  assert shared.prompt_segment_ids is not None
  assert apart.prompt_segment_ids is None
  return jax.tree.map(lambda x: x[0], (shared, apart))


def test_the_prompt_is_held_once(layouts):
  shared, apart = layouts
  assert shared.tokens.shape == (5, 32)
  np.testing.assert_array_equal(
    shared.tokens[0, :10], [1, 2, 3, 4, 5, 6, 7, 4, 8, 0]
  )
  np.testing.assert_array_equal(
    shared.position_ids[0, :10], [0, 1, 2, 3, 4, 5, 6, 3, 4, 0]
  )
  assert not shared.segment_ids[4].any()
  assert digests(lead(shared)) == digests(lead(apart))
  assert digests(lead(shared))[4] == b""


def lead(tree):
  return jax.tree.map(lambda x: x[None], tree)


def test_a_shared_prompt_changes_no_log_probability(layouts):
  """Nor any gradient."""
  model = Model.build(NeoXConfig(16, 16, 2, 2, 24, rotary_fraction=0.5))
  # Parameters whose gradients float32 rounds well within the tolerance.
  params = model.init(jax.random.key(6))
  params = jax.tree.map(lambda x: 5 * x, params)
  weights = jnp.linspace(-1.0, 1.0, 10)

  @jax.jit
  def found(params, text):
    total, back = jax.vjp(lambda p: completion_logps(model, p, text), params)
    return total, back(weights)[0]

  (one, gradient), (other, wanted) = (found(params, x) for x in layouts)
  np.testing.assert_allclose(one, other, atol=1e-5)
  assert np.abs(one).max() > 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    gradient,
    wanted,
  )


def test_texts_are_every_row_once(tokenizer, source):
  rows = [GOOD | {"rejected": "b " * n} for n in (1, 9, 3, 40, 2)]
  cfg = DPOConfig(data=source(rows), batch_size=4, micro_batch=2)
  found = list(load_data(cfg, tokenizer, 64, 8).all_batches())
  assert [text.tokens.shape for text in found] == [
    (1, 2, 32),
    (1, 2, 32),
    (1, 2, 64),
  ]  # by length, the last one filled up
  count = sum(text.completion_mask.any(axis=-1).sum() for text in found)
  assert count == 10


def test_no_pair_is_left(tokenizer, source):
  path = source([GOOD | {"prompt": "q " * 40}])
  with pytest.raises(UserError, match="shorten the texts, as the model"):
    load_data(DPOConfig(data=path), tokenizer, 16, 8)


def test_pairs_that_are_equal_after_the_cut_are_left_out(
  tokenizer, source, capsys
):
  """And whose prompt leaves no room; the line says so of both."""
  long = "w " * 30
  path = source(
    [
      GOOD,
      GOOD | {"chosen": long + "a", "rejected": long + "b"},
      GOOD | {"prompt": "q " * 40},
    ]
  )
  data = load_data(DPOConfig(data=path, batch_size=1), tokenizer, 16, 8)
  assert len(data.pairs) == 1
  assert capsys.readouterr().out == (
    f"{path}: 1 rows from 3 (left out: 1 without room for a completion, "
    "1 equal after the cut)\n"
  )
