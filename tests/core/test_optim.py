import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import memory, optim

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
PLAIN = {"name": "adamw", **ADAM, "weight_decay": 0.0, "clip_norm": 0.0}
SCHEDULES = {
  "constant": "constant_with_warmup",
  "linear": "linear",
  "cosine": "cosine",
}


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  shapes = {"kernel": (3, 4), "bias": (4,)}
  return {
    name: np.asarray(scale * rng.normal(size=shape), np.float32)
    for name, shape in shapes.items()
  }


def step(state, grads, rate=0.1, loss=1.0, optimizer=None, **kwargs):
  optimizer = optimizer or optim.make_optimizer(**PLAIN)
  return optim.apply_gradients(
    state, grads, jnp.float32(loss), jnp.float32(rate), optimizer, **kwargs
  )


def start(params, ema_decay=0.0, **changes):
  return optim.init_state(
    jax.tree.map(jnp.asarray, params),
    optim.make_optimizer(**PLAIN | changes),
    ema_decay,
  )


def test_learning_rate_by_hand():
  """Peak 8, 4 steps of warm-up, 12 in all.

  Warm-up 0, 2, 4, 6; then linear 8, 7, ... (8 steps down to 0); cosine at
  half way is 8 · ½ (1 + cos π/2) = 4, at a quarter 4 (1 + √½) = 6.8284.
  """

  def rate(at, shape, **kwargs):
    schedule = optim.make_schedule(
      shape, peak=8.0, warmup_steps=4, steps=12, **kwargs
    )
    return float(schedule(at))

  assert [rate(i, "linear") for i in range(7)] == [0, 2, 4, 6, 8, 7, 6]
  assert [rate(i, "linear") for i in (11, 12, 40)] == [1, 0, 0]
  assert rate(8, "cosine") == pytest.approx(4.0)
  assert rate(6, "cosine") == pytest.approx(4 * (1 + math.sqrt(0.5)))
  assert [rate(i, "constant") for i in (2, 4, 11, 40)] == [4, 8, 8, 8]
  assert rate(12, "linear", end_ratio=0.25) == 2.0
  assert rate(8, "linear", end_ratio=0.25) == pytest.approx(5.0)
  assert rate(11, "constant", end_ratio=0.25) == 8.0


@pytest.mark.parity
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_that_of_transformers(schedule, warmup):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  weight = torch.nn.Parameter(torch.zeros(()))
  optimizer = torch.optim.SGD([weight], lr=3e-4)
  scheduler = transformers.get_scheduler(
    SCHEDULES[schedule],
    optimizer,
    num_warmup_steps=warmup,
    num_training_steps=30,
  )
  theirs = []
  for _ in range(31):
    theirs.append(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
  ours = jax.jit(
    optim.make_schedule(schedule, peak=3e-4, warmup_steps=warmup, steps=30)
  )
  found = [ours(jnp.int32(i)) for i in range(31)]
  np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_that_of_torch(clip):
  """Ten steps with a rate that changes, decay on all leaves, with clipping."""
  torch = pytest.importorskip("torch")
  params = tree(0)
  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
  adamw = torch.optim.AdamW(
    theirs.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
  )
  changes = {"weight_decay": 0.1, "clip_norm": clip}
  optimizer = optim.make_optimizer(**PLAIN | changes)
  state = start(params, **changes)
  update = jax.jit(lambda s, g, rate: step(s, g, rate, optimizer=optimizer))
  for i in range(10):
    rate, grads = 0.02 / (i + 1), tree(100 + i, scale=3.0)
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[name])
    norm = torch.nn.utils.clip_grad_norm_(
      theirs.values(), clip if clip else math.inf
    )
    adamw.param_groups[0]["lr"] = rate
    adamw.step()
    state, found = update(state, grads, rate)
    np.testing.assert_allclose(found, norm.item(), rtol=1e-5)
  for name, parameter in theirs.items():
    np.testing.assert_allclose(
      state.params[name], parameter.detach().numpy(), rtol=2e-5, atol=1e-6
    )


def test_first_adam_step_by_hand():
  """m̂ = g, v̂ = g², so the step is −rate · sign(g); decay adds rate · λ p."""
  params = {"w": np.array([1.0, -2.0], np.float32)}
  grads = {"w": jnp.array([0.3, -5.0])}
  changes = {"weight_decay": 0.5}
  state, norm = step(
    start(params, **changes),
    grads,
    rate=0.1,
    optimizer=optim.make_optimizer(**PLAIN | changes),
  )
  np.testing.assert_allclose(
    state.params["w"], [1 - 0.1 - 0.05, -2 + 0.1 + 0.1], rtol=1e-5
  )
  np.testing.assert_allclose(norm, math.hypot(0.3, 5.0), rtol=1e-6)
  assert int(state.step) == 0  # the algorithm counts, not the optimizer


def test_first_lion_step_by_hand():
  """Lion moves by sign((1 − β₁) g), whatever the gradient's size."""
  optimizer = optim.make_optimizer(**PLAIN | {"name": "lion"})
  state = start({"w": np.zeros(3, np.float32)}, name="lion")
  state, _ = step(state, {"w": jnp.array([9.0, -1e-3, 0.0])}, 0.1, 1, optimizer)
  np.testing.assert_allclose(state.params["w"], [-0.1, 0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_every_optimizer_goes_downhill(name):
  """‖w − 1‖² from 0 to less than a hundredth within 200 steps."""
  optimizer = optim.make_optimizer(**PLAIN | {"name": name})
  state = start({"w": np.zeros((4, 4), np.float32)}, name=name)

  def loss(params):
    return ((params["w"] - 1) ** 2).mean()

  @jax.jit
  def update(state):
    value, grads = jax.value_and_grad(loss)(state.params)
    return step(state, grads, 0.02, value, optimizer)[0]

  for _ in range(200):
    state = update(state)
  assert loss(state.params) < 0.01


BAD = {
  "loss is nan": (math.nan, 1.0),
  "loss is inf": (math.inf, 1.0),
  "gradient is nan": (1.0, math.nan),
  "gradient is inf": (1.0, math.inf),
}


@pytest.mark.parametrize(
  "loss", [pytest.param(v, id=k) for k, v in BAD.items()]
)
def test_a_bad_update_is_left_out_and_counted(loss):
  value, factor = loss
  state, _ = step(start(tree(0), ema_decay=0.5), tree(1), ema_decay=0.5)
  bad = tree(2)
  bad["bias"][1] *= factor
  after, _ = jax.jit(lambda s, g: step(s, g, loss=value, ema_decay=0.5))(
    state, bad
  )
  assert int(after.skipped) == 1
  for part in ("params", "opt_state", "ema", "step"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, part), getattr(state, part)
    )
  # The run goes on as if the bad step had never been.
  again, _ = step(after, tree(3), ema_decay=0.5)
  wanted, _ = step(state, tree(3), ema_decay=0.5)
  assert int(again.skipped) == 1
  jax.tree.map(np.testing.assert_array_equal, again.params, wanted.params)


def test_moments_may_wait_in_the_hosts_memory():
  found, wanted = start(tree(0)), start(tree(0))
  found = dataclasses.replace(found, opt_state=memory.to_host(found.opt_state))
  wheres = jax.tree.map(operator.attrgetter("sharding"), found)
  update = jax.jit(step, donate_argnums=0, out_shardings=(wheres, None))
  for seed in (1, 2):
    found, _ = update(found, tree(seed))
    wanted, _ = jax.jit(step)(wanted, tree(seed))
  # Single numbers, here the count of updates, stay on the device.
  assert {
    x.ndim: memory.is_on_host(x) for x in jax.tree.leaves(found.opt_state)
  } == {0: False, 1: True, 2: True}
  assert not any(map(memory.is_on_host, jax.tree.leaves(found.params)))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_updates_keep_every_dtype(name):
  """Else a bfloat16 run compiles anew at each step and cannot be resumed."""
  params = {"w": jnp.ones((4, 8), jnp.bfloat16), "b": jnp.ones(8)}
  state = start(params, name=name, ema_decay=0.5)

  def kinds(state):
    return jax.tree.map(lambda x: x.dtype, state)

  before = kinds(state)
  grads = jax.tree.map(jnp.ones_like, params)
  for _ in range(2):
    state, _ = step(
      state,
      grads,
      optimizer=optim.make_optimizer(**PLAIN | {"name": name}),
      ema_decay=0.5,
    )
    assert kinds(state) == before


def test_a_loss_of_zero_is_no_reason_to_skip():
  state, _ = step(start(tree(0)), tree(1), loss=0.0)
  assert int(state.skipped) == 0
  assert not np.allclose(state.params["bias"], tree(0)["bias"])


def test_ema_by_hand():
  """Decay ¾: after one step ¾ · old + ¼ · new."""
  before = tree(0)
  state, _ = step(start(before, ema_decay=0.75), tree(1), ema_decay=0.75)
  for name, old in before.items():
    np.testing.assert_allclose(
      state.ema[name], 0.75 * old + 0.25 * state.params[name], rtol=1e-6
    )
  assert start(before).ema is None


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_mean_in_bfloat16_moves_nearly_the_same(name):
  """Half the bytes of the mean; AdamW's second moment stays float32."""
  params, short = tree(0), {"name": name, "mu_dtype": "bfloat16"}
  whole, half = start(params, name=name), start(params, **short)
  optimizers = [
    optim.make_optimizer(**PLAIN | changes)
    for changes in ({"name": name}, short)
  ]
  for seed in range(1, 4):
    whole, _ = step(whole, tree(seed), optimizer=optimizers[0])
    half, _ = step(half, tree(seed), optimizer=optimizers[1])
  formats = {x.dtype.name for x in jax.tree.leaves(half.opt_state) if x.ndim}
  assert formats == {"bfloat16"} | ({"float32"} if name == "adamw" else set())
  moved = [whole.params[key] - params[key] for key in params]
  for key, by in zip(params, moved, strict=True):
    np.testing.assert_allclose(half.params[key] - params[key], by, atol=5e-3)
