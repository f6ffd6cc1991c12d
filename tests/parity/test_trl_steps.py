"""Whole updates against TRL's, on what record_trl.py wrote down.

The model is a toy whose parameters are two small tables, and the optimizer
goes to given parameters with its first step, here as there. So losses, metrics
and gradients of a first and of a second update can be compared, to 1e-5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.train import pair_losses
from jaxalign.algorithms.kto import train as kto
from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.algorithms.ppo import train as ppo
from jaxalign.algorithms.ppo.config import (
  KLConfig,
  PPOConfig,
  RolloutConfig,
  ShapingConfig,
)
from jaxalign.algorithms.ppo.data import PPOBatch
from jaxalign.algorithms.ppo.experience import first_extra_state
from jaxalign.core import advantages, losses, optim
from jaxalign.core.types import PairBatch, TextBatch
from jaxalign.data import batches
from jaxalign.models.heads import VALUE
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.training.forward import completion_logps
from jaxalign.training.recorder import Recorder
from jaxalign.training.run import Run

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
WORDS = 6


class Sum(Model):
  """Next-token logits = a row of the token + a row of its place in the text."""

  def __init__(self):
    """Without a config or a graph."""

  def bind(self, params):
    return Bound(params)


class Bound:
  """`Sum` with its parameters; a column beyond the words is the value."""

  def __init__(self, params):
    self.words, self.places = params["words"], params["places"]

  def __call__(self, tokens, positions, segments, **_):
    return self.words[tokens] + self.places[positions], None

  def unembed(self, hidden):
    return hidden[..., :WORDS]

  def chunked_unembed(self):
    return self.unembed


def text_batch(texts, kind=TextBatch):
  """(prompt, answer) ids as rows `[B, T]`, padded on the right."""
  width = max(len(x) + len(y) for x, y in texts)
  tokens, mask = np.zeros((2, len(texts), width), np.int32)
  for row, counted, (x, y) in zip(tokens, mask, texts, strict=True):
    row[: len(x) + len(y)] = [*x, *y]
    counted[len(x) : len(x) + len(y)] = 1
  places = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
  columns = (tokens, places, np.sign(tokens), mask == 1)
  return kind(*map(jnp.asarray, columns))


def make_run(config, params, reference, optimizer, extra_state=None):
  """What an update reads of a run, and nothing that a run would do."""
  # A copy, as updates donate the state.
  params, mesh = jax.tree.map(jnp.copy, params), meshes.make_mesh()
  state = optim.init_state(params, optimizer, extra_state=extra_state)
  return Run(
    config,
    Sum(),
    state,
    frozen={},
    reference=(Sum(), reference),
    mesh=mesh,
    recorder=object.__new__(Recorder),  # nothing is recorded
    optimizer=optimizer,
    schedule=lambda _: jnp.float32(1),
    shardings=meshes.shardings(state, mesh),
  )


# TRL 0.11.4: PPOTrainer.step.


def jump(target):
  """Goes to `target` with the first step; its state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (
      jax.tree.map(jnp.subtract, params, target),
      grads,
    ),
  )


def learned(config, given):
  """A step's state and metrics, from old parameters to new ones."""
  batch = text_batch(given["texts"])
  zeros = jnp.zeros((1, *batch.targets.shape))
  rollout = PPOBatch(
    jax.tree.map(lambda x: x[None], batch),
    given["scores"][None],
    jnp.ones((1, len(given["scores"])), bool),
    *(zeros, zeros),
  )
  extra_state = first_extra_state(config.kl.coefficient)
  optimizer = jump(given["new"])
  run = make_run(config, given["old"], given["ref"], optimizer, extra_state)
  learn = run.jit(ppo.make_learn(run, None))
  return learn(run.state, rollout, run.key)


def with_value(tables):
  """The last column is read by the value head."""
  kernel = jnp.zeros((WORDS + 1, 1)).at[WORDS].set(1)
  head = {"value_head": {"kernel": kernel, "bias": jnp.zeros(1)}}
  return tables | {VALUE: head}


def ppo_config(settings, rows):
  kinds = {"kl": "k1", "mse": "k2"}
  kind = settings.get("kl_penalty", "kl")
  return PPOConfig(
    steps=1,
    rollout=RolloutConfig(prompts=rows),
    batch_size=rows,
    epochs=settings["ppo_epochs"],
    kl=KLConfig(
      coefficient=settings["init_kl_coef"],
      estimator=kinds.get(kind, kind),
      target=settings.get("target", 0.0),
      horizon=settings.get("horizon", 1),
    ),
    shaping=ShapingConfig(
      clip=settings.get("score_clip", 0.0),
      whiten=settings.get("whiten_rewards", False),
    ),
    gamma=settings.get("gamma", 1.0),
    lam=settings.get("lam", 0.95),
    clip_low=settings["cliprange"],
    clip_high=settings["cliprange"],
    value_clip=settings["cliprange_value"],
    vf_coef=settings["vf_coef"],
  )


NAMES = {
  "objective/kl": "objective/kl",
  "objective/kl_coef": "objective/kl_coef",
  "objective/scores": "ppo/mean_scores",
  "loss/policy_avg": "ppo/loss/policy",
  "loss/value_avg": "ppo/loss/value",
  "loss/total": "ppo/loss/total",
  "policy/approxkl_avg": "ppo/policy/approxkl",
  "policy/policykl": "ppo/policy/policykl",
  "policy/clipfrac_avg": "ppo/policy/clipfrac",
  "val/clipfrac_avg": "ppo/val/clipfrac",
  "val/mean": "ppo/val/mean",
  "returns/mean": "ppo/returns/mean",
}


@pytest.fixture(scope="module")
def ppo_steps(recorded):
  found = recorded("ppo_steps")
  for name in ("old", "new", "ref"):
    found[name] = with_value(found[name])
  return found


@pytest.mark.parametrize(
  "case", ["first epoch", "adaptive", "full", "whitened"]
)
def test_ppo_step(ppo_steps, case):
  """`PPOTrainer.step`: from scores to the gradient of the last epoch.

  TRL's "whitened" texts are padded on the left, for the reason that
  test_trl.py gives.

  Entropy and `var_explained` are ours before the updates, so of the first
  epoch. The latter is 1 − error / variance, both divided by n here, so that
  a constant value explains 0; TRL divides the variance by n − 1.
  """
  given, wanted = ppo_steps, ppo_steps["cases"][case]
  config = ppo_config(wanted["settings"], len(given["texts"]))
  state, found = learned(config, given)
  stats = wanted["stats"]
  for ours, theirs in NAMES.items():
    close(found[ours], stats[theirs], err_msg=ours)
  close(state.extra_state["kl_coef"], wanted["kl_coef_after"])
  for name, gradient in wanted["gradient"].items():
    close(state.opt_state[name], gradient, err_msg=name)
  if case == "first epoch":
    n = int(found["num_tokens"])
    close(found["policy/entropy_avg"], stats["ppo/policy/entropy"])
    unexplained = (1 - found["val/var_explained"]) * (n - 1) / n
    close(unexplained, 1 - stats["ppo/val/var_explained"])


# The newest TRL: GRPOTrainer and RLOOTrainer.


@pytest.fixture(scope="module")
def groups(recorded):
  found = recorded("groups")
  return found | {"scores": found["rewards"]}


def group_config(advantage, kl, **changes):
  return PPOConfig(
    **{
      "steps": 1,
      "rollout": RolloutConfig(prompts=3, samples_per_prompt=2),
      "batch_size": 6,
      "epochs": 2,
      "advantage": advantage,
      "kl": kl,
      "clip_low": 0.15,
      "clip_high": 0.25,
    }
    | changes
  )


@pytest.mark.parametrize(
  ("case", "beta", "delta"), [("grpo", 0.1, 0.0), ("delta", 0.0, 1.4)]
)
def test_grpo_step(groups, case, beta, delta):
  """`GRPOTrainer._compute_loss`: clip, k3 in the loss, and the dual clip.

  Of its ways to divide, ours is that of `dapo`, by all tokens of the batch,
  which is that of `bnpo` where the batch is not cut.
  """
  kl = KLConfig(coefficient=beta, estimator="k3", place="loss")
  config = group_config("grpo", kl, dual_clip=delta)
  state, found = learned(config, groups)
  wanted = groups["found"][case]
  loss = (wanted["old"]["loss"] + wanted["new"]["loss"]) / 2
  close(found["loss/total"], loss)
  for name, gradient in wanted["new"]["gradient"].items():
    close(state.opt_state[name], gradient, err_msg=name)
  clipped = [wanted[x]["metrics"] for x in ("old", "new")]
  clipped = sum(x["clip_ratio/region_mean"] for x in clipped) / 2
  close(found["policy/clipfrac_avg"], clipped)
  if beta:
    answers, tokens = len(groups["texts"]), int(found["num_tokens"])
    kl = found["objective/kl"] * answers / tokens
    close(kl, wanted["old"]["metrics"]["kl"])


def test_rloo_step(groups):
  """`RLOOTrainer`: the KL in the reward, the advantage, the first gradient.

  Then ours differs (see ppo/train.py): tokens are clipped one by one, where
  TRL clips an answer's ratio, which is the next test. At a ratio of 1 both
  gradients have one direction; TRL's is a mean over answers, ours one over
  tokens.
  """
  config = group_config("rloo", KLConfig(coefficient=0.1), epochs=1)
  state, found = learned(config, groups)
  wanted = groups["found"]["rloo"]["old"]
  answers, tokens = len(groups["texts"]), int(found["num_tokens"])
  for name, gradient in wanted["gradient"].items():
    close(state.opt_state[name] * tokens / answers, gradient, err_msg=name)
  close(found["kl/mean"], wanted["metrics"]["kl"])


def test_rloo_of_whole_answers(groups):
  """`RLOOTrainer._compute_loss` by our formulas, an answer as one action."""
  text = text_batch(groups["texts"])
  old, new, ref = (
    completion_logps(Sum(), groups[name], text)
    for name in ("old", "new", "ref")
  )
  totals = (groups["rewards"] - 0.1 * (old - ref)).reshape(3, 2)
  advantage = advantages.rloo(totals, jnp.ones((3, 2), bool)).reshape(-1)
  wanted = groups["found"]["rloo"]
  close(advantage, wanted["advantages"])
  loss = losses.clipped_surrogate_loss(new - old, advantage, 0.15, 0.25)
  close(loss.mean(), wanted["new"]["loss"])


# The newest TRL: DPOTrainer and KTOTrainer.


@pytest.fixture(scope="module")
def preference(recorded):
  return recorded("preference")


def preferred(given, kind):
  """Each pair's loss and metrics, and the mean's gradient."""
  config = DPOConfig(
    steps=1,
    loss="sigmoid" if kind == "sft" else kind,
    beta=given["beta"],
    label_smoothing=given["label_smoothing"] if kind == "robust" else 0.0,
    length_normalised=kind == "ipo",
  )
  reference = Sum(), given["ref"]
  chosen, rejected = (
    [(x, answers[side]) for x, *answers in given["texts"]] for side in (0, 1)
  )
  text = text_batch([*chosen, *rejected], PairBatch)
  name = "loss/nll" if kind == "sft" else "loss/preference"

  def loss(params):
    found = pair_losses(config, Sum(), params, reference, text)
    return found[name].mean(), found | {"pairs": found[name]}

  (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    given["now"]
  )
  return found, gradient


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_dpo_update(preference, kind):
  """`DPOTrainer._compute_loss`; see dpo/train.py on how its ipo divides."""
  found, gradient = preferred(preference["dpo"], kind)
  wanted = preference["dpo"]["found"][kind]
  close(found["pairs"], wanted["pairs"])
  close(found["pairs"].mean(), wanted["total"])
  for name, slope in wanted["gradient"].items():
    close(gradient[name], slope, err_msg=name)
  for name, value in wanted["metrics"].items():
    close(found[name].mean(), value, err_msg=name)


def test_nll_of_the_chosen(preference):
  """`loss_type="sft"` of one pair; of several, ours is a mean over pairs.

  TRL's is one over all their tokens, in which a long answer weighs more.
  """
  found, _ = preferred(preference["dpo"], "sft")
  close(found["pairs"], preference["dpo"]["found"]["sft"]["pairs"])


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_update(preference, kind):
  """`KTOTrainer._compute_loss`: each row, the mean's gradient, the KL."""
  given = preference["kto"]
  wanted = given["found"][kind]
  config = KTOConfig(
    steps=1,
    loss=kind,
    **{k: given[k] for k in ("beta", "desirable_weight", "undesirable_weight")},
  )
  crossed = [(x, other) for x, _, other in given["texts"]]

  def lead(tree):
    return jax.tree.map(lambda x: x[None], tree)

  batch = LabelledBatch(
    text=lead(text_batch([(x, y) for x, y, _ in given["texts"]])),
    desirable=given["label"][None],
    group=jnp.arange(len(crossed))[None],
    mismatched=lead(text_batch(crossed)) if kind == "kto" else None,
  )
  run = make_run(config, given["now"], given["ref"], jump(given["now"]))
  state, found = run.jit(kto.make_update(run))(run.state, batch, run.key)
  close(found["loss/total"], wanted["total"])
  for name, gradient in wanted["gradient"].items():
    close(state.opt_state[name], gradient, err_msg=name)
  for name, value in wanted["metrics"].items():
    close(found.get(name, 0.0), value, err_msg=name)
  rows = jax.tree.map(lambda x: x[0], (batch.text, batch.desirable))

  @jax.jit
  def sums(params):
    return kto.sum_metrics(run, params, run.reference, 0.0, *rows)

  _, scaled = sums(given["now"])
  weights = given["desirable_weight"], given["undesirable_weight"]
  kl = wanted["metrics"]["kl"]
  ratio = scaled / given["beta"]
  alone = losses.kto_loss(ratio, given["label"], kl, given["beta"], *weights)
  close(alone, wanted["rows"])


def test_kto_pairs(preference):
  """`KTOTrainer._prepare_dataset`: each prompt with the answer before its own.

  So ours, where all prompts differ; see kto/train.py for where they do not.
  """
  texts = preference["kto"]["texts"]
  mates = batches.mismatch(np.arange(len(texts)))
  assert [texts[i][1] for i in mates] == [other for _, _, other in texts]
