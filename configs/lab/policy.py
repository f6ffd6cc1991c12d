r"""Trains the lab's policy: a small GPT-NeoX on dialogues, from nothing.

  python configs/lab/prepare.py --source DIALOGUES --out .cache/lab
  python -m jaxalign.main --config configs/lab/policy.py --workdir FIRST
  python -m jaxalign.main --config configs/lab/policy.py:second \
    --config.policy=FIRST/model

Only completions count in the loss: prompts recur up to 64 times, and a model
this small learns them by heart. The second run goes on with the corpus that
holds few refusals (see prepare.py).
"""

from ml_collections import ConfigDict

from jaxalign.config import choose_preset


def first() -> ConfigDict:
  """From nothing; fields that are not given have `SFTConfig`'s defaults."""
  return ConfigDict(
    {
      "algorithm": "sft",
      "policy": "init",
      "init": {
        "tokenizer": ".cache/lab/policy-tokenizer",
        "model_type": "gpt_neox",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
      },
      "data": ".cache/lab/policy.jsonl.gz",
      "validation_data": ".cache/lab/policy.validation.jsonl.gz",
      "validation_interval": 300,
      "loss_on": "completion",
      "packing": True,
      "max_length": 160,
      "batch_size": 24,
      "steps": 1700,
      "optimizer": {
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "end_value_ratio": 0.05,
        "weight_decay": 0.05,
        "beta2": 0.98,
        "clip_norm": 1.0,
      },
      "checkpoint": {"every_steps": 100},
    }
  )


def second() -> ConfigDict:
  """From the first run's result; `policy` is given on the command line."""
  config = first()
  config.seed = 1
  config.policy = "runs/policy-first/model"
  del config.init
  config.data = ".cache/lab/policy.second.jsonl.gz"
  config.validation_interval = 350
  config.steps = 700
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 30
  return config


PRESETS = {"first": first, "second": second}


def get_config(preset: str = "first") -> ConfigDict:
  """One of the two runs."""
  return choose_preset(PRESETS, preset, "configs/lab/policy.py")()
