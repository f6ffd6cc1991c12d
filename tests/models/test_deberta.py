import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import deberta
from jaxalign.models.deberta import DebertaConfig, relative_rows, shear
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model

CONFIG = DebertaConfig(
  vocab_size=31,
  hidden_size=12,
  layers=2,
  heads=3,
  intermediate_size=20,
  buckets=4,
  max_distance=16,
  conv_kernel_size=3,
  type_vocab_size=2,
  position_biased_input=True,
)


def build(**changes):
  """A jitted score function and parameters in which everything matters."""
  model = Model.build(dataclasses.replace(CONFIG, **changes))
  params = model.init(jax.random.key(0))
  params = jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, params)
  return jax.jit(lambda p, *a: model.bind(p).score(*a)), params


def batch(side="right", width=14, garbage=0):
  """Three texts of 9, 4 and 1 tokens."""
  rng = np.random.default_rng(0)
  tokens = np.full((3, width), garbage)
  types = np.full((3, width), int(garbage > 0))
  mask = np.zeros((3, width), bool)
  for row, length in enumerate((9, 4, 1)):
    at = slice(0, length) if side == "right" else slice(width - length, width)
    tokens[row, at] = rng.integers(1, 31, length)
    types[row, at] = np.arange(length) > 2
    mask[row, at] = True
  return tokens, mask, types


def test_shear_moves_rows_into_place():
  """Rows c = 0..4 of R = 2, T = 3: row 0 from column 1, row 1 from 0."""
  x = jnp.array([[0, 1, 2, 3, 9], [10, 11, 12, 13, 9]], float)
  np.testing.assert_array_equal(shear(x, 3), [[1, 2, 3], [10, 11, 12]])
  np.testing.assert_array_equal(shear(x[:1, :4], 3), [[0, 1, 2]])


def test_buckets_by_hand():
  """Buckets 4, so middle 2 and max_distance 16: ln(15/2) = 2.015.

  |d| = 3: 2 + ⌈1 · ln(1.5) / 2.015⌉ = 3; up to 15 likewise; from 16 on
  ⌈ln(8) / 2.015⌉ = 2 gives 4, cut to the table's last row for +d.
  """
  distances = np.array([-16, -15, -3, -2, -1, 0, 1, 2, 3, 15, 16])
  rows = relative_rows(CONFIG, distances)
  np.testing.assert_array_equal(rows, [0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7])


@pytest.mark.parametrize("head", ["score_context", "score_mean"])
def test_padding_changes_no_score(head):
  score, params = build(head=head)
  plain = score(params, *batch())
  assert np.std(plain) > 1e-2
  for changes in ({"garbage": 5}, {"side": "left"}, {"width": 9}):
    other = score(params, *batch(**changes))
    np.testing.assert_allclose(other, plain, atol=2e-6, rtol=2e-6)


def test_every_part_takes_part():
  """Zeroing any parameter group changes the scores."""
  score, params = build(share_att_key=False)
  plain = score(params, *batch())
  for name in params:
    less = params | {name: jax.tree.map(jnp.zeros_like, params[name])}
    assert np.abs(score(less, *batch()) - plain).max() > 1e-4, name
  for name, leaves in params["blocks"].items():
    zeros = jax.tree.map(jnp.zeros_like, leaves)
    less = params | {"blocks": params["blocks"] | {name: zeros}}
    assert np.abs(score(less, *batch()) - plain).max() > 1e-6, name


def test_short_last_block_gives_the_full_ones_state():
  model = Model.build(CONFIG)
  _, params = build()

  @jax.jit
  def both(params, *batch):
    module = model.bind(params)
    full, _ = module.encode(*batch)
    return full[:, :1], module.encode(*batch, first_only=True)[0]

  np.testing.assert_allclose(*both(params, *batch()), atol=1e-5)


def test_dropout_acts_with_a_key_alone():
  """And drops the same features under the same key, remat or not."""
  score, params = build()
  model = Model.build(dataclasses.replace(CONFIG, dropout=0.3))

  def run(model, key):
    score = jax.jit(lambda p, *a: model.bind(p).score(*a))
    return np.asarray(score(params, *batch(), key))

  np.testing.assert_array_equal(run(model, None), score(params, *batch()))
  a, b = (run(model, jax.random.key(seed)) for seed in (0, 1))
  assert np.abs(a - b).min() > 1e-4
  again = run(model.replace(remat="full"), jax.random.key(0))
  np.testing.assert_allclose(again, a, atol=1e-5)


def test_remat_leaves_value_and_gradient():
  _, params = build()

  def run(model):
    def loss(p, *a):
      return (model.bind(p).score(*a) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(params, *batch())

  model = Model.build(CONFIG)
  expected, found = run(model), run(model.replace(remat="full"))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3),
    expected,
    found,
  )


def test_gradient_of_the_shear_is_its_transpose():
  x, y = jax.random.normal(jax.random.key(0), (2, 2, 5, 9))
  y = y[..., :4]
  out, pull = jax.vjp(lambda x: shear(x, 4), x)
  (back,) = pull(y)
  np.testing.assert_allclose((out * y).sum(), (x * back).sum(), rtol=1e-5)
  rows, columns = np.indices((5, 4))
  by_hand = np.zeros_like(x)
  by_hand[:, rows, columns - rows + 4] = y
  np.testing.assert_array_equal(back, by_hand)


def test_blocks_of_rows_change_no_score(monkeypatch):
  """14 rows at once, or 5, 5 and 4 with the distances that each can see."""
  score, params = build()
  whole = score(params, *batch())
  monkeypatch.setattr(deberta, "BLOCK", 5)
  score, _ = build()
  np.testing.assert_allclose(score(params, *batch()), whole, rtol=1e-5)


def test_adapters_sit_on_the_layers_that_are_named():
  lora = Model.build(CONFIG, LoraConfig(2, 4.0, 0.0, ("query_proj", "output")))
  adapted = lora.shapes["blocks"]
  assert {n for n, leaves in adapted.items() if "lora_a" in leaves} == {
    *("query_proj", "output"),
  }
