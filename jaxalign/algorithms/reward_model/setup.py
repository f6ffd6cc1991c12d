"""Reward models: from the config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.algorithms.reward_model.data import (
  ScoredData,
  blank_batch,
  load_data,
)
from jaxalign.algorithms.reward_model.evaluate import Agreement
from jaxalign.algorithms.reward_model.train import make_update
from jaxalign.errors import UserError
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.setup.models import open_policy, with_groups, with_reward_notes
from jaxalign.setup.programs import evaluation_programs
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import DataSpec, open_mesh
from jaxalign.training.run import Evaluator, Run, fit

Spec = DataSpec[RewardModelConfig, ScoredData]


def describe(config: RewardModelConfig, devices: Devices = None) -> Spec:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  policy = open_policy(config, open_mesh(config, devices), config.head)
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
    config,
    policy.tokenizer,
    model.max_positions,
    model.head,
    model.groups,
    meshes.row_count(policy.mesh),
  )
  return DataSpec(
    data.config,
    with_groups(policy, data.config.groups),
    batch_shape=(config.micro_batches, config.micro_rows, data.length),
    rows=data.rows,
    data=data,
  )


def programs(spec: Spec) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  run = describe_run(spec, spec.policy.shapes())
  several_heads = bool(run.model.config.groups)
  batch = blank_batch(spec.batch_shape, several_heads=several_heads)
  update = run.jit(make_update(run)).program(batch)
  return [update, *evaluation_programs(run, evaluators(run, spec.data))]


def evaluators(
  run: Run[RewardModelConfig], data: ScoredData
) -> list[Evaluator]:
  """Those of a run that has held-out rows."""
  return [Agreement(run, data.validation)] if data.validation else []


def run(spec: Spec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  policy = spec.policy.load()
  with open_run(spec, policy, folder) as run:
    run.evaluators += evaluators(run, spec.data)
    state = fit(run, spec.data, make_update(run))
  # The model remembers how it has to be read.
  tokenizer = with_reward_notes(spec.policy.tokenizer, spec.config)
  policy = dataclasses.replace(policy, tokenizer=tokenizer)
  return finish(run, state, policy, folder)
