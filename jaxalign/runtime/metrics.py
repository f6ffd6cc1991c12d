"""A run's numbers: metrics.jsonl, samples.jsonl, TensorBoard, trackers.

The two files are plain logs that only grow. A checkpoint stores how long they
were (`offsets`); a resumed run cuts them back to that and writes the same
lines again, so a killed run's files end up equal to an uninterrupted run's
(`time/`, `throughput/` and `memory/` values aside).

JSON knows no NaN: a value that is not finite is written as the string "NaN",
"Infinity" or "-Infinity", which `float()` reads back. A null would hide which.
"""

import importlib
import importlib.util
import json
import math
import os
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jax.typing import ArrayLike

from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.parallel import hosts
from jaxalign.runtime import files
from jaxalign.runtime.tensorboard import EventFile

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
TRACKERS = ("wandb", "trackio")

# A line of a log, any JSON values. In samples.jsonl: "step", "prompt",
# "completion", "score", "test_score" or None, "kept" and a method's own keys.
LogRow = JsonObject


class MetricsLog:
  """The open logs of a run."""

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    offsets: Mapping[str, int] | None = None,
    step: int = 0,
    tensorboard: bool = True,
    trackers: Mapping[str, str] | None = None,
    config: Mapping[str, object] | None = None,
  ):
    """Opens the files and cuts off what follows the offsets.

    Args:
      folder: the run's folder.
      offsets: {file name: bytes}, from a checkpoint; None empties the files.
      step: steps done at those offsets; TensorBoard hides what came later.
      tensorboard: whether to write event files.
      trackers: {"wandb" or "trackio": project name}, see `check_tracker`.
      config: shown by the trackers; any JSON values.
    """
    folder, offsets = pathlib.Path(folder), offsets or {}
    self._trackers: list[types.ModuleType] = []
    self._events = None
    # All processes of a run measure the same; the lead writes it down.
    self._writes = hosts.is_lead()
    if not self._writes:
      return
    for name, project in (trackers or {}).items():
      # The name is kept in the folder: a resumed run goes on in its curve.
      place = folder / f"{name}.json"
      if not place.exists():
        unique = f"{folder.absolute().name}-{os.urandom(4).hex()}"
        files.write_json(place, {"name": unique})
      run = json.loads(place.read_text())["name"]
      options = {"name": run, "resume": "allow"}
      if name == "wandb":  # trackio finds a run by its name, W&B by an id
        options |= {"id": run, "dir": str(folder)}
      # Both packages have the same three calls: init, log and finish.
      package = importlib.import_module(name)
      package.init(project=project, config=dict(config or {}), **options)
      self._trackers.append(package)
    self._metrics = files.Growing(folder / METRICS, offsets.get(METRICS, 0))
    self._samples = files.Growing(folder / SAMPLES, offsets.get(SAMPLES, 0))
    if tensorboard:
      self._events = EventFile(folder / "tensorboard", step)

  def write(self, step: int, values: Mapping[str, ArrayLike]) -> None:
    """Writes one line {"step": step, ...names in order}.

    Args:
      step: steps done, >= 1, rising.
      values: {`group/name`: a scalar, on the host}.

    Raises:
      UserError: the disk is full.
    """
    if not self._writes:
      return
    numbers = {n: np.asarray(values[n]).item() for n in sorted(values)}
    self._metrics.append(_line({"step": step, **numbers}))
    if self._events is not None:
      self._events.write(step, numbers)
    for tracker in self._trackers:
      tracker.log(numbers, step=step)

  def write_samples(self, rows: Iterable[LogRow]) -> None:
    """Writes lines of samples.jsonl, keys in the order given.

    Raises:
      UserError: the disk is full.
    """
    if self._writes:
      self._samples.append(b"".join(map(_line, rows)))

  def offsets(self) -> dict[str, int]:
    """{file name: bytes}, for a checkpoint; everything so far is on disk."""
    if not self._writes:
      return {}
    if self._events is not None:
      self._events.flush()
    return {METRICS: self._metrics.offset(), SAMPLES: self._samples.offset()}

  def close(self) -> None:
    """Flushes and closes everything."""
    if not self._writes:
      return
    if self._events is not None:
      self._events.close()
    self._metrics.close()
    self._samples.close()
    for tracker in self._trackers:
      tracker.finish()


def check_tracker(name: str) -> None:
  """Raises a UserError if a tracker's package is not installed."""
  if importlib.util.find_spec(name) is None:
    raise UserError(
      f"config.metrics.{name} asks for {name}, which is not installed; "
      f"pip install {name}, or set config.metrics.{name}=False"
    )


def iterate_jsonl(path: str | os.PathLike) -> Iterator[LogRow]:
  """Yields the rows of a log, none if it is missing.

  A last line that a kill cut short is left out.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  with open(path, "rb") as file:
    for line in file:
      if line.endswith(b"\n"):
        yield json.loads(line)


def read_jsonl(path: str | os.PathLike) -> list[LogRow]:
  """The rows of a log; see `iterate_jsonl`."""
  return list(iterate_jsonl(path))


def number(value: object) -> float | None:
  """The number that a JSON value holds, "NaN" and infinities too, or None."""
  if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
    return float(value)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return float(value) if is_number else None


def _line(row: LogRow) -> bytes:
  plain = {}
  for key, value in row.items():
    # JSON has neither numpy's scalars nor NaN.
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
      value = "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    plain[key] = value
  text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
  # A lone surrogate, which a tokenizer may emit, has no UTF-8 form.
  return text.encode("utf-8", "backslashreplace") + b"\n"
