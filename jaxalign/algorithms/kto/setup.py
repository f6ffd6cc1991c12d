"""KTO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledData, load_data
from jaxalign.algorithms.kto.evaluate import LabelledMetrics
from jaxalign.algorithms.kto.train import make_update
from jaxalign.setup.models import open_policy
from jaxalign.setup.reference import cached_reference
from jaxalign.setup.run import DataSpec, finish, open_mesh, open_run
from jaxalign.training.run import fit


def describe(config: KTOConfig) -> DataSpec[KTOConfig, LabelledData]:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config))
  context = policy.model.config.max_positions
  data = load_data(config, policy.tokenizer, context)
  return DataSpec(
    data.config,
    policy,
    batch_shape=(config.micro_batches, config.micro_rows, data.length),
    live_reference=config.reference == "auto",
    rows=data.rows,
    data=data,
  )


def run(spec: DataSpec[KTOConfig, LabelledData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    if data.validation_rows:
      run.evaluators.append(LabelledMetrics(run, data.validation()))
    state = fit(run, data, make_update(run))
  return finish(run, state, policy, folder)
