import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.kto import train as kto
from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.algorithms.kto.evaluate import LabelledMetrics
from jaxalign.config.sections import OptimizerConfig
from jaxalign.models.layers import LoraConfig
from jaxalign.training.run import fit

# (prompt, answer, desirable); each prompt's mismatched answer is the last one's
ROWS = [
  ("ab", "cde", True),
  ("c", "gh", False),
  ("def", "ab", True),
  ("gh", "a", True),
]
OTHERS = [("ab", "a"), ("c", "cde"), ("def", "gh"), ("gh", "ab")]
close = functools.partial(
  jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-5)
)
# Adam whose eps is as good as alone: a step is the gradient itself, so that one
# of rounding alone (of a key's bias, say) stays as small as it is.
STEADY = OptimizerConfig(
  learning_rate=1e6, schedule="constant", eps=1e6, weight_decay=0.0
)


def config(**changes):
  optimizer = OptimizerConfig(
    learning_rate=0.02, schedule="constant", weight_decay=0.0
  )
  return KTOConfig(**{"steps": 1, "optimizer": optimizer} | changes)


def labelled(toy, rows=ROWS, others=OTHERS, width=8, micro=None, groups=None):
  """`[M, B, T]`; None = a filler row, others=None = no mismatched pairs."""
  shape = -1, micro or len(rows)
  texts = [row[:2] if row else ("", "") for row in rows]
  groups = groups or [i if row else -1 for i, row in enumerate(rows)]
  crossed = others and [row or ("", "") for row in others]
  desirable = [bool(row and row[2]) for row in rows]
  return LabelledBatch(
    text=toy.text_batch(texts, width, micro),
    desirable=np.array(desirable).reshape(shape),
    group=np.array(groups).reshape(shape),
    mismatched=crossed and toy.text_batch(crossed, width, micro),
  )


def prepared(toy, cfg, seed=0):
  """A run whose policy has moved away from its reference."""
  model, reference = toy.build()
  _, other = toy.build(seed=seed + 1)
  params = jax.tree.map(lambda a, b: a + 0.3 * b, reference, other)
  return toy.run(cfg, model, params, reference=(model, reference))


def updated(toy, cfg, batch, seed=0):
  run = prepared(toy, cfg, seed)
  return run.jit(kto.make_update(run))(run.state, batch, run.key)


@functools.cache
def forward(build):
  """Parameters, one text's ids -> log-probabilities `[T, V]`."""
  model, _ = build()

  @jax.jit
  def logps(params, ids):
    module = model.bind(params)
    hidden, _ = module(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    return jax.nn.log_softmax(module.unembed(hidden))[0]

  return logps


def by_hand(toy, run, rows, params=None):
  """(log π, log π/π₀) of answers, one text and one token at a time."""
  found = []
  for prompt, answer in rows:
    ids = np.array([toy.ids(prompt + answer)])
    steps = range(len(prompt), ids.shape[1])
    now, before = (
      sum(logp[t - 1, ids[0, t]] for t in steps)
      for logp in (
        forward(toy.build)(params or run.state.params, ids),
        forward(toy.build)(run.reference[1], ids),
      )
    )
    found.append((now, now - before))
  return found


def loss_by_hand(toy, run, z, params=None):
  """The mean of λ (1 − σ(±β(ρ − z₀))), with λ_D = 0.75, λ_U = 2, β = 0.5."""
  total = 0.0
  found = by_hand(toy, run, [row[:2] for row in ROWS], params)
  for (_, ratio), (_, _, good) in zip(found, ROWS, strict=True):
    lead = ratio - z if good else z - ratio
    weight = 0.75 if good else 2.0
    total += weight * (1 - 1 / (1 + jnp.exp(-0.5 * lead))) / len(ROWS)
  return total


WEIGHTS = {"beta": 0.5, "desirable_weight": 0.75, "undesirable_weight": 2.0}


def seed_where(toy, cfg, wanted):
  """A policy whose mean mismatched log-ratio has the wanted sign, and it."""
  for seed in range(8):
    run = prepared(toy, cfg, seed)
    mean = np.mean([float(r) for _, r in by_hand(toy, run, OTHERS)])
    if np.sign(mean) == wanted:
      return seed, mean
  raise AssertionError("no such policy")


@pytest.mark.parametrize("sign", [1, -1], ids=["z0 above 0", "z0 held at 0"])
def test_the_first_update_by_hand(sign, toy):
  cfg = config(**WEIGHTS)
  seed, mean = seed_where(toy, cfg, sign)
  _, found = updated(toy, cfg, labelled(toy), seed)
  run = prepared(toy, cfg, seed)
  z = max(0.0, mean)
  now = by_hand(toy, run, [row[:2] for row in ROWS])
  good = [pair for pair, row in zip(now, ROWS, strict=True) if row[2]]
  (bad,) = [pair for pair, row in zip(now, ROWS, strict=True) if not row[2]]
  wanted = {
    "loss/total": loss_by_hand(toy, run, z),
    "kl": z,
    "rewards/chosen": 0.5 * sum(ratio for _, ratio in good) / 3,
    "rewards/rejected": 0.5 * bad[1],
    "logps/chosen": sum(logp for logp, _ in good) / 3,
    "logps/rejected": bad[0],
  }
  for name, value in wanted.items():
    assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
  margin = float(wanted["rewards/chosen"] - wanted["rewards/rejected"])
  assert float(found["rewards/margins"]) == pytest.approx(margin, rel=1e-4)
  assert (int(found["num_desirable"]), int(found["num_undesirable"])) == (3, 1)
  assert int(found["num_tokens"]) == 3 + 2 + 2 + 1


def test_no_gradient_flows_through_the_kl(toy):
  """The update is that of the loss in which z₀ is a number."""
  cfg = config(**WEIGHTS, optimizer=STEADY)
  seed, z = seed_where(toy, cfg, 1)
  run = prepared(toy, cfg, seed)
  state, _ = updated(toy, cfg, labelled(toy), seed)
  params = run.state.params
  grads = jax.grad(lambda p: loss_by_hand(toy, run, z, p))(params)
  moved = jax.tree.map(lambda a, b: a - b, params, state.params)
  close(moved, grads)


def test_apo_zero_compares_with_zero(toy):
  """1 − σ(βρ) and σ(βρ); mismatched pairs are neither needed nor there."""
  cfg = config(loss="apo_zero_unpaired", **WEIGHTS)
  _, found = updated(toy, cfg, labelled(toy, others=None))
  wanted = loss_by_hand(toy, prepared(toy, cfg), 0.0)
  assert float(found["loss/total"]) == pytest.approx(float(wanted), rel=1e-4)
  assert "kl" not in found


def test_a_fresh_policy_is_its_reference(toy):
  """ρ = z₀ = 0: every row loses half of its weight."""
  model, params = toy.build()
  cfg = config(**WEIGHTS)
  run = toy.run(cfg, model, params, reference=(model, params))
  _, found = run.jit(kto.make_update(run))(run.state, labelled(toy), run.key)
  np.testing.assert_allclose(
    found["loss/total"], (3 * 0.75 + 2) / 2 / 4, rtol=1e-6
  )
  for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
    assert float(found[name]) == 0.0


@pytest.mark.parametrize(
  "other",
  [
    {"micro": 1},
    {"micro": 2},
    {"width": 13},
    {"rows": [*ROWS, None, None], "others": [*OTHERS, None, None]},
  ],
  ids=["1 x 4", "2 x 2", "padding", "fillers"],
)
def test_what_changes_no_update(toy, other):
  cfg = config(**WEIGHTS, optimizer=STEADY)
  seed, _ = seed_where(toy, cfg, 1)
  whole, found = updated(toy, cfg, labelled(toy), seed)
  cut, again = updated(toy, cfg, labelled(toy, **other), seed)
  assert float(found["kl"]) > 0
  close(again, found)
  close(cut.params, whole.params)


def test_only_desirable_rows(toy):
  """What there is none of has no mean; the update is a usual one."""
  rows = [(prompt, answer, True) for prompt, answer, _ in ROWS]
  cfg = config()
  before = prepared(toy, cfg)
  state, found = updated(toy, cfg, labelled(toy, rows))
  assert np.isnan(found["rewards/rejected"])
  assert np.isnan(found["logps/rejected"])
  assert np.isfinite(found["loss/total"])
  assert np.isfinite(found["rewards/chosen"])
  assert int(state.skipped) == 0
  (_, then), (_, now) = (
    np.mean([[float(x) for x in pair] for pair in found], axis=0)
    for found in (
      by_hand(toy, before, [row[:2] for row in rows]),
      by_hand(toy, before, [row[:2] for row in rows], state.params),
    )
  )
  assert now > then


def test_turned_labels_turn_the_update(toy):
  """At ρ = z₀ both sides pull equally hard, in opposite directions."""
  model, params = toy.build()
  cfg = config(optimizer=STEADY)
  run = toy.run(cfg, model, params, reference=(model, params))
  update = run.jit(kto.make_update(run))
  turned = [(prompt, answer, not good) for prompt, answer, good in ROWS]
  moved = [
    update(run.state, labelled(toy, rows), run.key)[0].params
    for rows in (ROWS, turned)
  ]
  steps = [jax.tree.map(lambda a, b: a - b, params, new) for new in moved]
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(steps)) > 1e-3
  close(steps[0], jax.tree.map(lambda x: -x, steps[1]))


def test_adapters_are_compared_with_their_base(toy):
  """With B = 0 the policy is the base; then the adapters alone move."""
  adapters = LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=("dense",))
  model, params = toy.build(adapters=adapters)
  params["blocks"]["dense"]["lora_b"] *= 0
  run = toy.run(config(), model, params)
  run.reference = (model.without_lora(), run.frozen)
  update = run.jit(kto.make_update(run))
  state, found = update(run.state, labelled(toy), run.key)
  # No dropout either, or the two would differ.
  np.testing.assert_allclose(found["loss/total"], 0.5, rtol=1e-6)
  assert float(found["kl"]) == 0.0
  moved = state.params["blocks"]["dense"]["lora_b"]
  assert float(jnp.abs(moved).max()) > 1e-3


def test_run_learns_which_answers_are_good(toy):
  """Answers with an "e" are good; held-out prompts follow."""
  rng = np.random.default_rng(0)

  def word(wanted):
    letters = list(rng.choice(list("abcd"), 2))
    letters.insert(rng.integers(3), "e" if wanted else "f")
    return "".join(letters)

  def rows(count):
    prompts = ["".join(rng.choice(list("gh"), 2)) for _ in range(count)]
    found = [(p, word(i % 2), bool(i % 2)) for i, p in enumerate(prompts)]
    answers = [answer for _, answer, _ in found]
    others = list(zip(prompts, np.roll(answers, 1), strict=True))
    return found, others

  batches = [labelled(toy, *rows(16)) for _ in range(4)]
  # Rows 2 i and 2 i + 1 answer one prompt; the second batch is filled up.
  pairs = [i // 2 for i in range(16)]
  some, theirs = rows(6)
  fill = [None] * 10
  held = [
    labelled(toy, *rows(16), groups=pairs),
    labelled(
      toy,
      [*some, *fill],
      [*theirs, *fill],
      groups=[100 + g for g in pairs[:6]] + [-1] * 10,
    ),
  ]
  cfg = config(steps=30, validation_interval=15)
  model, params = toy.build()
  run = toy.run(cfg, model, params, reference=(model, params))
  run.evaluators.append(LabelledMetrics(run, held))
  data = types.SimpleNamespace(batch=lambda step: batches[step % 4])
  fit(run, data, kto.make_update(run))
  log = run.recorder
  last = log.metrics[-1]
  assert last["rewards/margins"] > 0.2
  assert last["eval_rewards/accuracies"] > 0.9
  assert last["eval_prompts"] == 11
  assert (last["eval_num_desirable"], last["eval_num_undesirable"]) == (11, 11)
  assert last["eval_kl"] >= 0
  at = [i + 1 for i, m in enumerate(log.metrics) if "eval_loss/total" in m]
  assert at == [15, 30]


def test_validation_equals_the_same_rows_in_one_batch(toy):
  """z₀ and the means are of all held-out rows, however they are cut."""
  cfg = config(**WEIGHTS)
  seed, _ = seed_where(toy, cfg, 1)
  run = prepared(toy, cfg, seed)
  _, found = updated(toy, cfg, labelled(toy), seed)
  cut = [
    labelled(toy, ROWS[i : i + 2], OTHERS[i : i + 2], groups=[i, i + 1])
    for i in (0, 2)
  ]
  held = LabelledMetrics(run, cut)(run.policy_params(run.state), 0)
  for name in ("loss/total", "kl", "rewards/margins", "logps/chosen"):
    close(held[f"eval_{name}"], found[name])
  # No prompt has answers of both labels.
  assert "eval_rewards/accuracies" not in held
