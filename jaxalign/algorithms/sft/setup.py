"""SFT: from its config to a finished run."""

import pathlib

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.algorithms.sft.data import SFTData, load_data
from jaxalign.algorithms.sft.train import Perplexity, make_update
from jaxalign.data.packing import blank
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.setup.models import open_policy
from jaxalign.setup.programs import evaluation_programs
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import DataSpec, open_mesh
from jaxalign.training.run import Evaluator, Run, fit


def describe(
  config: SFTConfig, devices: Devices = None
) -> DataSpec[SFTConfig, SFTData]:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  policy = open_policy(config, open_mesh(config, devices))
  context = policy.model.config.max_positions
  data = load_data(config, policy.tokenizer, context)
  return DataSpec(
    data.config,
    policy,
    batch_shape=(config.micro_batches, config.micro_rows, data.length),
    rows=data.rows,
    data=data,
  )


def programs(spec: DataSpec[SFTConfig, SFTData]) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  run = describe_run(spec, spec.policy.shapes())
  update = run.jit(make_update(run)).program(blank(spec.batch_shape))
  return [update, *evaluation_programs(run, evaluators(run, spec.data))]


def evaluators(run: Run[SFTConfig], data: SFTData) -> list[Evaluator]:
  """Those of a run that has held-out rows."""
  return [Perplexity(run, data.validation)] if data.validation else []


def run(spec: DataSpec[SFTConfig, SFTData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  policy = spec.policy.load()
  with open_run(spec, policy, folder) as run:
    run.evaluators += evaluators(run, spec.data)
    state = fit(run, spec.data, make_update(run))
  return finish(run, state, policy, folder)
