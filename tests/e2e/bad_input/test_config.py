"""Configs and data that do not fit."""

import json

import pytest


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"reward_model": "POLICY"}, ("config.reward_model", "score head")),
    ({"policy": "REWARD"}, ("head 'lm' does not exist for deberta-v2",)),
    (
      {"lora__rank": 2, "lora__targets": "q_proj"},
      ("lora.targets", "q_proj", "query_key_value"),
    ),
    (
      {"mesh__fsdp": 3},
      ("config.mesh", "1 x 3 x 1 x 1 = 3 devices", "lower one"),
    ),
    ({"metrics__wandb": "true"}, ("config.metrics.wandb", "not installed")),
    ({"sampling__max_new_tokens": 128}, ("below the policy's context of 128",)),
    (
      {"max_prompt_chars": 9},
      ("none of 24 rows", "config.max_prompt_chars"),
    ),
    (
      {"evaluation__interval": 1},
      ("config.evaluation.num_prompts keeps 64", "gives 24"),
    ),
    (
      {"sampling__max_new_tokens": 120},
      ("24 of 24 prompts", "more than 8 tokens", "context of 128", "What does"),
    ),
    (
      {"max_length": 10},
      (
        "24 of 24 prompts",
        "more than 9 tokens (config.max_length=10",
      ),
    ),
    ({"steps": "many"}, ("config.steps must be a whole number, got 'many'",)),
    ({"superbatch__keep": 9}, ("must be in [1, samples_per_prompt=4], got 9",)),
    ({"sampling__top_q": 1}, ("did you mean config.sampling.top_p",)),
  ],
  ids=str,
)
def test_a_config_that_does_not_fit(changes, words, lab, superhf, run, fail):
  paths = {"POLICY": lab.policy, "REWARD": lab.reward}
  changes = {k: paths.get(v, v) for k, v in changes.items()}
  line = fail(superhf(run, **changes))
  for word in words:
    assert word in line


@pytest.mark.parametrize(
  ("config", "changes", "words"),
  [
    (
      "reward_model.py",
      {"head": "score_context", "policy": "init"},
      ("config.init: head 'score_context' does not exist for gpt_neox",),
    ),
    (
      "sft.py",
      {"policy": "init", "init.model_type": "deberta-v2"},
      ("config.init: head 'lm' does not exist for deberta-v2",),
    ),
    (
      "sft.py",
      {"policy": "init", "lora.rank": 2, "lora.targets": "dense"},
      ("config.lora.rank must be 0 while policy='init', got 2",),
    ),
  ],
  ids=str,
)
def test_a_head_that_does_not_fit(
  config, changes, words, lab, supervised, run, fail
):
  fields = {
    "policy": lab.policy,
    "data": lab.pairs if config == "reward_model.py" else lab.rows,
    "init.tokenizer": lab.policy,
  }
  line = fail(supervised(config, run, **(fields | changes)))
  for word in words:
    assert word in line


def test_dropout_where_the_model_has_none(lab, supervised, run, fail):
  argv = supervised(
    "reward_model.py", run, policy=lab.policy, data=lab.pairs, dropout=0.1
  )
  line = fail([*argv, "--config.head=score_last"])
  assert "config.dropout=0.1 needs a DeBERTa, the policy is a NeoX" in line
  assert "config.lora.dropout" in line


def test_only_the_long_prompts_count(superhf, run, fail, tmp_path):
  rows = [{"prompt": "Hi"}, {"prompt": "Why?" * 60}, {"prompt": "q" * 90}]
  path = tmp_path / "mine.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  line = fail(superhf(run, prompts=path))
  assert f"config.prompts: 2 of 3 prompts from {path}" in line
  assert "lower config.max_prompt_chars, which is 300" in line


GOOD = '{"prompt": "a", "completion": "b"}\n'
DATA = {
  "no such file": (None, ("no such file; check the path",)),
  "empty": ("", ("holds no rows; give a source with data",)),
  "no JSON": (
    GOOD + "\n" + "{'prompt'}\n" + GOOD,
    ("mine.jsonl:3 is not JSON", "1 of 3 rows", "raise the limit"),
  ),
  "no object": ("[1]\n", ("mine.jsonl:1 is a JSON list",)),
  "other columns": (
    '{"instruction": "a", "output": "b"}\n',
    ("has the columns (instruction, output), need", "Alpaca"),
  ),
  "a number": (
    '{"prompt": 3, "completion": "b"}\n',
    ("mine.jsonl:1 has a int in prompt, need a string",),
  ),
  "empty answers": (
    '{"prompt": "a", "completion": " "}\n',
    ("nothing is left of 1 rows (1 empty, 0 bad)",),
  ),
  "long prompts": (
    json.dumps({"prompt": "a" * 300, "completion": "b"}),
    ("no row is left of 1 (1 without room for", "in 96 tokens", "_length"),
  ),
}


@pytest.mark.parametrize("name", ["data", "validation_data"])
@pytest.mark.parametrize(("text", "words"), DATA.values(), ids=DATA)
def test_bad_data(name, text, words, lab, supervised, run, fail, tmp_path):
  path = tmp_path / "mine.jsonl"
  if text is not None:
    path.write_text(text)
  sources = {"data": lab.rows} | {name: path}
  argv = supervised("sft.py", run, policy=lab.policy, **sources)
  line = fail(argv)
  for word in (str(path), *words):
    assert word in line


@pytest.mark.parametrize("case", ["no such file", "empty", "no JSON"])
def test_bad_prompts(case, superhf, run, fail, tmp_path):
  text, words = DATA[case]
  path = tmp_path / "mine.jsonl"
  if text is not None:
    path.write_text(text)
  line = fail(superhf(run, prompts=path))
  for word in (str(path), *words):
    assert word in line
