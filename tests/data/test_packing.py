import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data.encode import Encoded
from jaxalign.data.packing import pack, pad, plan_packing

T = 16


def encoded(ids, prompt_length=1):
  mask = tuple(i >= max(1, prompt_length) for i in range(len(ids)))
  return Encoded(tuple(ids), prompt_length, mask, True)


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
  packed = pack([encoded([5, 6, 7], 2), encoded([8, 9], 1)], 6, pad_id=3)
  assert packed.tokens.tolist() == [[5, 6, 7, 8, 9, 3]]
  assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
  assert packed.segments.tolist() == [[1, 1, 1, 2, 2, 0]]
  assert packed.loss_mask.tolist() == [[False, False, True, False, True, False]]


@given(TEXTS)
def test_every_text_comes_back_whole(texts):
  """Cut the rows at their segments: the same texts, masks and counts."""
  rows = [encoded(*text) for text in texts]
  packed = pack(rows, T, pad_id=7)
  found = []
  for tokens, positions, segments, mask in zip(
    packed.tokens,
    packed.positions,
    packed.segments,
    packed.loss_mask,
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


@given(TEXTS)
def test_padding_is_one_text_a_row(texts):
  rows = [encoded(*text) for text in texts]
  packed = pad(rows, T)
  assert packed.tokens.shape == (len(rows), T)
  for index, row in enumerate(rows):
    assert packed.segments[index].sum() == len(row)
    assert packed.tokens[index, : len(row)].tolist() == list(row.ids)
  assert packed.loss_mask.sum() == np.sum([sum(r.loss_mask) for r in rows])
