"""Trains the lab's reward models by distilling two larger ones.

  python configs/lab/prepare.py --source SCORED --out .cache/lab
  python -m jaxalign.main --config configs/lab/reward_model.py:train
  python -m jaxalign.main --config configs/lab/reward_model.py:test

The two learn from the scores of two teachers that were trained on disjoint
halves of their data, so that train reward and held-out reward do not share
their mistakes. Segment types tell the prompt from the completion. What else was
tried is in docs/log.md.
"""

from ml_collections import ConfigDict

from jaxalign.config import choose_preset

SEEDS = {"train": 1, "test": 2}


def get_config(preset: str = "train") -> ConfigDict:
  """Fields that are not given here have `RewardModelConfig`'s defaults."""
  seed = choose_preset(SEEDS, preset, "configs/lab/reward_model.py")
  return ConfigDict(
    {
      "algorithm": "reward_model",
      "seed": seed,
      "policy": "init",
      "init": {
        "tokenizer": ".cache/lab/reward-tokenizer",
        "model_type": "deberta-v2",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 256,
        "type_vocab_size": 2,
      },
      "dropout": 0.05,
      "head": "score_context",
      "encoding": "pair",
      "data": f".cache/lab/reward-{preset}.jsonl.gz",
      "validation_data": f".cache/lab/reward-{preset}.validation.jsonl.gz",
      "validation_interval": 1000,
      "loss": "both",
      "distill_weight": 0.25,
      "answers_per_prompt": 8,
      "max_length": 128,
      "batch_size": 64,
      "steps": 3000,
      "optimizer": {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "end_value_ratio": 0.02,
        "weight_decay": 0.05,
        "beta2": 0.98,
        "clip_norm": 1.0,
      },
      "checkpoint": {"every_steps": 200},
    }
  )
