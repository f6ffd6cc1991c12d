"""DPO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.data import PairData, load_data
from jaxalign.algorithms.dpo.train import PairMetrics, train
from jaxalign.setup.models import open_policy
from jaxalign.setup.reference import cached_reference
from jaxalign.setup.run import (
  RunSpec,
  check_rows,
  digest_of,
  finish,
  make_mesh,
  open_run,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOSpec(RunSpec[DPOConfig]):
  """A DPO run, its data included."""

  data: PairData


def describe(config: DPOConfig) -> DPOSpec:
  """Opens and checks what the config names; reads no parameter.

  Raises:
    UserError: anything that keeps the run from starting.
  """
  mesh = make_mesh(config.mesh)
  check_rows(config, mesh)
  policy = open_policy(config, mesh)
  model = policy.model.config
  data = load_data(
    config, policy.tokenizer, model.max_positions, model.hidden_size
  )
  micros = config.batch_size // config.micro_rows
  return DPOSpec(
    data.config,
    mesh,
    policy,
    # Two texts a pair, each at most so long.
    batch_shape=(micros, 2 * config.micro_rows, data.length),
    live_reference=config.reference == "auto",
    data=data,
    digest=digest_of(data.pairs),
  )


def run(spec: DPOSpec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    if data.validation_pairs:
      run.evaluators.append(PairMetrics(run, data.validation()))
    state = train(run, data)
  return finish(run, state, policy, folder)
