"""What a policy is compared with, where it is found once and stored."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from jaxalign.build import session
from jaxalign.config import PreferenceConfig
from jaxalign.core.types import TextBatch
from jaxalign.errors import UserError
from jaxalign.runtime import stored
from jaxalign.runtime.context import Task
from jaxalign.runtime.stored import Stored


def find(
  config: PreferenceConfig, folder: pathlib.Path, task: Task
) -> Stored | None:
  """What is on disk already, from the file that the config names or this run.

  Returns:
    The log-probabilities, or None: they are to be found.

  Raises:
    UserError: no such file, or it lacks texts of the task.
  """
  place = _place(config, folder)
  if not place.is_file():
    if not config.reference_logps:
      return None
    raise UserError(
      f"config.reference_logps: {place}: no such file; check the path"
    )
  found = stored.read(place)
  missing, count = stored.lacking(found, _texts(task))
  if missing:
    pairs = ", seed, batch_size or steps" if config.algorithm == "kto" else ""
    raise UserError(
      f"{place} lacks {missing} of this run's {count} texts: it was made with "
      f"other data, another tokenizer, max_length or train_eos{pairs}; "
      f"{_remedy(config)}"
    )
  return found


def with_stored(
  config: PreferenceConfig,
  folder: pathlib.Path,
  policy: session.Policy,
  task: Task,
  found: Stored | None,
) -> Task:
  """The task, its texts with the reference's log-probabilities.

  Args:
    config: with its final number of steps.
    folder: the run's; what is found is written there.
    policy: before anything is trained.
    task: see `Task.texts`.
    found: of `find`.

  Raises:
    UserError: another model made what is on disk.
  """
  place = _place(config, folder)
  model, params = policy.reference
  if found is None:
    with contextlib.closing(session.open_folder(config, folder)):
      start = time.perf_counter()
      put = functools.partial(session.put_rows, policy.mesh)
      found = stored.measure(model, params, _texts(task), put)
      stored.write(place, found)
    seconds = time.perf_counter() - start
    print(f"{place}: reference of {len(found.logps)} texts, {seconds:.1f} s")
  else:
    wanted = stored.fingerprint(model, params)
    other = [name for name in wanted if found.model.get(name) != wanted[name]]
    if other:
      raise UserError(
        f"{place} was made by another reference than config.policy="
        f"{config.policy}: {' and '.join(other)} differ; {_remedy(config)}"
      )
  attach = functools.partial(stored.attach, found)
  return dataclasses.replace(
    task,
    batch=lambda step: attach(task.batch(step)),
    validation=tuple(attach(batch) for batch in task.validation),
  )


def _place(config: PreferenceConfig, folder: pathlib.Path) -> pathlib.Path:
  if config.reference_logps:
    return pathlib.Path(config.reference_logps).expanduser()
  return folder / stored.NAME


def _texts(task: Task) -> Iterator[TextBatch]:
  """All that a step or a validation of the task may hold."""
  held: Any = task.validation
  return itertools.chain(task.texts(), stored.texts_of(held))


def _remedy(config: PreferenceConfig) -> str:
  if config.reference_logps:
    return "leave out config.reference_logps to compute them anew"
  return "put these back as they were, or begin anew in another --workdir"
