"""Which prompts are trained on and which are kept aside."""

import json

import pytest

from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.config.online import EvaluationConfig
from jaxalign.data.rows import PromptRow
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.setup.models import ModelSpec
from jaxalign.setup.rewards import check_messages
from jaxalign.setup.rollout import (
  RolloutSpec,
  split_prompts,
)
from jaxalign.training.rollout import RolloutSource


@pytest.fixture
def split(word_tokenizer, tmp_path):
  """(prompts, kept aside) -> both parts; copies of a prompt are allowed."""

  def run(prompts, aside, interval=1):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    config = SuperHFConfig(
      prompts=str(path),
      deduplicate=False,
      holdout=-1,
      evaluation=EvaluationConfig(interval=interval, num_prompts=aside),
    )
    train, kept_aside, *_ = split_prompts(
      config, word_tokenizer("abcdef"), 1024
    )
    return [[row.prompt for row in part] for part in (train, kept_aside)]

  return run


PROMPTS = [f"What is {letter}?" for letter in "abcdef"] * 3


def test_a_copy_of_a_prompt_kept_aside_is_not_trained_on(split):
  train, aside = split(PROMPTS, 2)
  assert len(aside) == 2
  assert not set(train) & set(aside)
  assert set(train) | set(aside) == set(split(PROMPTS, 0)[0])


def test_nothing_left_to_train_on(split):
  with pytest.raises(UserError, match="no prompt but the 1 that are"):
    split(["What is a?"] * 3, 1)


def test_without_an_interval_nothing_is_kept_aside_or_evaluated(split):
  train, aside = split(PROMPTS, 2, interval=0)
  assert len(train) == len(PROMPTS)
  assert aside == []
  model = Model.build(NeoXConfig(8, 8, 1, 1, 8, max_positions=8))
  config = SuperHFConfig(evaluation=EvaluationConfig(interval=0))
  spec = RolloutSpec(config, model, meshes.make_mesh(), (), (), 8, (), ())
  source = RolloutSource.__new__(RolloutSource)  # not looked at
  assert spec.evaluators(source) == []


def test_role_lists_that_a_reward_model_cannot_write(word_tokenizer):
  model = Model.build(NeoXConfig(8, 8, 1, 1, 8, head="score_last"))
  spec = ModelSpec(
    model, word_tokenizer("ab"), meshes.make_mesh(), None, encoding="concat"
  )
  said = {"role": "user", "content": "a"}
  system = {"role": "system", "content": "b"}
  check_messages(spec, [PromptRow("x", messages=(system, said))])
  for turn in (
    {"role": "developer", "content": "b"},
    {"role": "system", "content": [{"type": "text", "text": "b"}]},
    {"role": "user", "content": [{"type": "text", "text": "b"}]},
  ):
    with pytest.raises(UserError, match="cannot be given; need text by system"):
      check_messages(spec, [PromptRow("x", messages=(turn, said))])
