"""Random keys: derived from the run's key, never stored."""

import jax
import numpy as np
from jaxtyping import Array


def fold(key: Array, number: int) -> Array:
  """`jax.random.fold_in` with a number from the host, such as a step.

  Args:
    key: not consumed; every number gives an independent key.
    number: in [0, 2³²). It is sent to the device explicitly, so that a loop
      passes under `jax_transfer_guard=disallow`.
  """
  return jax.random.fold_in(key, jax.device_put(np.uint32(number)))
