"""What each section and each method asks of its fields."""

import pytest

from jaxalign import config as configs
from jaxalign.algorithms import read_config


@pytest.mark.parametrize(
  ("mapping", "message"),
  [
    (
      {"superbatch": {"keep": 99}},
      "config.superbatch.keep must be in [1, samples_per_prompt=32], got 99; "
      "lower keep or raise samples_per_prompt",
    ),
    (
      {"superbatch": {"keep": 2, "percentile": (0.5,)}},
      "config.superbatch.keep must be left at 1 while percentile says what is "
      "kept, got 2; leave out keep, or percentile",
    ),
    (
      {"superbatch": {"percentile": (0.7, 0.8, 0.9)}},
      "config.superbatch.percentile must be empty, one number, or two: at the "
      "start and at the end, got (0.7, 0.8, 0.9); write 0.7,0.95",
    ),
    (
      {"superbatch": {"percentile": (70.0,)}},
      "config.superbatch.percentile must be in [0, 1], got (70.0,); the "
      "default is ()",
    ),
    (
      {"steps": True},
      "config.steps must be a whole number, got True (bool); write it like "
      "the default 200",
    ),
    (
      {"steps": 3.0},
      "config.steps must be a whole number, got 3.0 (float); write it like "
      "the default 200",
    ),
    (
      {"policy": 3},
      "config.policy must be a text, got 3 (int); write it like the default "
      "'lab'",
    ),
    (
      {"deduplicate": 1},
      "config.deduplicate must be true or false, got 1 (int); write it like "
      "the default True",
    ),
    (
      {"lora": {"targets": "q_proj"}},
      "config.lora.targets must be a list of texts, got 'q_proj' (str); write "
      "it like the default ()",
    ),
    (
      {"sampling": {"top_p": 0}},
      "config.sampling.top_p must be in (0, 1], got 0; the default is 1.0",
    ),
    (
      {"sampling": {"temperature": float("nan")}},
      "config.sampling.temperature must be > 0, got nan; the default is 1.0",
    ),
    (
      {"optimizer": {"learning_rate": float("inf")}},
      "config.optimizer.learning_rate must be > 0, got inf; the default is "
      "1e-05",
    ),
    (
      {"optimizer": {"schedule": "cosin"}},
      "config.optimizer.schedule must be one of constant, linear, cosine, got "
      "'cosin'; did you mean 'cosine'?",
    ),
    (
      {"mesh": 8},
      "config.mesh must be a section of fields, got 8; set one of "
      "config.mesh.{replica, fsdp, tensor, sequence, gather_for_generation, "
      "auto}",
    ),
    (
      {"mesh": {"fsdp": 0}},
      "config.mesh.fsdp must be >= 1, or -1 for the devices that are left, "
      "got 0; 1 is one device",
    ),
    (
      {"mesh": {"replica": -1, "tensor": -1}},
      "config.mesh.replica must be >= 1 while tensor is -1, got -1; only one "
      "axis can take what is left",
    ),
    (
      {"batch_size": 8, "micro_batch": 3},
      "config.micro_batch must be 0 or divide batch_size=8, got 3; "
      "gradients are added up over equal parts",
    ),
    (
      {"kl_coefficient": -0.5},
      "config.kl_coefficient must be >= 0, or -1 for no KL at all, got -0.5; "
      "0 computes and logs it without adding it to the loss",
    ),
    (
      {"profile_steps": "13:10"},
      "config.profile_steps must be empty or A:B with A < B, got '13:10'; "
      "write 10:13 for steps 10, 11 and 12",
    ),
    (
      {"profile_steps": "10:13", "steps": 10},
      "config.profile_steps must begin before the run's end at steps=10, got "
      "'10:13'; steps are counted from 0",
    ),
    (
      {"validation_interval": 5},
      "config.validation_interval must be 0 while test_reward_model is empty, "
      "got 5; name a test_reward_model or set the interval to 0",
    ),
    (
      {"sampling": {"length_buckets": (64, 32)}},
      "config.sampling.length_buckets must hold at least one length and grow, "
      "got (64, 32); write 64,128,256",
    ),
    (
      {"sampling": {"min_new_tokens": 65}},
      "config.sampling.min_new_tokens must be in [0, max_new_tokens=64], got "
      "65; lower it or raise max_new_tokens",
    ),
    (
      {"precision": {"params": "bfloat16"}},
      "config.precision.params must be 'float32' while lora.rank=0 trains "
      "every parameter, got 'bfloat16'; use lora.rank, or "
      "precision.compute='bfloat16'",
    ),
    (
      {"policy": "init"},
      "config.init.tokenizer must be a folder or a hub id while "
      "policy='init', got ''; a new model needs a vocabulary",
    ),
    (
      {"init": {"hidden_size": 30, "num_attention_heads": 4}},
      "config.init.hidden_size must be a multiple of num_attention_heads=4, "
      "got 30; take 32",
    ),
    (
      {"init": {"num_key_value_heads": 3}},
      "config.init.num_key_value_heads must divide num_attention_heads=4, got "
      "3; take 0 for as many",
    ),
    (
      {"policy": ""},
      "config.policy must name a model, got ''; give a hub id or a folder",
    ),
    (
      {"reward_model": " , "},
      "config.reward_model must name a model, got ' , '; give a hub id, a "
      "folder or lab",
    ),
    (
      {"prompts": ""},
      "config.prompts must name a source, got ''; lab is the smallest",
    ),
    (
      {
        "steps": 1,
        "superbatch": {"mode": "single_pass", "prompts": 0},
        "sampling": {"batch_prompts": 4},
        "optimizer": {"warmup_steps": 5},
      },
      "config.optimizer.warmup_steps must be 0 in superbatch.mode "
      "'single_pass', got 5; a warm-up begins with a rate of 0, so the only "
      "step would do nothing",
    ),
    (
      {"seed": -1},
      "config.seed must be in [0, 4294967296), got -1; the default is 0",
    ),
    (
      {"checkpoint": {"keep_best": "held_out"}},
      "config.checkpoint.keep_best must name a metric where no held-out reward "
      "is measured, got 'held_out'; set test_reward_model and "
      "validation_interval of a method that samples, or name a metric of "
      "metrics.jsonl",
    ),
    (
      {"checkpoint": {"keep": "best_held_out"}},
      "config.checkpoint.keep must be a whole number, got 'best_held_out' "
      "(str); did you mean config.checkpoint.keep_best=held_out?",
    ),
    (
      {"checkpoint": {"keep": 0}},
      "config.checkpoint.keep must be >= 1, got 0; the default is 2",
    ),
  ],
)
def test_a_broken_rule_names_path_rule_value_and_remedy(fail, mapping, message):
  assert fail(mapping) == message


@pytest.mark.parametrize(
  ("superbatch", "path"),
  [
    ({"mode": "single_prompt", "prompts": 2}, "config.superbatch.prompts"),
    (
      {"mode": "prompt_accumulation", "prompts": 0},
      "config.superbatch.prompts",
    ),
    ({"mode": "single_pass", "prompts": 4}, "config.superbatch.prompts"),
    (
      {"mode": "mixed_prompts", "prompts": 8, "samples_per_prompt": 2},
      "config.superbatch.samples_per_prompt",
    ),
    (
      {
        "mode": "mixed_prompts",
        "prompts": 8,
        "samples_per_prompt": 1,
        "keep": 9,
      },
      "config.superbatch.keep must be in [1, prompts=8], got 9",
    ),
  ],
)
def test_each_mode_has_its_rules(fail, superbatch, path):
  assert fail({"superbatch": superbatch}).startswith(path)


def test_single_pass_is_one_step_of_groups_of_prompts(fail):
  once = {"superbatch": {"mode": "single_pass", "prompts": 0}}
  assert fail(once).startswith("config.steps must be 1 in superbatch.mode")
  assert fail(once | {"steps": 1}).startswith("config.sampling.batch_prompts")
  config = read_config(
    {"algorithm": "superhf", "steps": 1, "sampling": {"batch_prompts": 4}}
    | once
  )
  assert config.superbatch.filters_per_prompt


@pytest.mark.parametrize(
  ("superbatch", "rows", "kept"),
  [
    ({"prompts": 4, "samples_per_prompt": 16, "keep": 2}, 64, 8),
    (
      {
        "mode": "mixed_prompts",
        "prompts": 32,
        "samples_per_prompt": 1,
        "keep": 3,
      },
      32,
      3,
    ),
    # All may pass a percentile: equal scores stay together.
    ({"prompts": 4, "samples_per_prompt": 16, "percentile": (0.9,)}, 64, 64),
  ],
)
def test_rows_and_kept_rows_follow_from_the_mode(superbatch, rows, kept):
  mapping = {"algorithm": "superhf", "superbatch": superbatch}
  found = read_config(mapping).superbatch
  assert (found.rows, found.kept_rows) == (rows, kept)


@pytest.mark.parametrize(
  ("kl", "uses_reference", "weight"),
  [(-1.0, False, 0.0), (0.0, True, 0.0), (0.3, True, 0.3)],
)
def test_the_reference_and_its_weight_follow_from_the_kl(
  kl, uses_reference, weight
):
  config = read_config({"algorithm": "superhf", "kl_coefficient": kl})
  assert config.kl_coefficient == kl
  assert config.uses_reference is uses_reference
  assert config.kl_weight == weight


@pytest.mark.parametrize("algorithm", ["superhf", "ppo"])
def test_the_best_by_held_out_is_smoothed(algorithm):
  mapping = {
    "algorithm": algorithm,
    "test_reward_model": "lab",
    "validation_interval": 2,
  }
  flags = [("checkpoint.keep_best", "held_out")]
  assert read_config(mapping, flags).best_metric == "test_score/recent"
  flags = [("checkpoint.keep_best", "test_score/mean")]
  assert read_config(mapping, flags).best_metric == "test_score/mean"
  assert read_config(mapping).best_metric == ""


def test_only_what_samples_has_a_held_out_reward(fail):
  wrong = {"checkpoint": {"keep_best": "held_out"}}
  assert fail(wrong, algorithm="dpo").startswith(
    "config.checkpoint.keep_best must name a metric"
  )


def test_reward_models_may_carry_weights():
  mapping = {"algorithm": "superhf", "reward_model": "a/b*0.5, runs/*/model,c"}
  assert read_config(mapping).reward_models == (
    ("a/b", 0.5),
    ("runs/*/model", 1.0),
    ("c", 1.0),
  )


def test_smoothing_belongs_to_two_losses(fail):
  wrong = {"loss": "ipo", "label_smoothing": 0.1}
  assert fail(wrong, algorithm="dpo") == (
    "config.label_smoothing must be 0 while loss='ipo', got 0.1; sigmoid and "
    "robust have it"
  )


def test_a_batch_of_one_has_no_mismatched_pair(fail):
  one = {"batch_size": 1}
  assert fail(one, algorithm="kto") == (
    "config.batch_size must be at least 2 while loss='kto', got 1; the KL is "
    "estimated on prompts with completions of other rows; raise it "
    "(micro_batch may stay 1) or use loss='apo_zero_unpaired'"
  )
  apo = {"algorithm": "kto", "loss": "apo_zero_unpaired"} | one
  assert read_config(apo).batch_size == 1


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_a_stored_reference_is_asked_for(fail, algorithm):
  wrong = {"reference_logps": "runs/a/reference.npz"}
  assert fail(wrong, algorithm=algorithm) == (
    "config.reference_logps must be empty while reference='auto', got "
    "'runs/a/reference.npz'; set reference='stored' to use it"
  )
  wrong = {"reference": "frozen_copy"}
  assert "one of auto, stored" in fail(wrong, algorithm=algorithm)


def test_supervised_rules(fail):
  assert fail({"batch_size": 8, "micro_batch": 3}, algorithm="sft") == (
    "config.micro_batch must be 0 or divide batch_size=8, got 3; gradients "
    "are added up over equal parts"
  )
  assert fail({"validation_interval": 3}, algorithm="sft").startswith(
    "config.validation_interval must be 0 while validation_data is empty"
  )
  assert fail({"epochs": 0}, algorithm="sft").startswith(
    "config.epochs must be > 0, got 0"
  )
  assert fail({"loss_on": "answer"}, algorithm="sft").startswith(
    "config.loss_on must be one of assistant, completion, all, got 'answer'"
  )


def test_reward_models_may_carry_groups():
  text = "a[x=0.7, y y=-1]*0.5, b [z=.5],c"
  config = read_config({"algorithm": "ppo", "reward_model": text})
  assert config.reward_models == (
    ("a[x=0.7, y y=-1]", 0.5),
    ("b [z=.5]", 1.0),
    ("c", 1.0),
  )
  read = [configs.parse_groups(name) for name, _ in config.reward_models]
  assert read == [
    ("a", {"x": 0.7, "y y": -1.0}),
    ("b", {"z": 0.5}),
    ("c", {}),
  ]
  assert configs.parse_groups("runs/a[1]/model") == ("runs/a[1]/model", {})


@pytest.mark.parametrize(
  "field", ["reward_model", "test_reward_model", "value_model"]
)
@pytest.mark.parametrize(
  "text", ["a[x=1,x=2]", "a[x]", "a[]", "a[x=1,]", "a[=1]", "a[x=1", "a[x=b]"]
)
def test_groups_have_one_weight_each(fail, field, text):
  assert fail({field: text}, algorithm="ppo") == (
    f"config.{field} must give each group in brackets one weight, got "
    f"{text!r}; write folder[alice=0.7,bob=0.3], without the brackets all "
    "count alike"
  )


def test_group_weights_are_looked_for_elsewhere(fail):
  assert "did you mean config.reward_model" in fail({"group_weights": "a=1"})


def test_reward_model_rules(fail):
  assert fail({"groups": ("a", "b")}, algorithm="reward_model") == (
    "config.groups must be empty while group_column is empty, got ('a', 'b'); "
    "name the column of the annotators"
  )
  for names in (("a",), ("a", "a")):
    wrong = {"groups": names, "group_column": "who"}
    assert fail(wrong, algorithm="reward_model").startswith(
      "config.groups must be empty or two names or more, none twice, got ("
    )
  uneven = {"loss": "distill", "batch_size": 8, "answers_per_prompt": 3}
  assert fail(uneven, algorithm="reward_model") == (
    "config.answers_per_prompt must divide the 8 rows of a pass while "
    "loss='distill', got 3; completions of one prompt are compared in one pass"
  )
  odd = {"batch_size": 8, "micro_batch": 1}
  assert fail(odd, algorithm="reward_model") == (
    "config.micro_batch must be even while loss='pairwise', got 1; a "
    "comparison is two rows of one pass"
  )
  new = {"policy": "init", "init": {"tokenizer": "folder"}}
  assert fail(new, algorithm="reward_model").startswith(
    "config.head must be named while policy='init', got 'auto'"
  )
  empty = {"loss": "both", "reward_column": ""}
  assert fail(empty, algorithm="reward_model").startswith(
    "config.reward_column must name a column while loss='both'"
  )
