"""SFT: from its config to a finished run."""

import pathlib

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.data import SFTData, load_data
from jaxalign.algorithms.sft.train import Perplexity, make_update
from jaxalign.setup.models import open_policy
from jaxalign.setup.run import DataSpec, finish, open_mesh, open_run
from jaxalign.training.run import fit


def describe(config: SFTConfig) -> DataSpec[SFTConfig, SFTData]:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config))
  context = policy.model.config.max_positions
  data = load_data(config, policy.tokenizer, context)
  return DataSpec(
    data.config,
    policy,
    batch_shape=(config.micro_batches, config.micro_rows, data.length),
    rows=data.rows,
    data=data,
  )


def run(spec: DataSpec[SFTConfig, SFTData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  policy = spec.policy.load()
  with open_run(spec, policy, folder) as run:
    if spec.data.validation:
      run.evaluators.append(Perplexity(run, spec.data.validation))
    state = fit(run, spec.data, make_update(run))
  return finish(run, state, policy, folder)
