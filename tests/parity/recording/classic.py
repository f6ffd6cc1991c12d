"""TRL 0.11.4: core functions, the classic PPOTrainer, conservative DPO."""

import contextlib

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from recording.tools import WORDS, Draws, Sum, bare, some, spans, write


def record():
  draws = Draws(0)
  write("ppo", functions=core_functions(draws), methods=ppo_methods(draws))
  write("ppo_steps", **ppo_steps(Draws(1)))
  write("smoothing", **smoothed_dpo(Draws(2)))


def core_functions(draws):
  from trl import core
  from trl.trainer.utils import AdaptiveKLController, RunningMoments

  x, mask = (
    draws.normal(4, 6) + 0.5,
    spans((0, 6), (1, 4), (2, 3), (3, 1), width=6),
  )
  logits = draws.normal(3, 4, WORDS, scale=2)
  labels = draws.ids(12).reshape(3, 4)
  control = AdaptiveKLController(0.2, target=6.0, horizon=1000)
  inputs = [(7.0, 64), (60.0, 64), (0.0, 32), (5.5, 16)]
  coefficients = [control.update(*y) or control.value for y in inputs]
  moments = RunningMoments(some(use_distributed=False))
  batches = [2 * draws.normal(5) + 3 for _ in range(3)]
  seen = [moments.update(b) and moments.__dict__.copy() for b in batches]
  return {
    "x": x,
    "mask": mask,
    "masked_mean": core.masked_mean(x, mask),
    "masked_var": core.masked_var(x, mask),
    "masked_whiten": core.masked_whiten(x, mask),
    "masked_whiten_keeping_mean": core.masked_whiten(x, mask, shift_mean=False),
    "logits": logits,
    "labels": labels,
    "logprobs_from_logits": core.logprobs_from_logits(logits, labels),
    "entropy_from_logits": core.entropy_from_logits(logits),
    "controller": {
      "kl": [kl for kl, _ in inputs],
      "answers": [n for _, n in inputs],
      "value": coefficients,
    },
    "moments": {
      "batches": torch.stack(batches),
      **{n: [s[n] for s in seen] for n in ("count", "mean", "std")},
    },
  }


def ppo_methods(draws):
  """Rewards, advantages and loss of tensors that have nothing in common."""
  return {
    "compute_rewards": rewards_by_penalty(draws),
    "compute_advantages": advantages(draws),
    "loss": clipped_losses(draws),
  }


def rewards_by_penalty(draws):
  from trl.trainer.ppo_trainer import PPOTrainer

  mask = spans((0, 5), (1, 3), (2, 1), width=5)
  given = {
    "scores": draws.normal(3),
    "logits": draws.normal(3, 5, WORDS),
    "ref_logits": draws.normal(3, 5, WORDS),
  }
  labels = draws.ids(15).reshape(3, 5)
  whole = [given[n].log_softmax(-1) for n in ("logits", "ref_logits")]
  taken = [x.gather(-1, labels[..., None])[..., 0] for x in whole]
  found = {}
  for kind in ("kl", "abs", "mse", "full"):
    trainer = bare(
      PPOTrainer, config=some(kl_penalty=kind), kl_ctl=some(value=0.3)
    )
    rewards, _, kls = trainer.compute_rewards(
      given["scores"], *(whole if kind == "full" else taken), mask.long()
    )
    found[kind] = {"rewards": rewards, "kls": kls}
  return {**given, "labels": labels, "mask": mask, "found": found}


def advantages(draws):
  from trl.trainer.ppo_trainer import PPOTrainer

  config = some(gamma=0.95, lam=0.9, whiten_rewards=False)
  trainer = bare(PPOTrainer, config=config)
  values, rewards = draws.normal(2, 4, 6)
  # Answers that end anywhere, and answers that all end in the last column.
  masks = {
    "ragged": spans((0, 6), (1, 4), (2, 3), (3, 1), width=6),
    "flush": spans((0, 6), (2, 4), (3, 3), (5, 1), width=6),
  }
  found = {"values": values, "rewards": rewards, "gamma": 0.95, "lam": 0.9}
  for name, mask in masks.items():
    found[name] = {"mask": mask}
    for whiten in (False, True):
      config.whiten_rewards = whiten
      _, advantage, returns = trainer.compute_advantages(values, rewards, mask)
      found[name]["whitened" if whiten else "plain"] = {
        "advantages": advantage,
        "returns": returns,
      }
  return found


def clipped_losses(draws):
  from trl.trainer.ppo_trainer import PPOTrainer

  mask = spans((0, 6), (1, 4), (2, 3), (3, 1), width=6)
  given = {
    "old_logprobs": draws.normal(4, 6) - 2,
    "values": draws.normal(4, 6),
    "logits": draws.normal(4, 6, WORDS),
    "advantages": draws.normal(4, 6),
    "returns": draws.normal(4, 6),
  }
  vpreds = given["values"] + draws.normal(4, 6, scale=0.4)
  logprobs = given["old_logprobs"] + draws.normal(4, 6, scale=0.3)
  for x in (vpreds, logprobs):
    x.requires_grad_()
  config = some(cliprange=0.2, cliprange_value=0.3, vf_coef=0.5)
  config.ratio_threshold = 10.0
  policy, value, stats = bare(PPOTrainer, config=config).loss(
    **given, vpreds=vpreds, logprobs=logprobs, mask=mask
  )
  (policy + value).backward()
  return {
    **given,
    "vpreds": vpreds,
    "logprobs": logprobs,
    "mask": mask,
    "config": vars(config),
    "stats": {n: x for n, x in stats.items() if n != "policy/advantages"},
    "by_logprobs": logprobs.grad,
    "by_vpreds": vpreds.grad,
  }


class Jump:
  """An optimizer whose first step goes to given parameters, for good."""

  param_groups = ({"lr": 1.0},)

  def __init__(self, model, tables):
    self.model, self.tables, self.gradients = model, tables, []

  def step(self):
    self.gradients.append(self.model.gradient())
    self.model.move(self.tables)

  def zero_grad(self):
    self.model.zero_grad()


def ppo_steps(draws):
  """PPOTrainer.step as a whole: from texts and scores to gradients."""
  old = draws.tables(WORDS + 1)
  given = {
    "texts": draws.texts((2, 3), (3, 2), (1, 5), (2, 1)),
    "scores": 2 * draws.normal(4),
    "old": old,
    "new": draws.tables(WORDS + 1, near=old, scale=0.2),
    "ref": draws.tables(WORDS + 1, near=old, scale=0.5),
  }
  adaptive = {"adap_kl_ctrl": True, "target": 2.0, "horizon": 100}
  cases = {
    "first epoch": {"ppo_epochs": 1},
    "adaptive": adaptive | {"gamma": 0.9, "lam": 0.8},
    "full": {"kl_penalty": "full", "score_clip": 1.0},
    "whitened": {"whiten_rewards": True, "kl_penalty": "abs", "side": "left"},
  }
  return given | {
    "cases": {name: ppo_step(given, **case) for name, case in cases.items()}
  }


def ppo_step(given, side="right", **changes):
  from trl.trainer import ppo_trainer
  from trl.trainer.utils import AdaptiveKLController, FixedKLController

  settings = {
    "adap_kl_ctrl": False,
    "init_kl_coef": 0.3,
    "ppo_epochs": 2,
    "cliprange": 0.15,
    "cliprange_value": 0.1,
    "vf_coef": 0.5,
  } | changes
  config = ppo_trainer.PPOConfig(batch_size=4, mini_batch_size=4, **settings)
  control = FixedKLController(config.init_kl_coef)
  if config.adap_kl_ctrl:
    control = AdaptiveKLController(
      config.init_kl_coef, config.target, config.horizon
    )
  model = Sum(given["old"])
  trainer = bare(
    ppo_trainer.PPOTrainer,
    config=config,
    accelerator=Accelerator(cpu=True),
    model=model,
    ref_model=Sum(given["ref"]),
    optimizer=Jump(model, given["new"]),
    kl_ctl=control,
    current_device="cpu",
    data_collator=lambda rows: padded([x["input_ids"] for x in rows], side),
    optional_peft_ctx=contextlib.nullcontext,
    lr_scheduler=None,
    **dict.fromkeys(
      ("is_distributed", "is_encoder_decoder", "is_peft_model"), False
    ),
  )
  prompts, answers = (
    [torch.tensor(x) for x in column]
    for column in zip(*given["texts"], strict=True)
  )
  stats = trainer.step(prompts, answers, list(given["scores"]))
  kept = ("objective/", "ppo/")
  return {
    "settings": settings | {"side": side},
    "stats": {
      name: x
      for name, x in stats.items()
      if name.startswith(kept) and not np.ndim(x)
    },
    "kl_coef_after": control.value,
    "gradient": trainer.optimizer.gradients[-1],
  }


def padded(rows, side):
  """What TRL's collator makes of rows with a tokenizer that pads there."""
  rows = [x.flip(0) if side == "left" else x for x in rows]

  def pad(x):
    return torch.nn.utils.rnn.pad_sequence(x, batch_first=True)

  found = {
    "input_ids": pad(rows),
    "attention_mask": pad([torch.ones_like(x) for x in rows]),
  }
  if side == "left":
    found = {name: x.flip(1) for name, x in found.items()}
  return transformers.BatchEncoding(found)


def smoothed_dpo(draws):
  """The conservative loss, which newer versions have no more."""
  from trl.trainer.dpo_trainer import DPOTrainer

  names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
  logps = {name: 3 * draws.normal(6) - 10 for name in names}
  found = {}
  for epsilon in (0.0, 0.1, 0.3):
    trainer = bare(
      DPOTrainer,
      accelerator=some(device="cpu"),
      reference_free=False,
      f_divergence_type="reverse_kl",
      loss_type="sigmoid",
      beta=0.4,
      label_smoothing=epsilon,
    )
    loss, chosen, rejected = trainer.dpo_loss(*logps.values())
    found[str(epsilon)] = {
      "loss": loss,
      "rewards/chosen": chosen,
      "rewards/rejected": rejected,
    }
  return {**logps, "beta": 0.4, "found": found}
