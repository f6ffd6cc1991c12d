"""SuperHF: from its config to a finished run."""

import pathlib

from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.algorithms.superhf.data import update_shape
from jaxalign.algorithms.superhf.train import train
from jaxalign.setup.models import open_policy
from jaxalign.setup.rollout import describe_rollout
from jaxalign.setup.run import RunSpec, finish, open_mesh, open_run


def describe(config: SuperHFConfig) -> RunSpec[SuperHFConfig]:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config, fills_rows=True))
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


def run(spec: RunSpec[SuperHFConfig], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  assert spec.rollout is not None
  policy = spec.policy.load()
  source = spec.rollout.load(policy)
  with open_run(spec, policy, folder) as run:
    run.evaluators += spec.rollout.evaluators(source)
    state = train(run, source)
  return finish(run, state, policy, folder)
