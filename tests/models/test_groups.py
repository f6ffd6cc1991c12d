"""A head for each group: made from one, folded into one, named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import groups
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.model import Model

NAMES = ("alice", "bob", "cyd")
WEIGHTS = {"alice": 0.7, "bob": -0.4, "cyd": 2.0}


@pytest.fixture(params=["score_last", "score_eos", "score_mean", "deberta"])
def scored(request, make):
  """A model with three heads, and its parameters."""
  if request.param != "deberta":
    return make("neox", request.param, groups=NAMES, eos_id=3)
  config = DebertaConfig(31, 16, 2, 2, 24, buckets=8, max_distance=16)
  model = Model.build(config).replace(groups=NAMES)
  rng = np.random.default_rng(0)

  def draw(s):
    return jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32)

  return model, jax.tree.map(draw, model.shapes)


def texts():
  rng = np.random.default_rng(1)
  tokens = rng.integers(1, 31, (5, 9))
  return jnp.asarray(tokens), jnp.arange(9) < jnp.array(
    [[9], [4], [1], [7], [9]]
  )


def every(model, params):
  run = jax.jit(lambda p, *batch: model.bind(p).scores(*batch))
  return np.asarray(run(params, *texts()))


def test_a_folded_head_scores_the_weighted_sum(scored):
  model, params = scored
  each = every(model, params)
  assert each.shape == (5, 3)
  assert (each.std(axis=1) > 1e-3).all()
  folded, one = groups.fold(model, params, WEIGHTS)
  assert folded.config.groups == ()
  assert jax.tree.map(jnp.shape, one) == jax.tree.map(
    lambda s: s.shape, folded.shapes
  )
  score = jax.jit(lambda p, *batch: folded.bind(p).score(*batch))
  wanted = each @ np.array(list(WEIGHTS.values()))
  np.testing.assert_allclose(score(one, *texts()), wanted, atol=1e-6)
  _, mean = groups.fold(model, params)
  np.testing.assert_allclose(
    every(folded, mean)[:, 0], each.mean(axis=1), atol=1e-6
  )


def test_one_head_is_left_as_it_is(make):
  model, params = make("llama", "score_last")
  assert groups.fold(model, params) == (model, params)


def test_new_heads_lie_around_the_old_one(make):
  """Not on each other: equal heads would be a saddle."""
  _, params = make("neox", "score_last")
  wide = groups.widen(params, 400, seed=1)
  old, new = (p["score_head"]["kernel"] for p in (params, wide))
  assert new.shape == (20, 400)
  apart = np.asarray(new - old)
  assert np.abs(apart.mean(axis=1)).max() < 4 * float(old.std()) / 20
  assert apart.std() == pytest.approx(float(old.std()), rel=0.05)
  again = groups.widen(params, 400, seed=1)["score_head"]["kernel"]
  np.testing.assert_array_equal(again, new)
  other = groups.widen(params, 400, seed=2)["score_head"]["kernel"]
  assert (other != new).all()
  assert wide["blocks"] is params["blocks"]


def test_weights_are_all_alike_or_as_given():
  alike = groups.weights_of(NAMES, {}, "model")
  assert alike == dict.fromkeys(NAMES, pytest.approx(1 / 3))
  given = groups.weights_of(NAMES, {"bob": 2.0}, "model")
  assert given == {"alice": 0.0, "bob": 2.0, "cyd": 0.0}
  assert groups.weights_of((), {}, "model") == {}


@pytest.mark.parametrize(
  ("names", "given", "message"),
  [
    (
      (),
      {"alice": 1.0},
      "config.reward_model: m has one score head, so there is nothing that "
      "alice could weigh; leave the weights out, or give a model trained with "
      "config.group_column",
    ),
    (
      NAMES,
      {"alice": 1.0, "dan": 1.0},
      "config.reward_model: m has no head for dan; its groups are alice, bob, "
      "cyd",
    ),
    (
      NAMES,
      {"alice": 0.0},
      "config.reward_model: m: every weight is 0, so every score would be; "
      "give a group another one",
    ),
  ],
)
def test_weights_that_make_no_score(names, given, message):
  with pytest.raises(UserError) as error:
    groups.weights_of(names, given, "config.reward_model: m")
  assert str(error.value) == message


def test_many_names_are_cut():
  names = tuple(map(str, range(25)))
  assert groups.listed(names).endswith("18, 19 and 5 more")
