r"""Kahneman-Tversky optimisation: completions labelled good or bad.

  python -m jaxalign.main --config configs/kto.py[:PRESET]
  python -m jaxalign.main --config configs/kto.py:hh \
    --config.policy=EleutherAI/pythia-1b --config.data=mine.jsonl

Rows have TRL's columns: `prompt, completion, label`, or a comparison, `prompt,
chosen, rejected` or `chosen, rejected` as whole dialogues, which gives a
desirable and an undesirable row. A source is a hub id, a file or a glob.

  preset   what                                        source
  lab      the lab's policy on the lab's comparisons, CPU   none
  hh       a causal model on HH-RLHF helpful-base      TRL's defaults

Settings of `hh`: beta 0.1, both weights 1, learning rate 1e-6 and texts of at
most 1024 tokens are TRL's; 128 completions an update are as many as the 64
pairs of configs/dpo.py:causal.

Deviations: see the head of jaxalign/algorithms/kto/train.py.

Expected result: `rewards/margins` rises above 0; `lab` on short dialogues of
HH-RLHF with a desirable weight of 1.33: 0.56 to 0.59 of held-out
pairs (docs/log.md). `hh` has no run on record yet.

Time and memory: a full fine-tuning of N parameters takes 16 N bytes for
parameters, gradients and Adam, and 4 N for the reference, which costs nothing
with LoRA or reference="stored". A sum over the shapes, not a measurement. The
KL estimate adds a forward pass of each model.
"""

from ml_collections import ConfigDict

from jaxalign.config import choose_preset


def lab() -> ConfigDict:
  """A run for a laptop."""
  config = ConfigDict({"algorithm": "kto", "seed": 0, "steps": 60})
  config.policy = "lab"
  config.data = "lab"
  config.batch_size = 32
  config.max_length = 128
  config.optimizer = {
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 5,
    "clip_norm": 1.0,
  }
  return config


def hh() -> ConfigDict:
  """A causal model on preferences; a start for your own."""
  config = ConfigDict({"algorithm": "kto", "seed": 0, "epochs": 1.0})
  config.policy = "EleutherAI/pythia-1b"
  config.data = "Anthropic/hh-rlhf:helpful-base"
  config.batch_size = 128
  config.micro_batch = 16
  config.max_length = 1024
  config.optimizer = {
    "learning_rate": 1e-6,
    "schedule": "linear",
    "warmup_steps": 100,
    "clip_norm": 1.0,
  }
  return config


PRESETS = {"lab": lab, "hh": hh}


def get_config(preset: str = "lab") -> ConfigDict:
  return choose_preset(PRESETS, preset, "configs/kto.py")()
