"""Reward models: from the config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import ScoredData, load_data
from jaxalign.algorithms.reward_model.evaluate import Agreement
from jaxalign.algorithms.reward_model.train import make_update
from jaxalign.errors import UserError
from jaxalign.setup.models import open_policy, with_groups, with_reward_notes
from jaxalign.setup.run import DataSpec, finish, open_mesh, open_run
from jaxalign.training.run import fit

Spec = DataSpec[RewardModelConfig, ScoredData]


def describe(config: RewardModelConfig) -> Spec:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config), config.head)
  if policy.model.config.head == "lm":
    print(
      f"{config.policy} is a language model: it gets a new score head, "
      "config.head=score_last"
    )
    policy = open_policy(config, policy.mesh, "score_last")
  model = policy.model.config
  if config.dropout and not hasattr(model, "dropout"):
    raise UserError(
      f"config.dropout={config.dropout} needs a DeBERTa, the policy is a "
      f"{model.module.__name__}; set it to 0, or use "
      "config.lora.dropout with adapters"
    )
  if config.dropout:
    dropping = policy.model.replace(dropout=config.dropout)
    policy = dataclasses.replace(policy, model=dropping)
  # Segments: only some models have them, and a causal one has no separator.
  encoding = config.encoding
  if encoding == "auto":
    apart = getattr(model, "type_vocab_size", 0) > 1
    encoding = "pair" if apart else "concat"
  if encoding == "pair" and not hasattr(model, "type_vocab_size"):
    raise UserError(
      f"config.encoding=pair: {config.policy} is a {model.module.__name__}, "
      "which would read a question and its answer without anything between "
      "them; give auto or concat"
    )
  config = dataclasses.replace(config, encoding=encoding)
  # The data come before the heads: they may name the groups.
  data = load_data(
    config, policy.tokenizer, model.max_positions, model.head, model.groups
  )
  return DataSpec(
    data.config,
    with_groups(policy, data.config.groups),
    batch_shape=(config.micro_batches, config.micro_rows, data.length),
    rows=data.rows,
    data=data,
  )


def run(spec: Spec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  policy = spec.policy.load()
  with open_run(spec, policy, folder) as run:
    if spec.data.validation:
      run.evaluators.append(Agreement(run, spec.data.validation))
    state = fit(run, spec.data, make_update(run))
  # The model remembers how it has to be read.
  tokenizer = with_reward_notes(spec.policy.tokenizer, spec.config)
  policy = dataclasses.replace(policy, tokenizer=tokenizer)
  return finish(run, state, policy, folder)
