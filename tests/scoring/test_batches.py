import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.scoring.batches import batches, row_count


def text(length, start=1):
  return list(range(start, start + length)), [0] * length


def test_worked_example():
  """Lengths 4 and 8, 16 tokens a call: 4 rows of 4, or 2 rows of 8.

  Tails have 1 row: five short texts are one call of 4 and one of 1.
  """
  calls = batches([text(n) for n in (3, 8, 4, 1, 2, 4)], (4, 8), tokens=16)
  assert [(c.tokens.shape, c.indices.tolist()) for c in calls] == [
    ((4, 4), [0, 2, 3, 4]),
    ((1, 4), [5]),
    ((1, 8), [1]),
  ]
  assert calls[0].tokens[0].tolist() == [1, 2, 3, 0]
  assert calls[0].mask[0].tolist() == [True, True, True, False]


def test_rows_of_a_full_call():
  assert row_count(64, tokens=4096, rows=64) == 64
  assert row_count(96, tokens=4096, rows=64) == 32  # 42 fit
  assert row_count(1024, tokens=512, rows=64) == 1


def test_each_part_of_a_call_has_the_rows_of_a_whole_one():
  texts = [text(5)] * 32
  alone = batches(texts, (8,), tokens=64)
  assert [call.tokens.shape for call in alone] == [(8, 8)] * 4
  (split,) = batches(texts, (8,), tokens=64, parts=4)
  assert split.tokens.shape == (32, 8)
  # But for a few, which would stand among filler.
  few = batches(texts[:7], (8,), tokens=64, parts=4)
  assert [call.tokens.shape for call in few] == [(4, 8)] * 2


@given(
  lengths=st.lists(st.integers(0, 20), max_size=40),
  tokens=st.integers(1, 100),
  rows=st.integers(1, 9),
  parts=st.integers(1, 3),
)
def test_every_text_once_in_few_shapes(lengths, tokens, rows, parts):
  texts = [text(n, start=7) for n in lengths]
  calls = batches(texts, (5, 10, 20), tokens, rows, parts)
  seen = [int(i) for call in calls for i in call.indices]
  assert sorted(seen) == [i for i, n in enumerate(lengths) if n]
  for call in calls:
    assert call.tokens.shape[0] % parts == 0
    assert call.mask.any(axis=1).all()
    for row, index in enumerate(call.indices):
      ids = call.tokens[row][call.mask[row]]
      np.testing.assert_array_equal(ids, texts[index][0])
  assert len({call.tokens.shape for call in calls}) <= 6


def test_padding_is_a_small_share_of_a_large_batch():
  lengths = np.random.default_rng(0).integers(32, 513, 256)
  calls = batches([text(int(n)) for n in lengths])
  computed = sum(call.tokens.size for call in calls)
  assert computed < 1.2 * lengths.sum()
