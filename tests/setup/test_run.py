"""What a run is made of: its rows' digest, its reference, its learning rate."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.reward_model.data import ScoredRows
from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.config.sections import OptimizerConfig
from jaxalign.data.encode import Encoded
from jaxalign.setup.optimizer import schedule_of
from jaxalign.setup.run import rounded
from jaxalign.setup.spec import digest_of

TEXT = Encoded((1, 2, 3), 1, (False, True, True), True)
COLUMNS = ScoredRows(
  [[1, 2], [3]],
  [[0, 1], [0]],
  [0.5, None],
  [0.0] * 2,
  [0, 1],
  [3, 1],
  ["é"] * 2,
)


@pytest.mark.parametrize(
  "rows",
  [
    ("first prompt", "sécond\n"),
    [[TEXT], [TEXT, TEXT]],
    [(TEXT, TEXT)],
    COLUMNS,
    dataclasses.replace(COLUMNS, head=[0, 1]),
  ],
)
def test_a_digest_row_by_row_is_that_of_one_text(rows):
  """Checkpoints of earlier versions hold the digest of the whole JSON text."""
  text = json.dumps(rows, default=vars).encode()
  assert digest_of(rows) == hashlib.blake2b(text, digest_size=16).hexdigest()


def test_a_reference_in_bfloat16_keeps_its_norms():
  params = {
    "embedding": {"embedding": jnp.full((2, 3), 1 / 3)},
    "norm": {"scale": jnp.full(3, 1 / 3)},
  }
  assert rounded(params, "float32") is params
  found = rounded(params, "bfloat16")
  assert found["embedding"]["embedding"].dtype == jnp.bfloat16
  assert found["norm"]["scale"] is params["norm"]["scale"]
  # Of shapes, which a plan has, the same.
  shapes = rounded(jax.eval_shape(lambda: params), "bfloat16")
  for shape, leaf in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True
  ):
    assert (shape.shape, shape.dtype) == (leaf.shape, np.dtype(leaf.dtype))


def test_the_learning_rate_is_the_configs():
  """Peak 8 after 4 of 12 steps, then linearly down to a quarter of it."""
  optimizer = OptimizerConfig(
    learning_rate=8.0, warmup_steps=4, schedule="linear", end_value_ratio=0.25
  )
  schedule = schedule_of(SFTConfig(steps=12, optimizer=optimizer))
  assert [float(schedule(i)) for i in (0, 4, 8, 12)] == [0, 8, 5, 2]
