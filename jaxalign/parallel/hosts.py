"""What the processes of a run, one per host, have to agree on.

All processes must call these functions, in the same order, because they wait
for each other; only `is_lead` may be called anywhere. With one process they
return at once and touch no device.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the only barrier with a time limit
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxalign.errors import StepError, UserError

T = TypeVar("T")


def is_lead() -> bool:
  """Whether this process writes the run's files and measures its times."""
  return jax.process_index() == 0


def broadcast(x: T) -> T:
  """The lead's value, on all processes.

  Args:
    x: a number, a numpy array or a tree of them; the lead's shapes and dtypes
      on every process.

  Returns:
    The same tree; numbers stay Python numbers.
  """
  if jax.process_count() == 1:
    return x

  # `gather` turned Python numbers into arrays; they are turned back.
  def lead_value(leaf: PyTree, rows: np.ndarray) -> PyTree:
    return rows[0] if isinstance(leaf, np.ndarray) else rows[0].item()

  return jax.tree.map(lead_value, x, gather(x))


def from_lead(make: Callable[[], T], like: T) -> T:
  """What `make` gives on the lead, the only process that calls it.

  Args:
    make: asks a person, calls a user's function, reads a changing file.
    like: a value of the same types, shapes and dtypes.

  Raises:
    Exception: on the lead what `make` raised; on the others, instead of waiting
      for ever, a `UserError` or `StepError` where the lead has one, else a
      `RuntimeError`.
  """
  made, error = like, None
  if is_lead():
    try:
      made = make()
    except Exception as raised:
      error = raised
  # The failure is shared first: no process then waits for a value. Its kind
  # as well, so that all of them go on after it or none.
  failed, mistake, of_step = broadcast(
    (
      error is not None,
      isinstance(error, UserError),
      isinstance(error, StepError),
    )
  )
  if error is not None:
    raise error
  if failed:
    kind = UserError if mistake else RuntimeError
    raise (StepError if of_step else kind)(
      "the lead process failed; its log says why"
    )
  return broadcast(made)


def agree(flag: bool) -> bool:
  """True on all processes if `flag` is True on any, e.g. a request to stop."""
  return flag if jax.process_count() == 1 else bool(gather(flag).any())


def gather(x: PyTree) -> PyTree:
  """The values of all processes; for small values only.

  Args:
    x: a number, a numpy array or a tree of them; of the same shapes and dtypes
      on every process.

  Returns:
    The same tree of numpy arrays `[processes, ...]`, in the processes' order.
  """
  count = jax.process_count()
  x = jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), x)
  if count == 1:
    return jax.tree.map(lambda leaf: leaf[None], x)
  # As bytes: by default jax cuts 64-bit numbers to 32 bits on the devices.
  sent = jax.tree.map(lambda leaf: leaf.reshape(-1).view(np.uint8), x)
  with jax.transfer_guard("allow"):
    found = multihost_utils.process_allgather(sent)
  return jax.tree.map(
    lambda leaf, rows: rows.view(leaf.dtype).reshape(count, *leaf.shape),
    x,
    found,
  )


def barrier(name: str, seconds: int | float) -> None:
  """Waits until every process is here.

  Args:
    name: of the place in the program, the same on every process.
    seconds: how long to wait at most.

  Raises:
    TimeoutError: a process did not come in time.
  """
  if jax.process_count() == 1:
    return
  try:
    client = distributed.global_state.client
    assert client is not None, "many processes without jax.distributed"
    client.wait_at_barrier(name, timeout_in_ms=int(1000 * seconds))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    raise TimeoutError(
      f"a process of this run did not reach {name} within {seconds} s"
    ) from error
