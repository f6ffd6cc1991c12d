"""SuperHF's loop with completions and scores written by hand."""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.superhf import train as superhf
from jaxalign.algorithms.superhf.config import SuperbatchConfig, SuperHFConfig
from jaxalign.algorithms.superhf.data import kept_batches
from jaxalign.config.sections import OptimizerConfig
from jaxalign.data.rows import PromptRow
from jaxalign.models.layers import LoraConfig
from jaxalign.sampling import settings
from jaxalign.sampling.generator import Generator
from jaxalign.sampling.sampler import Sampler
from jaxalign.training import rollout
from jaxalign.training.rollout import Heldout, Rollout

PROMPTS = ["ab", "c"]
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
SCORES = [0.5, 2.0, -1.0, 3.0, 3.5, 1.0]


def superbatch(
  mode="prompt_accumulation", prompts=2, each=3, keep=1, percentile=()
):
  return SuperbatchConfig(
    mode=mode,
    prompts=prompts,
    samples_per_prompt=each,
    keep=keep,
    percentile=percentile,
  )


def config(**changes):
  given = {
    "steps": 1,
    "superbatch": superbatch(),
    "optimizer": OptimizerConfig(learning_rate=0.01, schedule="constant"),
    "kl_coefficient": -1.0,
  }
  return SuperHFConfig(**given | changes)


def source(toy, texts=TEXTS, scores=SCORES, prompts=PROMPTS, **changes):
  """Always the same completions and scores."""
  given = {
    "sample": lambda params, asked, each, key: toy.completions(asked, texts),
    "score": lambda asked, found: scores,
  }
  return toy.source(prompts, **given | changes)


def train(toy, cfg, src, model=None, params=None, reference=None, **fields):
  """Trains; returns the run's log and its last state."""
  if model is None:
    model, params = toy.build()
  run = toy.run(cfg, model, params, reference)
  run = dataclasses.replace(run, **fields)
  state = superhf.train(run, src)
  return run.recorder, state


@pytest.mark.parametrize(
  ("batch", "kept"),
  [
    # The best of 0.5, 2, −1 and of 3, 3.5, 1.
    (superbatch(keep=1), [1, 4]),
    (superbatch(keep=2), [1, 0, 4, 3]),
    # The best of all six.
    (superbatch("mixed_prompts", 6, 1, 3), [4, 3, 1]),
    (superbatch("single_prompt", 1, 6, 2), [4, 3]),
    (superbatch("single_pass", 0, 2, 1), [1, 3, 4]),
    # The median or better of each three, and of all six (2 and above).
    (superbatch(percentile=(0.5,)), [1, 0, 4, 3]),
    (superbatch("mixed_prompts", 6, 1, percentile=(0.5,)), [4, 3, 1]),
  ],
  ids=[
    *("accumulation", "accumulation-2", "mixed", "single", "pass"),
    *("percentile", "mixed-percentile"),
  ],
)
def test_the_best_are_kept(toy, batch, kept):
  each = batch.samples_per_prompt
  scores = np.array(SCORES).reshape(-1, each)
  assert superhf.keep_best(scores, batch).tolist() == kept
  prompts = ["ab", "c", "d", "e", "f", "g"][: 6 // each]
  log, _ = train(toy, config(superbatch=batch), source(toy, prompts=prompts))
  assert log.metrics[0]["num_kept"] == len(kept)
  rows = log.rows_of[0]
  assert [r["kept"] for r in rows] == [i in kept for i in range(6)]
  assert [r["completion"] for r in rows] == TEXTS
  assert [r["score"] for r in rows] == SCORES
  assert [r["prompt"] for r in rows] == [
    p for p in prompts for _ in range(each)
  ]
  assert {r["step"] for r in rows} == {1}


def test_a_percentile_grows_over_the_run(toy):
  """0, ½ and 1 in three superbatches: three, two and one of each three."""
  cfg = config(steps=3, superbatch=superbatch(percentile=(0.0, 1.0)))
  log, _ = train(toy, cfg, source(toy))
  assert [sum(r["kept"] for r in rows) for rows in log.rows_of] == [6, 4, 2]
  assert [m["num_kept"] for m in log.metrics] == [6, 4, 2]
  log, _ = train(toy, dataclasses.replace(cfg, steps=1), source(toy))
  assert [m["num_kept"] for m in log.metrics] == [6]


def test_metrics_by_hand(toy):
  """Scores: mean 9/6 = 1.5, kept (2, 3.5) 2.75; held out ×2: 3 and 5.5.

  Σ (x − 1.5)² = 1 + 0.25 + 6.25 + 2.25 + 4 + 0.25 = 14; std √(14/6).
  Lengths 1 … 6: 21 / 6 = 3.5.
  """

  def heldout(asked, texts):
    assert asked == [prompt for prompt in PROMPTS for _ in range(3)]
    return [2 * SCORES[len(text) - 1] for text in texts]

  cfg = config(validation_interval=1, test_reward_model="watcher")
  log, state = train(toy, cfg, source(toy, heldout=heldout))
  found = log.metrics[0]
  wanted = {
    "score/mean": 1.5,
    "score/std": math.sqrt(14 / 6),
    "score/kept_mean": 2.75,
    "test_score/mean": 3.0,
    "test_score/kept_mean": 5.5,
    "completion/chars_mean": 3.5,
    "completion/tokens_mean": 3.5,
    "completion/empty_fraction": 0.0,
    "completion/ended_fraction": 1.0,
    # Words of one letter, two and more: none is another's.
    "diversity/meteor": 0.0,
    "diversity/overlap": 0.0,
    "diversity/repetition": 0.0,
    "num_prompts": 2,
    "num_kept": 2,
    "num_sampled_tokens": 21,
    "exceptions": 0,
    "skipped_updates": 0,
    "lr": 0.01,
  }
  assert {k: float(found[k]) for k in wanted} == pytest.approx(wanted)
  assert found["loss/total"] == found["loss/nll"] > 0
  assert "kl/mean" not in found  # kl_coefficient is -1
  assert [r["test_score"] for r in log.rows_of[0]] == [2 * s for s in SCORES]
  assert int(state.step) == 1


def test_a_held_out_score_that_is_not_finite_counts_in_no_mean(toy):
  """2 and 6 are left of all, 2 of the two that are kept."""
  texts = list("cdef")
  reward = toy.scores(lambda *_: [np.nan, 2.0, 6.0, np.inf])
  heldout = Heldout(reward, [PromptRow("a")] * 4, texts, [None])
  scores = np.array([[3.0, 1.0], [0.0, -np.inf]])
  found = Rollout(toy.completions(["a", "b"], texts), scores, heldout)
  kept = np.array([0, 1])
  assert found.metrics(kept)["test_score/mean"] == 4.0
  assert found.metrics(kept)["test_score/kept_mean"] == 2.0
  rows = found.rows(0, kept)
  assert [row["test_score"] for row in rows] == [None, 2.0, 6.0, None]
  assert [row["score"] for row in rows] == [3.0, 1.0, 0.0, None]


def test_empty_and_unscored_completions_are_never_kept(toy):
  """ "" has the best score, NaN comes next; of the rest 1 and 3 are best.

  Their scores are null in samples.jsonl and outside of the mean (1 + 3 − 2
  + 0) / 4 = 0.5.
  """
  texts = ["", "bb", "cc", "dd", "ee", "ff"]
  scores = [9.0, 1.0, math.nan, 3.0, -2.0, 0.0]
  log, _ = train(toy, config(), source(toy, texts, scores))
  rows = log.rows_of[0]
  assert [i for i, r in enumerate(rows) if r["kept"]] == [1, 3]
  assert [r["score"] for r in rows] == [None, 1.0, None, 3.0, -2.0, 0.0]
  assert float(log.metrics[0]["score/mean"]) == pytest.approx(0.5)
  assert float(log.metrics[0]["completion/empty_fraction"]) == pytest.approx(
    1 / 6
  )


def test_length_penalty_takes_the_logarithm(toy):
  """Scores 1.0 of e³ ≈ 20 letters and 0.9 of one: 1 − 0.1 · ln 20 = 0.70."""
  texts, scores = ["a" * 20, "b"], [1.0, 0.9]
  cfg = config(superbatch=superbatch("single_prompt", 1, 2), length_penalty=0.1)
  log, _ = train(toy, cfg, source(toy, texts, scores, ["a"]))
  rows = log.rows_of[0]
  assert [r["kept"] for r in rows] == [False, True]
  assert rows[0]["score"] == pytest.approx(1 - 0.1 * math.log(20))
  assert rows[1]["score"] == pytest.approx(0.9)


def failing(steps, number):
  """A score function that fails at these of its calls."""
  calls = iter(range(steps))

  def score(asked, texts):
    if next(calls) in number:
      raise RuntimeError("out of memory")
    return np.array(SCORES, np.float32)

  return score


def test_failures_are_counted_and_tolerated(toy, caplog):
  cfg = config(steps=4, max_exception_count=2)
  score = failing(4, {1, 2})
  with caplog.at_level(logging.ERROR):
    log, state = train(toy, cfg, source(toy, score=score))
  assert [m["exceptions"] for m in log.metrics] == [0, 1, 2, 2]
  assert log.counters == {"exceptions": 2}
  assert "step 2 failed" in caplog.text
  assert "out of memory" in caplog.text
  # A failed superbatch is over all the same: the schedule goes on.
  assert [int(s.step) for s in log.states] == [1, 2, 3, 4]
  assert int(state.step) == 4
  jax.tree.map(
    np.testing.assert_array_equal, log.states[0].params, log.states[2].params
  )
  assert log.rows_of[1] == []
  assert "score/mean" not in log.metrics[1]
  before, after = (log.states[i].params["final_norm"] for i in (2, 3))
  assert not np.array_equal(before["scale"], after["scale"])


def test_one_failure_too_many_ends_the_run(toy):
  cfg = config(steps=4, max_exception_count=1)
  with pytest.raises(RuntimeError, match="out of memory"):
    train(toy, cfg, source(toy, score=failing(4, {0, 2})))


def test_no_usable_completion_is_such_a_failure(toy):
  given = source(toy, [""] * 6)
  with pytest.raises(ValueError, match="every completion was empty"):
    train(toy, config(), given)
  cfg = config(steps=2, max_exception_count=2)
  assert train(toy, cfg, given)[0].counters == {"exceptions": 2}


def test_one_prompt_without_a_completion_does_not_end_a_run(toy):
  texts = ["", "", "", "dd", "ee", "ff"]
  log, _ = train(toy, config(), source(toy, texts))
  assert [i for i, r in enumerate(log.rows_of[0]) if r["kept"]] == [4]


class Evaluation:
  """An evaluator that records when it is called and with which parameters."""

  name = "evaluation"

  def __init__(self, every):
    self.every, self.steps, self.params = every, [], {}

  def __call__(self, params, step):
    assert "blocks" in params
    self.steps.append(step + 1)
    self.params = params
    return {"eval_score/mean": 7.0}

  def programs(self, params):
    return []


def test_intervals(toy):
  """Every second or third of five superbatches, and the last one."""
  calls = []

  def heldout(asked, texts):
    calls.append("held out")
    return np.zeros(6)

  def steps_with(log, name):
    return [i + 1 for i, m in enumerate(log.metrics) if name in m]

  cfg = config(steps=5, validation_interval=2, test_reward_model="watcher")
  given, evaluation = source(toy, heldout=heldout), Evaluation(3)
  log, _ = train(toy, cfg, given, evaluators=[evaluation])
  assert steps_with(log, "test_score/mean") == [2, 4, 5]
  assert steps_with(log, "eval_score/mean") == [3, 5] == evaluation.steps
  assert len(calls) == 3
  # 0 = never; for an evaluator, only after the last step.
  off = dataclasses.replace(cfg, validation_interval=0)
  log, _ = train(toy, off, given, evaluators=[Evaluation(0)])
  assert len(calls) == 3
  assert steps_with(log, "test_score/mean") == []
  assert steps_with(log, "eval_score/mean") == [5]


def test_several_updates_of_a_superbatch_share_its_rate(toy):
  """Linear from 0.1 over 4 superbatches; two updates each, at one rate."""
  cfg = config(
    steps=4,
    batch_size=2,
    superbatch=superbatch(keep=2),
    optimizer=OptimizerConfig(learning_rate=0.1, schedule="linear"),
  )
  model, params = toy.build()
  log, state = train(toy, cfg, source(toy), model, params)
  rates = [float(m["lr"]) for m in log.metrics]
  assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
  counts = [
    int(leaf)
    for leaf in jax.tree.leaves(state.opt_state)
    if jnp.issubdtype(leaf.dtype, jnp.integer)
  ]
  assert counts == [8]  # Adam's count of updates
  # The same two updates of the first superbatch, one after the other.
  run = toy.run(cfg, model, params)
  update = run.jit(superhf.make_update(run))
  scores = np.array(SCORES).reshape(2, 3)
  drawn = Rollout(toy.completions(PROMPTS, TEXTS), scores, None)
  kept = np.array([1, 0, 4, 3])
  batches = kept_batches(cfg, run.mesh, toy.letters, 64, drawn, kept)
  assert len(batches) == 2
  again, losses, gaps = run.state, [], []
  for batch in batches:
    again, found = update(again, batch, run.key)
    losses.append(float(found["loss/nll"]))
    gaps.append(float(found["logp_diff_max"]))
  assert float(log.metrics[0]["loss/nll"]) == pytest.approx(np.mean(losses))
  # The sampler's log-probs are of the parameters before the first one.
  assert gaps[0] != pytest.approx(gaps[1])
  assert log.metrics[0]["sampling/logp_diff_max"] == pytest.approx(gaps[0])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    again.params,
    log.states[0].params,
  )


def test_dropout_differs_from_update_to_update(toy, monkeypatch):
  """At learning rate 0, two updates on one text differ only by dropout."""
  seen, mean_metrics = [], superhf.mean_metrics

  def means(found):
    seen.append([float(metrics["loss/nll"]) for metrics in found])
    return mean_metrics(found)

  monkeypatch.setattr(superhf, "mean_metrics", means)
  adapters = LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=("dense",))
  still = OptimizerConfig(learning_rate=0.0)
  cfg = config(batch_size=1, optimizer=still)
  given = source(toy, ["dd"] * 6, prompts=["ab", "ab"])
  train(toy, cfg, given, *toy.build(adapters=adapters))
  adapters = dataclasses.replace(adapters, dropout=0.0)
  train(toy, cfg, given, *toy.build(adapters=adapters))
  (first, second), without = seen
  assert abs(first - second) > 1e-5
  assert without[0] == without[1]


def test_kl_starts_at_zero_and_the_average_at_the_parameters(toy):
  model, params = toy.build()
  averaged = OptimizerConfig(learning_rate=0.01, schedule="constant", ema=0.75)
  cfg = config(steps=3, kl_coefficient=0.0, optimizer=averaged)
  live, evaluation = (model, params), Evaluation(0)
  log, _ = train(
    toy, cfg, source(toy), model, params, live, evaluators=[evaluation]
  )
  kls = [float(m["kl/mean"]) for m in log.metrics]
  assert abs(kls[0]) < 1e-6
  assert kls[2] > kls[1] > 1e-5
  # 0 only logs: the loss is the NLL.
  np.testing.assert_allclose(
    [m["loss/total"] for m in log.metrics],
    [m["loss/nll"] for m in log.metrics],
    rtol=1e-6,
  )
  # The average starts from the parameters before training.
  mean = params
  for state in log.states:
    mean = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, mean, state.params)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6), state.ema, mean
    )
  jax.tree.map(np.testing.assert_array_equal, evaluation.params, state.ema)


def test_kl_holds_the_policy_back(toy):
  model, params = toy.build()
  ends = {}
  for kl in (0.0, 3.0):
    cfg = config(steps=12, kl_coefficient=kl)
    log, _ = train(toy, cfg, source(toy), model, params, (model, params))
    ends[kl] = float(log.metrics[-1]["kl/mean"])
  assert ends[3.0] < 0.5 * ends[0.0]


def test_a_superbatch_is_the_same_whenever_it_runs(toy, monkeypatch):
  """Keys and prompts come from seed and step, so a resumed run has the same."""
  drawn, asked = [], []

  def rows_of_step(*given):
    asked.append(given)
    return range(2)

  monkeypatch.setattr(rollout, "rows_of_step", rows_of_step)

  def sample(params, prompts, samples, key):
    drawn.append(jax.random.key_data(key).tolist())
    return toy.completions(prompts, TEXTS)

  cfg = config(steps=3, seed=7)
  train(toy, cfg, source(toy, sample=sample))
  assert asked == [(7, step, 2, 2) for step in range(3)]
  whole = list(drawn)
  assert len({tuple(k) for k in whole}) == 3
  drawn.clear()
  run = toy.run(cfg, *toy.build())
  run.recorder.steps_of = [2]
  superhf.train(run, source(toy, sample=sample))
  assert drawn == whole[2:]
  # Sampling and updates never share a key, nor do two steps.
  keys = (
    key(step) for key in (run.step_key, run.update_key) for step in (0, 1)
  )
  assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4


def test_it_learns_what_is_rewarded(toy):
  """A random model writes "e" 1 time in 13; rewarded for it, most times."""
  model, params = toy.build(seed=3)
  # Id 0 would be no letter: it ends a text, and may not come first.
  generator = Generator(
    Sampler(model, prompt_buckets=(4,), new_token_buckets=(8,)),
    toy.letters,
    settings.make(max_new_tokens=8, min_new_tokens=1, eos_ids=[0], pad_id=0),
  )

  def score(prompts, texts):
    return np.array([t.count("e") / 8 for t in texts], np.float32)

  cfg = config(
    steps=30,
    superbatch=superbatch(prompts=2, each=16, keep=2),
    optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant"),
  )
  given = source(toy, sample=generator, score=score)
  log, _ = train(toy, cfg, given, model, params)
  scores = [float(m["score/mean"]) for m in log.metrics]
  assert np.mean(scores[:2]) < 0.25
  assert np.mean(scores[-3:]) > 0.7
  assert float(log.metrics[0]["score/kept_mean"]) > np.mean(scores[:2])
  # Texts are trained on with the very log-probs they were drawn under.
  gaps = [float(m["sampling/logp_diff_max"]) for m in log.metrics]
  assert max(gaps) < 1e-4
