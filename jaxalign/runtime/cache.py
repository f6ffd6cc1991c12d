"""The persistent compilation cache: a second start compiles nothing anew."""

import contextlib
import os
import pathlib
from typing import Any

import jax

_OFF = frozenset({"0", "off", "none"})


def enable_compilation_cache() -> pathlib.Path | None:
  """Switches JAX's cache on, unless the user has already decided.

  `JAX_COMPILATION_CACHE_DIR`, or the same set through `jax.config`, is left
  alone. `JAXALIGN_CACHE` names another folder, or is `off`. The default is
  `jaxalign/xla` below `XDG_CACHE_HOME` (`~/.cache`). Call it before the first
  compilation; it starts no backend.

  Returns:
    The folder in use, or None if there is no cache.
  """
  config: Any = jax.config  # its options are set at run time
  chosen = config.jax_compilation_cache_dir
  if chosen:
    return pathlib.Path(chosen)
  if os.environ.get("JAXALIGN_CACHE", "").lower() in _OFF:
    return None
  place = cache_home() / "xla"
  if not _writable(place):
    return None
  config.update("jax_compilation_cache_dir", str(place))
  # The default leaves out what compiles in under a second; a start on CPU is
  # made of many such programs.
  config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return place


def cache_home() -> pathlib.Path:
  """The folder for what can be made again: `JAXALIGN_CACHE` or XDG's."""
  chosen = os.environ.get("JAXALIGN_CACHE", "")
  if chosen and chosen.lower() not in _OFF:
    return pathlib.Path(chosen).expanduser()
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "jaxalign"


def _writable(place: pathlib.Path) -> bool:
  """A home that cannot be written to (a container's) is no reason to stop."""
  with contextlib.suppress(OSError):
    place.mkdir(parents=True, exist_ok=True)
  return os.access(place, os.W_OK)
