"""Online DPO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.dpo.online.config import OnlineDPOConfig
from jaxalign.algorithms.dpo.online.train import train
from jaxalign.algorithms.dpo.train import make_update, pair_programs
from jaxalign.feedback.judges import (
  PreferenceFunction,
  make_judge,
  open_judge,
)
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.scoring.function import digest_of_file
from jaxalign.setup.models import open_policy
from jaxalign.setup.programs import rollout_programs
from jaxalign.setup.rollout import describe_rollout
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import RunSpec, open_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOSpec(RunSpec[OnlineDPOConfig]):
  """An online DPO run, with the function that judges if there is one."""

  function: PreferenceFunction | None


def describe(config: OnlineDPOConfig, devices: Devices = None) -> OnlineDPOSpec:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  # The user's file runs before any model is opened: mistakes show early.
  function = open_judge(config.judge)
  policy = open_policy(config, open_mesh(config, devices))
  length = min(config.max_length, policy.model.config.max_positions)
  rollout = describe_rollout(config, policy)
  return OnlineDPOSpec(
    config,
    policy,
    batch_shape=(config.micro_batches, 2 * config.micro_rows, length),
    live_reference=True,
    rollout=rollout,
    rows=rollout.digest_rows,
    files=(
      *rollout.files,
      *([digest_of_file(config.judge)] if function else []),
    ),
    function=function,
  )


def programs(spec: OnlineDPOSpec) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  run = describe_run(spec, spec.policy.shapes())
  update = run.jit(make_update(run, run.config))
  return [
    *rollout_programs(spec, run),
    *pair_programs(update, spec.batch_shape),
  ]


def run(spec: OnlineDPOSpec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  assert spec.rollout is not None
  config = spec.config
  judge = make_judge(
    config.judge, spec.function, config.missing_eos_penalty, folder
  )
  policy = spec.policy.load()
  source = spec.rollout.load(spec.policy.tokenizer)
  with open_run(spec, policy, folder) as run:
    run.evaluators += spec.rollout.evaluators(source)
    state = train(run, source, judge)
  return finish(run, state, policy, folder)
