"""The config files: every preset is valid and says what its source says."""

import operator
import pathlib

import pytest

from jaxalign import cli
from jaxalign import config as configs
from jaxalign.algorithms import read_config
from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def get_config(name: str):
  return cli.load_config_file(FOLDER / f"{name}.py").get_config


def load(name: str, preset: str):
  return read_config(get_config(name)(preset))


NAMES = ("superhf", "sft", "reward_model", "dpo", "kto", "ppo")
ALL = [
  (name, preset)
  for name in NAMES
  for preset in get_config(name).__globals__["PRESETS"]
]


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_every_preset_is_valid_and_complete_in_json(name, preset):
  config = load(name, preset)
  assert config.algorithm in (name, f"online_{name}")
  assert read_config(configs.to_mapping(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_files_document_their_presets_and_refuse_others(name):
  function = get_config(name)
  with pytest.raises(UserError, match=f"configs/{name}.py has no preset 'la'"):
    function("la")
  assert function() == function("lab")
  text = (FOLDER / f"{name}.py").read_text()
  head = text.split('"""')[1]
  for preset in ("lab", *[p for n, p in ALL if n == name and "12b" not in p]):
    if not preset.startswith("pythia-") or preset.startswith("pythia-1b"):
      assert preset in head, preset
  for word in ("Expected result", "Time and memory", "--config configs/"):
    assert word in head


def test_pythia_1b_is_table_2():
  """Facts of the CS224N paper, Table 2, and of its code where it is silent."""
  config = load("superhf", "pythia-1b")
  assert config.policy == "theblackcat102/pythia-1b-deduped-sft"
  assert config.reward_model == "OpenAssistant/reward-model-deberta-v3-large-v2"
  assert (config.steps, config.seed) == (2000, 66)
  batch = config.superbatch
  assert (batch.prompts, batch.samples_per_prompt, batch.keep) == (1, 32, 1)
  assert batch.mode == "single_prompt"
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.learning_rate) == ("adamw", 1e-5)
  assert (optimizer.schedule, optimizer.warmup_steps) == ("cosine", 100)
  assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
  assert (optimizer.eps, optimizer.weight_decay) == (1e-8, 0.01)
  assert optimizer.clip_norm == 0
  sampling = config.sampling
  assert (sampling.temperature, sampling.top_p) == (1.0, 0.9)
  # Neither paper nor config names it: the default of transformers 4.29.
  assert sampling.top_k == load("superhf", "llama-7b").sampling.top_k == 50
  assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.05, 64)
  assert sampling.truncation == "complex"
  assert config.batch_size == 8
  assert config.precision.compute == config.scoring.dtype == "float32"
  assert config.scoring.encoding == "concat"
  assert config.lora.rank == 0
  assert not config.uses_reference
  assert config.inverse_loss_penalty == config.length_penalty == 0
  assert not config.train_eos
  assert not config.deduplicate
  assert config.max_prompt_chars == 1023
  assert config.holdout == 0
  assert len(config.prompts.split(",")) == 4
  assert load("superhf", "pythia-1b-deduped-sft") == config


def test_the_released_files_differ_where_they_should():
  def values(preset):
    config = load("superhf", preset)
    return {
      row.path.removeprefix("config."): operator.attrgetter(
        row.path.removeprefix("config.")
      )(config)
      for row in configs.describe(SuperHFConfig)
    }

  def changed(preset, base):
    old, new = values(base), values(preset)
    return {path: new[path] for path in new if new[path] != old[path]}

  assert changed("pythia-1b-repo", "pythia-1b") == {
    "optimizer.learning_rate": 1e-6,
    "sampling.top_p": 0.95,
    "inverse_loss_penalty": 0.01,
    "length_penalty": 0.01,
  }
  assert changed("pythia-1b-cs224n", "pythia-1b-repo") == {
    "steps": 500,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 20,
    "sampling.temperature": 0.9,
    "inverse_loss_penalty": 0.001,
  }
  # Defaults of trlX's RFTConfig; 32 samples are Table 2's as well.
  assert changed("rest", "pythia-1b") == {"superbatch.percentile": (0.7, 0.95)}
  assert changed("pythia-12b", "pythia-6.9b") == {
    "policy": "EleutherAI/pythia-12b",
    "optimizer.learning_rate": 1e-4,
    "kl_coefficient": 0.23,
  }
  assert changed("lab-collapse", "lab")["kl_coefficient"] == 0


def test_raft_is_the_released_script():
  """LMFlow's run_raft_align.sh: a top share of 0.125 is the best of eight."""
  config = load("superhf", "raft")
  batch = config.superbatch
  assert (batch.prompts, batch.samples_per_prompt, batch.keep) == (1024, 8, 1)
  assert batch.keep / batch.samples_per_prompt == 0.125
  assert (config.steps, config.sampling.temperature) == (20, 0.85)
  assert config.optimizer.learning_rate == 2e-5
  assert config.optimizer.schedule == "constant"
  assert not config.uses_reference


def test_best_of_n_is_superhf_in_one_pass():
  """One superbatch of all prompts, the best of each, nothing but its NLL."""
  config = load("best_of_n", "lab")
  batch = config.superbatch
  assert (config.algorithm, config.steps) == ("superhf", 1)
  assert (batch.mode, batch.keep) == ("single_pass", 1)
  assert batch.samples_per_prompt == config.evaluation.best_of_n
  assert not config.uses_reference
  assert config.inverse_loss_penalty == config.length_penalty == 0
  aside = config.evaluation.num_prompts
  groups = config.sampling.batch_prompts
  # Every call of the sampler has one shape.
  assert aside % groups == (config.num_prompts - aside) % groups == 0


def test_llama_7b_is_the_later_default():
  config = load("superhf", "llama-7b")
  batch = config.superbatch
  assert (batch.prompts, batch.samples_per_prompt, batch.keep) == (2, 16, 1)
  assert config.steps * batch.prompts == config.num_prompts == 10_000
  assert config.num_prompts_per_set * 4 == config.num_prompts
  assert config.kl_coefficient == 0.35
  assert config.uses_reference
  lora = config.lora
  assert (lora.rank, lora.alpha, lora.dropout) == (4, 32, 0.05)
  assert lora.targets == ("q_proj", "v_proj")
  assert config.optimizer.learning_rate == 2e-5
  assert config.optimizer.warmup_steps == 32
  assert config.sampling.truncation == "medium"
  assert config.batch_size == 2
  neox = load("superhf", "pythia-70m").lora
  assert neox.targets == ("query_key_value",)


def test_the_two_superhf_reward_models_share_no_rows():
  train = load("reward_model", "superhf-train")
  test = load("reward_model", "superhf-test")
  assert (train.half, test.half) == ("first", "second")
  assert train.policy == test.policy == "EleutherAI/gpt-neo-1.3B"
  assert train.head == "score_mean"
  assert train.optimizer.weight_decay == 0.001
  assert train.micro_batch * 4 == train.batch_size == 64


def test_superhf_baselines():
  feedme, instruct = load("sft", "feedme"), load("sft", "instruct")
  assert "hh-rlhf:helpful-base" in feedme.data
  assert instruct.data == "databricks/databricks-dolly-15k"
  for config in (feedme, instruct):
    assert config.loss_on == "all"
    assert (config.batch_size, config.micro_batch) == (8, 2)
    assert config.max_example_chars == 2048
    assert (config.steps, config.epochs) == (0, 1.0)
