"""DPO: from its config to a finished run."""

import dataclasses
import pathlib

from jaxalign.algorithms.dpo.config import DPOConfig
from jaxalign.algorithms.dpo.data import PairData, blank_pairs, load_data
from jaxalign.algorithms.dpo.train import (
  PairMetrics,
  make_update,
  pair_programs,
)
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
  config: DPOConfig, devices: Devices = None
) -> DataSpec[DPOConfig, PairData]:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  policy = open_policy(config, open_mesh(config, devices))
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


def programs(spec: DataSpec[DPOConfig, PairData]) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  run, data = describe_run(spec, spec.policy.shapes()), spec.data
  found, cache = [], None
  if not spec.live_reference:
    cache = reference_cache.blank()
    data = dataclasses.replace(data, reference=cache)
    # Before the first step, in passes of the size of a micro-batch.
    text = blank_pairs((1, *spec.batch_shape[1:]))
    count = len(data.pairs) + len(data.validation_pairs)
    batches = -(-count // run.config.micro_rows)  # rounded up
    found.append(reference_program(run, text, batches))
  update = run.jit(make_update(run, run.config))
  return [
    *found,
    *pair_programs(update, spec.batch_shape, cache),
    *evaluation_programs(run, evaluators(run, data)),
  ]


def evaluators(run: Run[DPOConfig], data: PairData) -> list[Evaluator]:
  """Those of a run that has held-out pairs."""
  if not data.validation_pairs:
    return []
  return [PairMetrics(run, data.validation())]


def run(spec: DataSpec[DPOConfig, PairData], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  data = spec.data
  # The reference first: it is the policy before any update.
  policy, cache = cached_reference(spec, folder, data.all_batches)
  data = dataclasses.replace(data, reference=cache)
  with open_run(spec, policy, folder) as run:
    run.evaluators += evaluators(run, data)
    state = fit(run, data, make_update(run, run.config))
  return finish(run, state, policy, folder)
