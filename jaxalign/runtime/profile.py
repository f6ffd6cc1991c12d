"""Where time and memory go: traces, timed stages, peak bytes."""

import contextlib
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, MutableMapping

import jax


class Profiler:
  """Traces some steps of a run with `jax.profiler`."""

  def __init__(self, folder: pathlib.Path, steps: str = ""):
    """Plans the trace.

    Args:
      folder: where it goes (for XProf or Perfetto); made when needed.
      steps: `config.profile_steps`: "10:13" means steps 10, 11 and 12, counted
        from 0; "" none.
    """
    first, end = (int(number) for number in (steps or "0:0").split(":"))
    self._folder, self._steps = folder, range(first, end)
    self._tracing = False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Wraps step number `step`, counted from 0.

    The trace ends with the last of the steps, or with the first that raises.
    """
    # A resumed run may begin in the middle of these steps.
    if step in self._steps and not self._tracing:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    goes_on = False  # also if the step raises
    try:
      with jax.profiler.StepTraceAnnotation("step", step_num=step):
        yield
      goes_on = step + 1 in self._steps
    finally:
      if not goes_on:
        self.close()

  def close(self) -> None:
    """Writes the trace if one has begun."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()


@contextlib.contextmanager
def stage(name: str, seconds: MutableMapping[str, float]) -> Iterator[None]:
  """Names a stage of a step in traces and adds up its wall time.

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


def memory() -> dict[str, int]:
  """Most memory that was in use at once since the process started, in bytes.

  On accelerators the largest figure of this process's devices; on a CPU the
  resident memory of the whole process.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if not peaks:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]
  return {"memory/peak_bytes": max(peaks)}
