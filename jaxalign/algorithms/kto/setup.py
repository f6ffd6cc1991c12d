"""KTO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledData, load_data
from jaxalign.algorithms.kto.evaluate import LabelledMetrics
from jaxalign.algorithms.kto.train import train
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
class KTOSpec(RunSpec[KTOConfig]):
  """A KTO run, its data included."""

  data: LabelledData


def describe(config: KTOConfig) -> KTOSpec:
  """Opens and checks what the config names; reads no parameter.

  Raises:
    UserError: anything that keeps the run from starting.
  """
  mesh = make_mesh(config.mesh)
  check_rows(config, mesh)
  policy = open_policy(config, mesh)
  context = policy.model.config.max_positions
  data = load_data(config, policy.tokenizer, context)
  micros = config.batch_size // config.micro_rows
  return KTOSpec(
    data.config,
    mesh,
    policy,
    batch_shape=(micros, config.micro_rows, data.length),
    live_reference=config.reference == "auto",
    data=data,
    digest=digest_of(data.rows),
  )


def run(spec: KTOSpec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    if data.validation_rows:
      run.evaluators.append(LabelledMetrics(run, data.validation()))
    state = train(run, data)
  return finish(run, state, policy, folder)
