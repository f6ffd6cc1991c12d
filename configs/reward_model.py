r"""A reward model, from preferences or from another model's scores.

  python -m jaxalign.main --config configs/reward_model.py[:PRESET]
  python -m jaxalign.main --config configs/reward_model.py:deberta \
    --config.data=mine.jsonl --config.validation_data=held_out.jsonl

`groups` needs `python configs/lab/groups.py groups` first; see
docs/reward_model.md.

Rows have TRL's columns: `prompt, chosen, rejected`, or `chosen, rejected` as
whole dialogues, optionally with `margin`; to distil, `prompt, completion,
reward`. A source is a hub id, a file or a glob.

  preset         what                                    source
  lab            a new 1 M-parameter DeBERTa on CPU      none
  deberta        DeBERTa-v3-base on HH-RLHF              none
  distill        a new small DeBERTa from scored rows    none
  groups         a head for each of two made-up people   none
  superhf-train  SuperHF's own reward model, first half  openfeedback/superhf
  superhf-test   the same on the second half: held-out reward

Settings of `superhf-train` and `superhf-test` (openfeedback/superhf, later):

  policy         GPT-Neo-1.3B with a linear head without bias on the mean of
                 the last hidden states
  data           HH-RLHF harmless-base and helpful-base, WebGPT comparisons;
                 each set is cut at 50 % by row, one half for each model
  loss           -log sigmoid(chosen - rejected)
  epochs 1, learning rate 1e-5, weight decay 0.001,
  batch 16 x accumulation 4 a device, gradient checkpointing, evaluation every
  100 updates

Deviations: the mean leaves padding out, so a score does not depend on its
batch; bfloat16 in place of fp16 with loss scaling; one device, so 64 pairs an
update; texts of at most 1024 tokens (none given); linear schedule and clipping
at norm 1 are the Hugging Face Trainer's defaults, which the source does not
mention; validation on the test split of helpful-base, while they held out 2300
random WebGPT rows.

Expected result: `lab` shows the loss falling; `superhf-train` has no published
accuracy of its own, but HH-RLHF helpful-base is reported at 71.8 % for a
LLaMA-7B trained on 43,835 of its pairs and 59.4 % for "the longer one wins"
(ALMoST, Table 3).

Time and memory: `lab` takes minutes on 2 CPU cores. `superhf-train`: 1.3e9
parameters x 16 bytes = 21 GB for parameters, gradients and Adam, and the
activations of 32 texts a pass; a sum over the shapes, not a measurement.
"""

import functools

from ml_collections import ConfigDict

from jaxalign.config import choose_preset

HH = "Anthropic/hh-rlhf:harmless-base,Anthropic/hh-rlhf:helpful-base"


def lab() -> ConfigDict:
  """Goes on training the lab's reward model for a few updates."""
  config = ConfigDict({"algorithm": "reward_model", "seed": 0, "steps": 50})
  config.policy = "lab"
  config.data = "lab"
  config.encoding = "auto"
  config.batch_size = 16
  config.max_length = 128
  config.optimizer = {
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 5,
    "clip_norm": 1.0,
  }
  return config


def deberta() -> ConfigDict:
  """DeBERTa-v3-base on preferences; a start for your own."""
  config = ConfigDict({"algorithm": "reward_model", "seed": 0, "epochs": 1.0})
  config.policy = "microsoft/deberta-v3-base"
  config.head = "score_context"
  config.encoding = "pair"
  config.data = HH
  config.batch_size = 64
  config.micro_batch = 16
  config.max_length = 512
  config.center_rewards_coefficient = 0.01
  config.optimizer = {
    "learning_rate": 1e-5,
    "schedule": "linear",
    "warmup_steps": 100,
    "clip_norm": 1.0,
  }
  return config


def distill() -> ConfigDict:
  """A new small DeBERTa from completions that a larger model has scored."""
  config = ConfigDict({"algorithm": "reward_model", "seed": 0, "epochs": 1.0})
  config.policy = "init"
  config.init = {
    "tokenizer": "microsoft/deberta-v3-base",
    "model_type": "deberta-v2",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
  }
  config.head = "score_context"
  config.encoding = "pair"
  config.loss = "both"
  config.data = "scored.jsonl"
  config.batch_size = 64
  config.answers_per_prompt = 4
  config.max_length = 256
  config.optimizer = {
    "learning_rate": 5e-4,
    "schedule": "cosine",
    "warmup_steps": 100,
    "clip_norm": 1.0,
  }
  return config


def groups() -> ConfigDict:
  """The lab's reward model with a head for each of two opposite tastes."""
  config = lab()
  config.steps = 60
  config.max_length = 96
  config.optimizer.learning_rate = 1e-3
  config.data = "groups/train.jsonl"
  config.validation_data = "groups/test.jsonl"
  config.validation_interval = 20
  config.group_column = "annotator"
  return config


def superhf(half: str) -> ConfigDict:
  """GPT-Neo-1.3B on one half of each data set."""
  config = ConfigDict({"algorithm": "reward_model", "seed": 66, "epochs": 1.0})
  config.policy = "EleutherAI/gpt-neo-1.3B"
  config.head = "score_mean"
  config.encoding = "concat"
  config.data = f"{HH},openai/webgpt_comparisons"
  config.half = half
  config.validation_data = "Anthropic/hh-rlhf:helpful-base"
  config.validation_interval = 100
  config.batch_size = 64
  config.micro_batch = 16
  config.max_length = 1024
  config.remat = "full"
  config.optimizer = {
    "learning_rate": 1e-5,
    "schedule": "linear",
    "weight_decay": 0.001,
    "clip_norm": 1.0,
  }
  config.precision = {"compute": "bfloat16"}
  return config


PRESETS = {
  "lab": lab,
  "deberta": deberta,
  "distill": distill,
  "groups": groups,
  "superhf-train": functools.partial(superhf, "first"),
  "superhf-test": functools.partial(superhf, "second"),
}


def get_config(preset: str = "lab") -> ConfigDict:
  return choose_preset(PRESETS, preset, "configs/reward_model.py")()
