"""Trains the lab's policy: a small GPT-NeoX on dialogues, from nothing.

  python configs/lab/prepare.py --source DIALOGUES --out .cache/lab
  python -m jaxalign.main --config configs/lab/policy.py

Whole dialogues count in the loss: a model this small learns English from the
questions too.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "default") -> ConfigDict:
  """Fields that are not given here have the defaults of `SFTConfig`."""
  del preset
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
