"""The persistent compilation cache: a second start compiles nothing again."""

import contextlib
import logging
import os
import pathlib
import secrets

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxalign import paths
from jaxalign.parallel import hosts

_log = logging.getLogger(__name__)
_OPTION = "jax_compilation_cache_dir"
_OFF = frozenset({"0", "off", "none"})


def enable_compilation_cache() -> pathlib.Path | None:
  """Switches JAX's cache on, unless the user has already decided.

  `JAX_COMPILATION_CACHE_DIR`, or the same option in `jax.config`, is left
  alone. `JAXALIGN_CACHE` names another folder, or is `off`. The default is
  `jaxalign/xla` below `XDG_CACHE_HOME` (`~/.cache`). Call it before the first
  compilation; it starts no backend.

  Returns:
    The folder in use, or None if there is no cache.
  """
  chosen = jax.config.values[_OPTION]
  if chosen:
    return pathlib.Path(chosen)
  folder = os.environ.get("JAXALIGN_CACHE", "")
  if folder.lower() in _OFF:
    return None
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  place = pathlib.Path(folder or f"{caches}/jaxalign").expanduser() / "xla"
  with contextlib.suppress(OSError):
    place.mkdir(parents=True, exist_ok=True)
  # A home that cannot be written to (a container's) is no reason to stop.
  if not os.access(place, os.W_OK):
    return None
  jax.config.update(_OPTION, str(place))
  # The default leaves out what compiles in under a second; a start on CPU is
  # made of many such programs.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return place


def leave_cache_unless_shared() -> None:
  """Switches JAX's cache off where the hosts do not see the same folder.

  JAX has process 0 alone write to it. With one folder per host, process 0
  would at the next start load programs that the others must compile. On GPUs
  the compilers divide autotuning among the processes, so the others would wait
  for process 0.
  """
  folder = jax.config.values[_OPTION]
  if hosts.count() == 1 or not folder or paths.is_remote(folder):
    return
  place = pathlib.Path(folder)

  # A fresh name: network file systems cache failed lookups.
  def mark() -> int:
    number = secrets.randbits(62)
    with contextlib.suppress(OSError):
      place.mkdir(parents=True, exist_ok=True)
      (place / f"shared-{number}").touch()
    return number

  found = place / f"shared-{hosts.from_lead(mark, 0)}"
  if hosts.agree(not os.path.exists(found)):
    jax.config.update(_OPTION, None)
    compilation_cache.reset_cache()  # a program may have opened it
    _log.warning(
      "%s is not shared by all hosts, so each start compiles again; name a "
      "folder that they share with %s",
      folder,
      "JAX_COMPILATION_CACHE_DIR"
      if "JAX_COMPILATION_CACHE_DIR" in os.environ
      else "JAXALIGN_CACHE",
    )
  if hosts.is_lead():
    with contextlib.suppress(OSError):
      found.unlink()
