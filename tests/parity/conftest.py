"""What record_trl.py wrote down."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def recorded():
  """Reads a file of `trl/`: its lists are arrays, texts stay lists of ids."""
  kinds = {"f": np.float32, "i": np.int32, "b": bool}

  def arrays(name, x):
    if isinstance(x, dict):
      return {key: arrays(key, y) for key, y in x.items()}
    if not isinstance(x, list) or name == "texts":
      return x
    x = np.array(x)
    return jnp.asarray(x.astype(kinds[x.dtype.kind]))

  def read(name):
    path = pathlib.Path(__file__).parent / "trl" / f"{name}.json"
    return arrays(name, json.loads(path.read_text()))

  return read
