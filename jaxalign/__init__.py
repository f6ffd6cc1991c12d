"""Language models aligned by preference: SuperHF, RLHF and others, in JAX.

Functions for notebooks and programs; docs/python.md shows them. The commands
are `python -m jaxalign.main` and its like. Importing this package imports
neither jax nor starts a backend: the functions are fetched from
`jaxalign.api` when they are used.
"""

from typing import TYPE_CHECKING, Any

from jaxalign.errors import HostError, UserError

if TYPE_CHECKING:
  from jaxalign.api import (
    Loaded,
    TrainResult,
    generate,
    load,
    logits,
    read_run,
    save,
    score,
    train,
  )

__all__ = [
  "HostError",
  "Loaded",
  "TrainResult",
  "UserError",
  "generate",
  "load",
  "logits",
  "read_run",
  "save",
  "score",
  "train",
]


def __getattr__(name: str) -> Any:  # a module's attribute may be anything
  """What `__all__` names; it lives where jax is imported."""
  if name in __all__:
    from jaxalign import api

    return getattr(api, name)
  raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")


def __dir__() -> list[str]:
  """Names for completion in a notebook, those not fetched yet included."""
  return sorted({*globals(), *__all__})
