"""The newest TRL: DPO, KTO, reward models, GRPO and RLOO."""

import collections

import torch
from accelerate import Accelerator
from recording.tools import Draws, Sum, bare, some, write


def record():
  write(
    "preference",
    dpo=dpo(Draws(3)),
    kto=kto(Draws(4)),
    reward=reward(Draws(5)),
  )
  write("groups", **groups(Draws(16)))


def trainer_of(kind, model, **attributes):
  """A trainer of one process, in training, with its own `_metrics`."""
  model.train()
  return bare(
    kind,
    model=model,
    accelerator=Accelerator(cpu=True),
    aux_loss_enabled=False,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _total_train_tokens=0,
    _tp_size=1,
    **attributes,
  )


def with_log_probs(tables):
  """A `Sum` with the log-probs of TRL's fused output matrix."""
  from trl.trainer.utils import add_fused_lm_head

  model = Sum(tables)
  outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
  add_fused_lm_head(model, outputs=outputs)
  return model


def metrics_of(trainer):
  """The last ones logged; of the rest, our formulas have no part."""
  kept = ("rewards/", "logps/", "clip_ratio/", "kl", "accuracy", "margin")
  logged = trainer._metrics["train"].items()
  return {name: x[-1] for name, x in logged if name.startswith(kept)}


def dpo(draws):
  from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

  now = draws.tables()
  texts = draws.texts((2, 3, 2), (1, 4, 6), (3, 1, 4))
  given = {"texts": texts, "now": now, "ref": draws.tables(near=now)}
  names = ("prompt_ids", "chosen_ids", "rejected_ids")
  rows = [dict(zip(names, text, strict=True)) for text in texts]
  collate = DataCollatorForPreference(pad_token_id=0)
  model, reference = with_log_probs(now), with_log_probs(given["ref"])
  kinds = ("sigmoid", "robust", "hinge", "ipo", "sft")
  found = {}
  for kind in kinds:
    trainer = trainer_of(
      DPOTrainer,
      model,
      ref_model=reference,
      args=some(gradient_checkpointing_kwargs=None),
      ld_alpha=None,
      precompute_ref_logps=False,
      f_divergence_type="reverse_kl",
      loss_types=[kind],
      loss_weights=[1.0],
      beta=0.5,
      label_smoothing=0.2,
      use_weighting=False,
    )

    def loss(some, t=trainer):
      return t._compute_loss(model, collate(some), False)

    pairs = [loss([row]) for row in rows]
    total = loss(rows)
    total.backward()
    found[kind] = {
      "pairs": torch.stack(pairs),
      "total": total,
      "gradient": model.gradient(),
      "metrics": metrics_of(trainer),
    }
  return {**given, "beta": 0.5, "label_smoothing": 0.2, "found": found}


class Letters:
  """A tokenizer of digits."""

  eos_token = "5"

  def __call__(self, text, **_):
    return {"input_ids": [int(x) for x in text]}


def kto(draws):
  """With TRL's own mismatched pairs: x₁ with y_n, x₂ with y₁, and so on."""
  from datasets import Dataset
  from trl.trainer import kto_trainer

  now = draws.tables()

  def digits(ids):
    return "".join(map(str, ids))

  texts = draws.texts((2, 3), (1, 4), (3, 1), (2, 2), (1, 5))
  label = [True, False, False, True, True]
  given = {"now": now, "ref": draws.tables(near=now), "label": label}
  rows = [
    {"prompt": digits(x), "completion": digits(y) + "5", "label": good}
    for (x, y), good in zip(texts, label, strict=True)
  ]
  model, reference = with_log_probs(now), with_log_probs(given["ref"])
  trainer = trainer_of(
    kto_trainer.KTOTrainer,
    model,
    ref_model=reference,
    args=some(gradient_checkpointing_kwargs=None),
    precompute_ref_logps=False,
    beta=0.5,
    desirable_weight=1.2,
    undesirable_weight=0.7,
    calculate_KL=True,
    _tokenizer=Letters(),
  )
  args = some(
    dataset_num_proc=None,
    max_length=None,
    per_device_train_batch_size=len(rows),
  )
  data = list(
    trainer._prepare_dataset(
      Dataset.from_list(rows), trainer._tokenizer, args, "train"
    )
  )
  batch = kto_trainer.DataCollatorForUnpairedPreference(0)(data)
  names = ("prompt_ids", "completion_ids", "KL_completion_ids")
  found = {}
  for kind in ("kto", "apo_zero_unpaired"):
    trainer.loss_type = kind
    trainer.calculate_KL = kind == "kto"
    # A row alone, beside the mismatched pairs of the whole batch.
    alone = [
      trainer._compute_loss(
        model,
        {k: x if k[:3] == "KL_" else x[i : i + 1] for k, x in batch.items()},
        False,
      )
      for i in range(len(rows))
    ]
    total = trainer._compute_loss(model, batch, False)
    total.backward()
    found[kind] = {
      "rows": torch.stack(alone),
      "total": total,
      "gradient": model.gradient(),
      "metrics": metrics_of(trainer),
    }
  return {
    **given,
    "texts": [[row[name] for name in names] for row in data],
    "beta": 0.5,
    "desirable_weight": 1.2,
    "undesirable_weight": 0.7,
    "found": found,
  }


def reward(draws):
  from trl.trainer.reward_trainer import RewardTrainer

  scores = draws.normal(8, 1, scale=2).requires_grad_()
  margin = draws.normal(4).abs()
  model = some(training=True)
  found = {}
  for name, inputs, centring in (
    ("plain", {}, None),
    ("margin", {"margin": margin}, None),
    ("both", {"margin": margin}, 0.05),
  ):
    trainer = bare(
      RewardTrainer,
      model=model,
      accelerator=Accelerator(cpu=True),
      args=some(center_rewards_coefficient=centring),
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
      _total_train_tokens=0,
      _tp_size=1,
    )
    loss = trainer.compute_loss(
      lambda **_: some(logits=scores),
      inputs | {"attention_mask": torch.ones(8, 2)},
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    found[name] = {
      "loss": loss,
      "gradient": gradient,
      "metrics": metrics_of(trainer),
    }
  return {"scores": scores, "margin": margin, "centring": 0.05, "found": found}


def groups(draws):
  """GRPO and RLOO: two answers to each of three prompts, and their losses."""
  from trl.trainer.grpo_trainer import GRPOTrainer
  from trl.trainer.rloo_trainer import RLOOTrainer

  old = draws.tables()
  texts = draws.texts((2, 3), (2, 2), (1, 5), (1, 1), (3, 2), (3, 4))
  texts = [[texts[i - i % 2][0], y] for i, (_, y) in enumerate(texts)]
  given = {
    "texts": texts,
    "rewards": draws.normal(len(texts)),
    "old": old,
    "new": draws.tables(near=old, scale=0.4),
    "ref": draws.tables(near=old, scale=0.5),
  }
  found = {}
  for name, kind, changes in (
    ("grpo", GRPOTrainer, {"loss_type": "dapo"}),
    ("delta", GRPOTrainer, {"loss_type": "bnpo", "delta": 1.4, "beta": 0.0}),
    ("rloo", RLOOTrainer, {}),
  ):
    found[name] = group_loss(given, kind, **changes)
  rewards = draws.normal(3, 4)
  # What no reward function scored, and a prompt's only answer that one did.
  rewards[0, 2] = rewards[2, 1:] = float("nan")
  given |= {"found": found, "scores": rewards}

  def scale(x):
    return advantages_of(GRPOTrainer, rewards, scale_rewards=x)

  return given | {
    "advantages": {
      "grpo": scale("group"),
      "unscaled": scale("none"),
      "rloo": advantages_of(RLOOTrainer, rewards),
    }
  }


def group_trainer(kind, model, reference, texts, rewards, group, **changes):
  settings = {"beta": 0.1, "delta": None, "scale_rewards": "group"} | changes
  prompts, answers = zip(*texts, strict=True)
  generated = (prompts, answers, None, answers, None, {}, None, None)
  if kind.__name__ == "RLOOTrainer":
    generated = (prompts, answers, answers)
  names = "pad_to_multiple_of", "tools", "environments", "environment_factories"
  logs = {"prompt": [], "completion": [], "advantages": []}
  return trainer_of(
    kind,
    model,
    ref_model=reference,
    args=some(
      delta=settings["delta"],
      gradient_accumulation_steps=1,
      gradient_checkpointing_kwargs=None,
      per_device_train_batch_size=len(texts),
      report_to=[],
      steps_per_generation=1,
      use_bias_correction_kl=False,
    ),
    beta=settings["beta"],
    current_gradient_accumulation_steps=1,
    epsilon_high=0.25,
    epsilon_low=0.15,
    importance_sampling_level="token",
    loss_type=settings.get("loss_type"),
    mask_truncated_completions=False,
    multi_objective_aggregation="sum_then_normalize",
    normalize_advantages=False,
    num_generations=group,
    num_iterations=2,
    off_policy_mask_threshold=None,
    reward_clip_range=None,
    reward_func_names=["score"],
    reward_weights=torch.ones(1),
    scale_rewards=settings["scale_rewards"],
    top_entropy_quantile=1.0,
    use_vllm=False,
    _calculate_rewards=lambda *_: rewards.reshape(-1, 1),
    _entropy_bonus_enabled=False,
    _generate=lambda _: generated,
    _logs=logs | {"rewards": {"score": []}, "extra": {}},
    _pending_extra_logs={},
    _pending_metrics={},
    _tokenizer=some(pad_token_id=0),
    **dict.fromkeys(names),
  )


def group_loss(given, kind, **changes):
  model, reference = with_log_probs(given["old"]), with_log_probs(given["ref"])
  trainer = group_trainer(
    *(kind, model, reference, given["texts"], given["rewards"], 2), **changes
  )
  batch = trainer._generate_and_score_completions(
    [{"prompt": x} for x, _ in given["texts"]]
  )
  found = {"advantages": batch["advantages"]}
  for name in ("old", "new"):
    model.move(given[name])
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    found[name] = {
      "loss": loss,
      "gradient": model.gradient(),
      "metrics": metrics_of(trainer),
    }
  return found


def advantages_of(kind, rewards, **changes):
  """Of [P, S] rewards, NaN = not scored."""
  texts = [[[1], [2]]] * rewards.numel()
  model = with_log_probs(Draws(0).tables())
  trainer = group_trainer(
    *(kind, model, None, texts, rewards, rewards.shape[1]), beta=0.0, **changes
  )
  batch = trainer._generate_and_score_completions(
    [{"prompt": [1]}] * len(texts)
  )
  return batch["advantages"].reshape(rewards.shape)
