"""The device programs of a described run; no parameter is read.

Each method's `setup.programs` lists its own. They are made by the code that the
run is made by, so what compiles here is what the run runs. Left out are
programs over single numbers, and the one that makes the first optimizer state.
"""

from collections.abc import Sequence
from typing import TypeVar

from jaxalign.config.sections import TrainingConfig
from jaxalign.parallel.program import Program
from jaxalign.setup.models import ModelSpec
from jaxalign.setup.spec import RunSpec
from jaxalign.training.recorder import share_due
from jaxalign.training.run import Evaluator, Run

C = TypeVar("C", bound=TrainingConfig)


def rollout_programs(spec: RunSpec[C], run: Run[C]) -> list[Program]:
  """What samples, scores and evaluates in a run that samples.

  Prompts have the length of the longest, texts to score that of the longest
  prompt and completion, in tokens of the policy.
  """
  rollout = spec.rollout
  assert rollout is not None
  config, steps = rollout.config, run.config.steps
  source = rollout.load(spec.policy.tokenizer, params_of=ModelSpec.shapes)
  params = run.policy_params(run.state)
  # A step's completions and their scores.
  tokens, samples = rollout.prompt_length, config.samples_per_prompt
  prompts = rollout.rows // samples
  found = source.generator.programs(params, prompts, tokens, samples)
  length = tokens + config.sampling.max_new_tokens
  texts = rollout.rows
  found += source.train_reward.programs("score reward_model", texts, length)
  if source.heldout_reward:
    name = "score test_reward_model"
    share = share_due(config.validation_interval, steps)
    found += [
      program.named(program.name, share)
      for program in source.heldout_reward.programs(name, texts, length)
    ]
  return found + evaluation_programs(run, rollout.evaluators(source))


def evaluation_programs(
  run: Run[C], evaluators: Sequence[Evaluator]
) -> list[Program]:
  """What the evaluators of a run run."""
  steps = run.config.steps
  params = run.policy_params(run.state)
  return [
    program.named(
      f"evaluate: {program.name}", share_due(evaluator.every or steps, steps)
    )
    for evaluator in evaluators
    for program in evaluator.programs(params)
  ]
