"""Rotary angles, by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import rope


def test_frequencies():
  """Base 100, width 4: 100^0 = 1 and 100^(-2/4) = 0.1."""
  found = rope.inverse_frequencies(4, 100.0)
  np.testing.assert_allclose(found, [1.0, 0.1], rtol=1e-6)


def test_rotation_turns_pairs_and_leaves_the_rest():
  """One pair (x0, x1) = (1, 0) at position 1, frequency 1: (cos 1, sin 1)."""
  x = jnp.array([[[[1.0, 0.0, 5.0]]]])
  at = jnp.array([[1]])
  turned = rope.rotate(x, rope.angles(at, at + 1, 2, 100.0))
  expected = [math.cos(1), math.sin(1), 5.0]
  np.testing.assert_allclose(turned[0, 0, 0], expected, rtol=1e-6)


def cosines(scaling, positions, **more):
  positions = jnp.array(positions)
  lengths = jnp.broadcast_to(positions[:, -1:] + 1, positions.shape)
  cos, _ = rope.angles(positions, lengths, 4, 100.0, scaling=scaling, **more)
  return np.asarray(cos)


def test_linear_scaling_is_a_shorter_position():
  scaled = cosines(rope.Scaling("linear", 4.0), [[0, 8]])
  np.testing.assert_allclose(scaled, cosines(None, [[0, 2]]), atol=1e-6)


def test_dynamic_scaling_acts_beyond_the_context_alone():
  """Length 8, context 4, factor 2: base 100 (2·8/4 - 1)^(4/2) = 900."""
  scaling = rope.Scaling("dynamic", 2.0)
  rows = cosines(scaling, [[1, 3], [1, 7]], max_positions=4)
  np.testing.assert_allclose(rows[0], cosines(None, [[1, 3]])[0], atol=1e-6)
  slow = 900**-0.5
  expected = [math.cos(7), math.cos(7 * slow)] * 2
  np.testing.assert_allclose(rows[1, 1], expected, atol=1e-5)


def test_longrope_goes_by_the_length_of_the_text():
  """Base 100, width 4: frequencies 1 and 0.1, divided by each's factor."""
  scaling = rope.Scaling(
    "longrope", original=6, attention=2.0, short=(1.0, 2.0), long=(4.0, 8.0)
  )
  rows = cosines(scaling, [[1, 5], [1, 6]])
  short, long = [1 / 1, 0.1 / 2], [1 / 4, 0.1 / 8]
  expected = [
    [2 * math.cos(n * f) for f in frequencies * 2]
    for n, frequencies in ((1, short), (5, short), (1, long), (6, long))
  ]
  np.testing.assert_allclose(rows.reshape(4, 4), expected, atol=1e-6)
  assert scaling.switch == 6
  assert dataclasses.replace(scaling, long=scaling.short).switch == 0


@pytest.mark.parametrize(
  ("turns", "factor"),
  [
    (8.0, 1.0),  # at least 4 turns in the context of 16: kept
    (0.5, 1 / 8),  # at most 1 turn: divided by 8
    (2.5, (1 + 1 / 8) / 2),  # midway: the mean of both
  ],
)
def test_llama3_scaling(turns, factor):
  scaling = rope.Scaling("llama3", 8.0, 1.0, 4.0, original=16)
  frequency = 2 * math.pi * turns / 16
  found = rope._llama3(jnp.array([frequency]), scaling)
  np.testing.assert_allclose(found, [frequency * factor], rtol=1e-5)
