"""KTO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledData, blank_batch, load_data
from jaxalign.algorithms.kto.evaluate import LabelledMetrics
from jaxalign.algorithms.kto.train import make_update
from jaxalign.data.packing import blank
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.setup.models import open_policy
from jaxalign.setup.programs import evaluation_programs
from jaxalign.setup.reference import cached_reference, reference_program
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import DataSpec, open_mesh
from jaxalign.training import reference_cache
from jaxalign.training.run import Evaluator, Run, fit


def describe(
  config: KTOConfig, devices: Devices = None
) -> DataSpec[KTOConfig, LabelledData]:
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
    live_reference=config.reference == "auto",
    rows=data.rows,
    data=data,
  )


def programs(spec: DataSpec[KTOConfig, LabelledData]) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  run, data = describe_run(spec, spec.policy.shapes()), spec.data
  config, found = run.config, []
  mismatched = config.loss == "kto"
  batch = blank_batch(spec.batch_shape, mismatched=mismatched)
  if not spec.live_reference:
    cache = reference_cache.blank()
    data, batch = (
      dataclasses.replace(data, reference=cache),
      cache.attach(batch),
    )
    # Before the first step: all rows, and every step's mismatched pairs.
    count = len(data.rows) + len(data.validation_rows)
    count += config.steps * config.batch_size * mismatched
    batches = -(-count // config.micro_rows)  # rounded up
    text = blank((1, *spec.batch_shape[1:]))
    found.append(reference_program(run, text, batches))
  return [
    *found,
    run.jit(make_update(run)).program(batch),
    *evaluation_programs(run, evaluators(run, data)),
  ]


def evaluators(run: Run[KTOConfig], data: LabelledData) -> list[Evaluator]:
  """Those of a run that has held-out rows."""
  if not data.validation_rows:
    return []
  return [LabelledMetrics(run, data.validation())]


def run(spec: DataSpec[KTOConfig, LabelledData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    run.evaluators += evaluators(run, data)
    state = fit(run, data, make_update(run))
  return finish(run, state, policy, folder)
