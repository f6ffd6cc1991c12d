"""Which prompts are trained on and which are kept aside."""

import json

import pytest

from jaxalign.build.questions import load_questions
from jaxalign.config import SuperHFConfig
from jaxalign.config.stages import EvaluationConfig
from jaxalign.errors import UserError


@pytest.fixture
def load(word_tokenizer, tmp_path):
  """(prompts, kept aside) -> `Questions`; copies of a prompt are allowed."""

  def run(prompts, aside):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    config = SuperHFConfig(
      prompts=str(path),
      deduplicate=False,
      holdout=-1,
      evaluation=EvaluationConfig(interval=1, num_prompts=aside),
    )
    return load_questions(config, word_tokenizer("abcdef"), 1024)

  return run


def test_a_copy_of_a_prompt_kept_aside_is_not_trained_on(load):
  asked = [f"What is {letter}?" for letter in "abcdef"] * 3
  found = load(asked, 2)
  assert len(found.aside) == 2
  assert not set(found.train) & set(found.aside)
  assert set(found.train) | set(found.aside) == set(load(asked, 0).train)


def test_nothing_left_to_train_on(load):
  with pytest.raises(UserError, match="again and again and no other"):
    load(["What is a?"] * 3, 1)
