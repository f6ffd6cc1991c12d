import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.core.types import TextBatch
from jaxalign.data.encode import Encoded
from jaxalign.data.packing import pack, plan_packing, row_width

T = 16


def encoded(ids, prompt_length=1):
  mask = tuple(i >= max(1, prompt_length) for i in range(len(ids)))
  return Encoded(tuple(ids), prompt_length, mask, True)


def planned(texts):
  """Rows of texts, as few as best fit finds."""
  plan = plan_packing([len(text) for text in texts], T)
  return [[texts[i] for i in members] for members in plan]


# (ids, prompt length) of each text.
TEXTS = st.lists(
  st.tuples(
    st.lists(st.integers(0, 99), min_size=1, max_size=T), st.integers(0, T)
  ),
  max_size=20,
)


def test_hand_worked_plan():
  """Best fit: 3 joins the row of 7, not the emptier one of 6."""
  assert plan_packing([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
  assert plan_packing([5, 5, 5], 10) == [[0, 1], [2]]
  assert plan_packing([], 10) == []


def test_hand_worked_arrays():
  packed = pack([[encoded([5, 6, 7], 2), encoded([8, 9], 1)]], 6, pad_id=3)
  assert isinstance(packed, TextBatch)
  assert packed.tokens.tolist() == [[[5, 6, 7, 8, 9, 3]]]
  assert packed.position_ids.tolist() == [[[0, 1, 2, 0, 1, 0]]]
  assert packed.segment_ids.tolist() == [[[1, 1, 1, 2, 2, 0]]]
  assert packed.loss_mask.tolist() == [
    [[False, False, True, False, True, False]]
  ]


@given(TEXTS.filter(len))
def test_every_text_comes_back_whole(texts):
  """Cut the rows at their segments: the same texts, masks and counts."""
  rows = [encoded(*text) for text in texts]
  packed = pack(planned(rows), T, pad_id=7)
  found = []
  for tokens, positions, segments, mask in zip(
    packed.tokens[0],
    packed.position_ids[0],
    packed.segment_ids[0],
    packed.loss_mask[0],
    strict=True,
  ):
    count = segments.max(initial=0)
    assert (np.diff(np.where(segments == 0, T, segments)) >= 0).all()
    for segment in range(1, count + 1):
      here = segments == segment
      assert positions[here].tolist() == list(range(here.sum()))
      found.append((tuple(tokens[here]), tuple(mask[here])))
    assert (tokens[segments == 0] == 7).all()
    assert not mask[segments == 0].any()
  assert sorted(found) == sorted((row.ids, row.loss_mask) for row in rows)


@given(st.lists(st.integers(1, T), max_size=40))
def test_plans_are_full_and_near_the_optimum(lengths):
  plan = plan_packing(lengths, T)
  assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
  sums = [sum(lengths[i] for i in row) for row in plan]
  assert all(total <= T for total in sums)
  # No two rows would fit into one, or the later text had joined the earlier.
  assert all(a + b > T for i, a in enumerate(sums) for b in sums[i + 1 :])


@given(TEXTS.filter(len))
def test_padding_is_one_text_a_row(texts):
  rows = [encoded(*text) for text in texts]
  packed = pack([[row] for row in rows], T, pad_id=0)
  assert packed.tokens.shape == (1, len(rows), T)
  for index, row in enumerate(rows):
    assert packed.segment_ids[0, index].sum() == len(row)
    assert packed.tokens[0, index, : len(row)].tolist() == list(row.ids)
  assert packed.loss_mask.sum() == np.sum([sum(r.loss_mask) for r in rows])


def test_rows_in_micro_batches_and_filler():
  """Rows keep their order; nothing counts in an empty one."""
  rows = [[encoded([i, i])] for i in (1, 2, 3)]
  packed = pack([*rows, []], 3, pad_id=9, micro_batches=2)
  assert packed.tokens.tolist() == [
    [[1, 1, 9], [2, 2, 9]], [[3, 3, 9], [9, 9, 9]],
  ]  # fmt: skip
  assert not packed.segment_ids[1, 1].any()
  assert not packed.loss_mask[1, 1].any()
  assert packed.loss_mask.sum() == 3


@pytest.mark.parametrize(
  ("lengths", "limit", "width"),
  [
    ([[3], [32]], 64, 32),
    ([[3], [33]], 64, 64),
    ([[20, 13], [5]], 512, 64),  # of the texts of a row together
    ([[33]], 40, 40),
    ([[]], 64, 32),
  ],
)
def test_the_width_is_a_bucket_up_to_the_limit(lengths, limit, width):
  rows = [[encoded([1] * n) for n in row] for row in lengths]
  assert row_width(rows, limit, (32, 64)) == width
