"""DPO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.data import PairData, load_data
from jaxalign.algorithms.dpo.train import PairMetrics, make_update
from jaxalign.setup.models import open_policy
from jaxalign.setup.reference import cached_reference
from jaxalign.setup.run import DataSpec, finish, open_mesh, open_run
from jaxalign.training.run import fit


def describe(config: DPOConfig) -> DataSpec[DPOConfig, PairData]:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config))
  model = policy.model.config
  data = load_data(
    config, policy.tokenizer, model.max_positions, model.hidden_size
  )
  return DataSpec(
    data.config,
    policy,
    # Two texts a pair, each at most so long.
    batch_shape=(config.micro_batches, 2 * config.micro_rows, data.length),
    live_reference=config.reference == "auto",
    rows=data.pairs,
    data=data,
  )


def run(spec: DataSpec[DPOConfig, PairData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    if data.validation_pairs:
      run.evaluators.append(PairMetrics(run, data.validation()))
    state = fit(run, data, make_update(run, run.config))
  return finish(run, state, policy, folder)
