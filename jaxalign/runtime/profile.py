"""Where the time and the memory go: traces, named stages, peak bytes."""

import contextlib
import pathlib
import re
import resource
import sys
import time
from collections.abc import Iterator, MutableMapping

import jax

from jaxalign.errors import UserError


def parse_steps(text: str) -> range:
  """The steps of `--profile_steps`.

  Args:
    text: "10:13" means steps 10, 11 and 12, counted from 0; "10" is "10:11";
      "" is none.

  Returns:
    The steps.

  Raises:
    UserError: the text is something else.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
  if match is None:
    raise UserError(
      f"config.profile_steps must be FIRST:END, got {text!r}; "
      "write 10:13 for steps 10, 11 and 12, or leave it empty"
    )
  first = int(match[1])
  end = int(match[2]) if match[2] else first + 1
  if end <= first:
    raise UserError(
      f"config.profile_steps must be FIRST:END with FIRST < END, got {text!r}"
    )
  return range(first, end)


class Profiler:
  """Traces some steps of a run with `jax.profiler`."""

  def __init__(self, folder: pathlib.Path, steps: str = ""):
    """Plans the trace.

    Args:
      folder: where it goes (for XProf or Perfetto); made when needed.
      steps: see `parse_steps`.

    Raises:
      UserError: `steps` cannot be read.
    """
    self._folder, self._steps = folder, parse_steps(steps)
    self._tracing = False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Wraps step number `step`, counted from 0.

    The trace ends with the last of the steps, or with the first that raises.
    """
    if step in self._steps and not self._tracing:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    with contextlib.ExitStack() as undo:
      undo.callback(self.close)
      with jax.profiler.StepTraceAnnotation("step", step_num=step):
        yield
      if step + 1 in self._steps:
        undo.pop_all()

  def close(self) -> None:
    """Writes the trace if one is under way."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()


@contextlib.contextmanager
def stage(name: str, seconds: MutableMapping[str, float]) -> Iterator[None]:
  """Names a part of a step in traces and adds up its wall time.

  Work that was only dispatched to the device counts where the host waits for
  it, so end a stage with the host read that needs its result.

  Args:
    name: as in "sample"; the time is added to `time/sample_s`.
    seconds: collects the times of a step.
  """
  begin = time.perf_counter()
  with jax.profiler.TraceAnnotation(name):
    yield
  spent = time.perf_counter() - begin
  seconds[f"time/{name}_s"] = seconds.get(f"time/{name}_s", 0.0) + spent


def peak_bytes() -> int:
  """Most memory that was in use at once since the process started, in bytes.

  On accelerators the largest figure of this process's devices; on a CPU the
  resident memory of the whole process.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if peaks:
    return max(peaks)
  unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory() -> dict[str, int]:
  """`peak_bytes` under its metric's name."""
  return {"memory/peak_bytes": peak_bytes()}
