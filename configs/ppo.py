"""PPO: the RLHF baseline, with a value model or with group baselines.

  python -m jaxalign.main --config configs/ppo.py[:PRESET]

`lab` needs nothing but the package. The others take models and prompts from
the Hugging Face hub, or from folders: `--config.policy=DIR
--config.reward_model=DIR --config.prompts=FILE.jsonl`.

Presets and their sources ("Kor" is "SuperHF: Supervised Iterative Learning
from Human Feedback", CS224N 2023):

  preset        source
  lab           none: small models, so that a laptop finishes in minutes
  lab-rloo      lab against three other completions, without a value model
  arithmetic    GRPO on small sums, rewarded by Python functions, after
                configs/sft.py:arithmetic; docs/reward_functions.md
  superhf-rlhf  Kor, Table 3, and its released script
  trl-041       the defaults of TRL 0.4.1's PPOConfig, on the same models
  almost        "Aligning Large Language Models through Synthetic Feedback"
                (ALMoST, 2023), appendix: RL from synthetic feedback

Settings, in TRL's words and ours:

  setting                      superhf-rlhf   trl-041      almost
  batch `rollout.prompts`      32             256          512
  mini_batch_size `batch_size` 8              1            32
  ppo_epochs `epochs`          4              4            4
  steps                        62             20000 / 256  80000 / 512
  learning rate                1.41e-5        1e-5         1e-6
  schedule, warm-up            linear 20      constant     cosine to 8e-7
  KL coefficient, target       0.2, 6         0.2, 6       0.05, none
  KL horizon                   10000          10000        -
  gamma, lambda                1, 0.95        1, 0.95      1, 0.95 (trlX)
  clip, value clip             0.2, 0.2       0.2, 0.2     0.2, 0.2 (trlX)
  vf_coef                      0.1            0.1          1 (trlX)
  score clip                   none           none         10 (trlX)
  optimizer                    torch's Adam   torch's Adam AdamW (0.9, 0.95),
                                                           decay 1e-6
  max new tokens               64             32           128
  temperature, top-p           1, 1           1, 1         1, 1

Deviations of every paper preset, all of them repairs, are at the head of
jaxalign/algorithms/ppo/train.py: the prompt is not trained again as part of
the completion, the trained text is the rewarded one, whitening is over the
step, empty completions are left out, no dropout. Besides,
 * the value head of all is TRL's linear one on the policy, starting at 0;
   trlX's has a hidden layer;
 * the paper tried rates from 1e-6 to 1.41e-5 and batches of 32 and 64 and does
   not name the best; these are its script's;
 * ALMoST's "lr 1e-6, cosine to 8e-7" is an end ratio of 0.8; its policy,
   prompts and reward model are the user's own ALMoST runs.

Expected result: `lab`: held-out score -3.4 -> -2.8 (three seeds), shorter
completions (docs/log.md). The other presets have no run on record yet.

Time and memory: a full fine-tuning of N parameters takes 16 N bytes for
parameters, gradients and Adam and 4 N for the reference; with LoRA the
reference costs nothing; a separate value model takes 16 bytes for each of its
own. A sum over the shapes, not a measurement.
"""

from ml_collections import ConfigDict

from jaxalign.config import choose_preset
from jaxalign.text.templates import SYSTEM_CS224N_RLHF

SETS = ",".join(
  (
    "Anthropic/hh-rlhf:red-team-attempts",
    "Anthropic/hh-rlhf:harmless-base",
    "Anthropic/hh-rlhf:helpful-base",
    "openai/webgpt_comparisons",
  )
)


def lab() -> ConfigDict:
  """A complete run for a laptop."""
  config = ConfigDict({"algorithm": "ppo", "seed": 0, "steps": 100})
  config.policy = "lab"
  config.prompts = "lab"
  config.reward_model = "lab"
  config.test_reward_model = "lab"
  config.rollout = {"prompts": 64}
  config.batch_size = 16
  config.epochs = 2
  config.sampling = {"max_new_tokens": 48, "length_buckets": (32, 64, 128)}
  config.scoring = {
    "encoding": "auto",
    "max_length": 128,
    "length_buckets": (48, 64, 96, 128),
  }
  config.max_prompt_chars = 300
  config.optimizer = {
    "learning_rate": 5e-5,
    "schedule": "cosine",
    "warmup_steps": 5,
    "clip_norm": 1.0,
    "weight_decay": 0.0,
  }
  config.kl = {"coefficient": 0.2}
  # Values start at 0; scores of the lab's first policy are at -3.6.
  config.shaping = {"scaling": "reference", "centre": True}
  config.validation_interval = 1
  return config


def lab_rloo() -> ConfigDict:
  """The lab without a value model: completions of a prompt are compared."""
  config = lab()
  config.advantage = "rloo"
  config.rollout = {"prompts": 16, "samples_per_prompt": 4}
  return config


def arithmetic() -> ConfigDict:
  """GRPO on small sums, rewarded by functions."""
  config = lab()
  config.steps = 100
  config.policy = "runs/sft-arithmetic/model"
  config.prompts = "configs/lab/sums.jsonl"
  config.reward_model = (
    "configs/lab/arithmetic.py:correct, configs/lab/arithmetic.py:bare*0.2"
  )
  config.test_reward_model = "configs/lab/arithmetic.py:correct"
  config.advantage = "grpo"
  config.rollout = {"prompts": 18, "samples_per_prompt": 8}
  config.batch_size = 48
  config.epochs = 1
  config.sampling = {"max_new_tokens": 6, "length_buckets": (32,)}
  config.optimizer.learning_rate = 3e-4
  # GRPO's own KL, in the loss.
  config.kl = {"coefficient": 0.01, "place": "loss", "estimator": "k3"}
  config.shaping = {}
  return config


def superhf_rlhf() -> ConfigDict:
  """The baseline that SuperHF was compared with."""
  config = trl_041()
  config.seed = 66
  config.steps = 62
  config.rollout.prompts = 32
  config.batch_size = 8
  config.sampling.max_new_tokens = 64
  config.optimizer.learning_rate = 1.41e-5
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 20
  return config


def trl_041() -> ConfigDict:
  """TRL's defaults of March 2023."""
  config = ConfigDict({"algorithm": "ppo", "seed": 0})
  config.steps = 20_000 // 256
  config.policy = "theblackcat102/pythia-1b-deduped-sft"
  config.prompts = SETS
  config.reward_model = "OpenAssistant/reward-model-deberta-v3-large-v2"
  config.system_prompt = SYSTEM_CS224N_RLHF
  config.max_prompt_chars = 1023
  config.deduplicate = False
  config.holdout = 0
  config.rollout = {"prompts": 256}
  config.batch_size = 1
  config.sampling = {"max_new_tokens": 32, "truncation": "complex"}
  config.scoring = {
    "encoding": "concat",
    "max_length": 1024,
    "dtype": "float32",
  }
  config.optimizer = {
    "learning_rate": 1e-5,
    "schedule": "constant",
    "weight_decay": 0.0,
  }
  config.kl = {"coefficient": 0.2, "target": 6.0, "horizon": 10_000}
  return config


def almost() -> ConfigDict:
  """Reinforcement learning from synthetic feedback."""
  config = ConfigDict({"algorithm": "ppo", "seed": 0})
  config.steps = 80_000 // 512
  config.policy = "runs/sft-almost/model"
  config.prompts = "runs/almost-prompts.jsonl"
  config.reward_model = "runs/reward_model-almost/model"
  config.rollout = {"prompts": 512}
  config.batch_size = 32
  config.sampling = {"max_new_tokens": 128}
  config.scoring = {"encoding": "concat", "max_length": 1024}
  config.optimizer = {
    "learning_rate": 1e-6,
    "schedule": "cosine",
    "end_value_ratio": 0.8,
    "beta2": 0.95,
    "weight_decay": 1e-6,
  }
  config.kl = {"coefficient": 0.05}
  config.shaping = {"clip": 10.0}
  config.vf_coef = 1.0
  return config


PRESETS = {
  "lab": lab,
  "lab-rloo": lab_rloo,
  "arithmetic": arithmetic,
  "superhf-rlhf": superhf_rlhf,
  "trl-041": trl_041,
  "almost": almost,
}


def get_config(preset: str = "lab") -> ConfigDict:
  return choose_preset(PRESETS, preset, "configs/ppo.py")()
