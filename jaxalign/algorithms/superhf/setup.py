"""SuperHF: from its config to a finished run."""

import pathlib

from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.algorithms.superhf.data import blank_batch, update_shape
from jaxalign.algorithms.superhf.train import make_update, train
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.setup.models import open_policy
from jaxalign.setup.programs import rollout_programs
from jaxalign.setup.rollout import describe_rollout
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import RunSpec, open_mesh


def describe(
  config: SuperHFConfig, devices: Devices = None
) -> RunSpec[SuperHFConfig]:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  policy = open_policy(config, open_mesh(config, devices, fills_rows=True))
  size, micro = update_shape(config, policy.mesh)
  length = min(config.max_length, policy.model.config.max_positions)
  rollout = describe_rollout(config, policy)
  return RunSpec(
    config,
    policy,
    batch_shape=(size // micro, micro, length),
    live_reference=config.uses_reference,
    rollout=rollout,
    rows=rollout.digest_rows,
    files=rollout.files,
  )


def programs(spec: RunSpec[SuperHFConfig]) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  assert spec.rollout is not None
  run, superbatch = (
    describe_run(spec, spec.policy.shapes()),
    spec.config.superbatch,
  )
  # Where all prompts are one superbatch, only the prompts say what is kept.
  kept = superbatch.kept_rows or superbatch.keep * len(spec.rollout.prompts)
  micros, rows, _ = spec.batch_shape
  updates = -(-kept // (micros * rows))  # rounded up
  update = run.jit(make_update(run))
  return [
    *rollout_programs(spec, run),
    update.program(blank_batch(spec.batch_shape), updates),
  ]


def run(spec: RunSpec[SuperHFConfig], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  assert spec.rollout is not None
  policy = spec.policy.load()
  source = spec.rollout.load(spec.policy.tokenizer)
  with open_run(spec, policy, folder) as run:
    run.evaluators += spec.rollout.evaluators(source)
    state = train(run, source)
  return finish(run, state, policy, folder)
