"""A reference that is run once, before training, and kept in a file."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from jaxtyping import PyTree

from jaxalign.config.supervised import PreferenceConfig
from jaxalign.core.types import TextBatch
from jaxalign.errors import UserError
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program
from jaxalign.setup.folder import open_workdir
from jaxalign.setup.models import Loaded
from jaxalign.setup.run import reference_of
from jaxalign.setup.spec import RunSpec
from jaxalign.training import reference_cache
from jaxalign.training.reference_cache import ReferenceCache
from jaxalign.training.run import Run

C = TypeVar("C", bound=PreferenceConfig)


def reference_program(run: Run[C], text: TextBatch, batches: int) -> Program:
  """The pass of a stored reference over the texts of a run.

  Args:
    run: described; the reference has its parameters before they are trained.
    text: a numpy batch of the largest shape.
    batches: to go over before the first step.
  """
  model, params = reference_of(run.model, run.policy_params(run.state))
  arguments = params, meshes.row_shapes(text, run.mesh)
  calls = batches / max(run.config.steps, 1)
  function = reference_cache.compile_logps(model, run.mesh)
  return Program("reference", function, arguments, calls)


def cached_reference(
  spec: RunSpec[C],
  folder: pathlib.Path,
  batches: Callable[[], Iterable[PyTree]],
) -> tuple[Loaded, ReferenceCache | None]:
  """Loads the policy, and finds or computes the reference's log-probs.

  Args:
    spec: of the run.
    folder: the run's; what is computed is written there.
    batches: gives numpy batches of every text of the run.

  Returns:
    The policy, and None where the reference is live.

  Raises:
    UserError: the file that the config names does not fit the run.
  """
  config = spec.config
  if config.reference == "auto":
    return spec.policy.load(), None
  # A file that exists: one that the config names, or the run's own.
  path = folder / reference_cache.NAME
  if config.reference_logps:
    path = pathlib.Path(config.reference_logps).expanduser()
    if not path.is_file():
      raise UserError(
        f"config.reference_logps: {path}: no such file; check the path"
      )
  # Checked before the policy's parameters are read. The lead looks, because it
  # will write the file.
  if hosts.from_lead(path.is_file, False):
    cache = reference_cache.read(path)
    remedy = "restore these, or start again in another --workdir"
    if config.reference_logps:
      remedy = "leave out config.reference_logps to compute them again"
    # The texts: KTO's mismatched pairs also depend on how rows are drawn.
    missing, count = cache.count_missing(batches())
    if missing:
      pairs = ", seed, batch_size or steps" if config.algorithm == "kto" else ""
      raise UserError(
        f"{path} lacks {missing} of this run's {count} texts: it was made with "
        "other data, another tokenizer, max_length or "
        f"train_eos{pairs}; {remedy}"
      )
    # The model that computed the log-probs.
    wanted = spec.policy.fingerprint()
    other = [name for name in wanted if cache.model.get(name) != wanted[name]]
    if other:
      raise UserError(
        f"{path} was made by another reference than config.policy="
        f"{config.policy}: {' and '.join(other)} differ; {remedy}"
      )
    return spec.policy.load(), cache

  # Run the policy, before it is trained, over every text.
  policy = spec.policy.load()
  with contextlib.closing(open_workdir(config, folder)):
    start = time.perf_counter()
    model, params = reference_of(policy.model, policy.params)
    cache = reference_cache.precompute(
      model, params, batches(), spec.mesh, spec.policy.fingerprint()
    )
    reference_cache.write(path, cache)
  seconds = time.perf_counter() - start
  print(f"{path}: reference of {len(cache.logps)} texts, {seconds:.1f} s")
  return policy, cache
