r"""Direct preference optimisation, on stored comparisons or own completions.

  python -m jaxalign.main --config configs/dpo.py[:PRESET]
  python -m jaxalign.main --config configs/dpo.py:causal \
    --config.policy=EleutherAI/pythia-1b --config.data=mine.jsonl

Rows have TRL's columns: `prompt, chosen, rejected`, or `chosen, rejected` as
whole dialogues. A source is a hub id, a file or a glob.

  preset   what                                        source
  lab      the lab's policy on the lab's comparisons, CPU   none
  causal   a causal model on HH-RLHF helpful-base      TRL's defaults
  online   the lab's policy on pairs of its own completions, CPU   none
  online-trl   a causal model on its own completions   TRL 0.11.4's defaults

`online` asks the lab's reward model which of two completions is better;
`--config.judge=people` asks by a queue file, `--config.judge=mine.py:prefer` a
function.

Settings of `causal`: beta 0.1, learning rate 1e-6 and texts of at most 1024
tokens are TRL's; 64 pairs an update as in Rafailov 2023. Of `online-trl`:
temperature 0.9, 64 new tokens, beta 0.1, learning rate 5e-7.

Deviations: see the head of jaxalign/algorithms/dpo/train.py.

Expected result: `rewards/accuracies` rises above one half; `lab` on short
dialogues of HH-RLHF: 0.58 to 0.59 of held-out pairs; `online`: held-out score
-3.4 -> -2.7 (three seeds each, docs/log.md). The others have no run on record.

Time and memory: a full fine-tuning of N parameters takes 16 N bytes for
parameters, gradients and Adam, and 4 N for the reference, which costs nothing
with LoRA or reference="stored". A sum over the shapes, not a measurement.
"""

from ml_collections import ConfigDict

from jaxalign.config import choose_preset


def lab() -> ConfigDict:
  """A run for a laptop."""
  config = ConfigDict({"algorithm": "dpo", "seed": 0, "steps": 60})
  config.policy = "lab"
  config.data = "lab"
  config.batch_size = 16
  config.max_length = 128
  config.optimizer = {
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 5,
    "clip_norm": 1.0,
  }
  return config


def causal() -> ConfigDict:
  """A causal model on preferences; a start for your own."""
  config = ConfigDict({"algorithm": "dpo", "seed": 0, "epochs": 1.0})
  config.policy = "EleutherAI/pythia-1b"
  config.data = "Anthropic/hh-rlhf:helpful-base"
  config.batch_size = 64
  config.micro_batch = 8
  config.max_length = 1024
  config.optimizer = {
    "learning_rate": 1e-6,
    "schedule": "linear",
    "warmup_steps": 100,
    "clip_norm": 1.0,
  }
  return config


def online() -> ConfigDict:
  """The lab's policy, compared with itself by the lab's reward model."""
  config = ConfigDict({"algorithm": "online_dpo", "seed": 0, "steps": 100})
  config.policy = "lab"
  config.prompts = "lab"
  config.reward_model = "lab"
  config.test_reward_model = "lab"
  config.batch_size = 32
  config.sampling = {"max_new_tokens": 48, "length_buckets": (32, 64, 128)}
  config.scoring = {
    "encoding": "auto",
    "max_length": 128,
    "length_buckets": (48, 64, 96, 128),
  }
  config.max_length = 192
  config.max_prompt_chars = 300
  config.optimizer = {
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 5,
    "clip_norm": 1.0,
    "weight_decay": 0.0,
  }
  config.validation_interval = 1
  return config


def online_trl() -> ConfigDict:
  """A causal model on its own completions; a start for your own."""
  config = ConfigDict({"algorithm": "online_dpo", "seed": 0, "steps": 1000})
  config.policy = "EleutherAI/pythia-1b"
  config.prompts = "Anthropic/hh-rlhf:helpful-base"
  config.reward_model = "OpenAssistant/reward-model-deberta-v3-large-v2"
  config.batch_size = 64
  config.micro_batch = 8
  config.sampling = {"temperature": 0.9, "max_new_tokens": 64}
  config.optimizer = {
    "learning_rate": 5e-7,
    "schedule": "linear",
    "clip_norm": 1.0,
  }
  return config


PRESETS = {
  "lab": lab,
  "causal": causal,
  "online": online,
  "online-trl": online_trl,
}


def get_config(preset: str = "lab") -> ConfigDict:
  return choose_preset(PRESETS, preset, "configs/dpo.py")()
