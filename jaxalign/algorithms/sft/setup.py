"""SFT: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.data import SFTData, load_data
from jaxalign.algorithms.sft.train import Perplexity, train
from jaxalign.setup.models import open_policy
from jaxalign.setup.run import (
  RunSpec,
  check_rows,
  digest_of,
  finish,
  make_mesh,
  open_run,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSpec(RunSpec[SFTConfig]):
  """An SFT run, its data included."""

  data: SFTData


def describe(config: SFTConfig) -> SFTSpec:
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
  return SFTSpec(
    data.config,
    mesh,
    policy,
    batch_shape=(micros, config.micro_rows, data.length),
    data=data,
    digest=digest_of(data.rows),
  )


def run(spec: SFTSpec, folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  policy = spec.policy.load()
  with open_run(spec, policy, folder) as run:
    if spec.data.validation:
      run.evaluators.append(Perplexity(run, spec.data.validation))
    state = train(run, spec.data)
  return finish(run, state, policy, folder)
