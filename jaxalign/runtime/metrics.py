"""What a run measures: metrics.jsonl, samples.jsonl, TensorBoard, trackers.

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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.runtime import board, files

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
TRACKERS = ("wandb", "trackio")


class Metrics:
  """Where a run's numbers and samples go."""

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    offsets: Mapping[str, int] | None = None,
    step: int = 0,
    tensorboard: bool = True,
    trackers: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the files; what lies behind the offsets is cut off.

    Args:
      folder: the run's folder.
      offsets: {file name: bytes}, from a checkpoint; None starts anew.
      step: steps done at those offsets; TensorBoard hides what came later.
      tensorboard: whether to write event files.
      trackers: {"wandb" or "trackio": project name}; none by default.
      config: shown by the trackers.

    Raises:
      UserError: a tracker is unknown or not installed.
    """
    folder = pathlib.Path(folder)
    self._trackers = [
      open_tracker(name, project, folder, config or {})
      for name, project in (trackers or {}).items()
    ]
    offsets = offsets or {}
    self._metrics, self._samples = (
      files.Growing(folder / name, offsets.get(name, 0))
      for name in (METRICS, SAMPLES)
    )
    self._board = None
    if tensorboard:
      self._board = board.Board(folder / "tensorboard", step)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """One line {"step": step, ...names in order}.

    Args:
      step: steps done, >= 1, rising.
      values: {`group/name`: number, numpy or 0-d jax array on the host}.

    Raises:
      UserError: the disk is full.
    """
    numbers = {name: _number(values[name]) for name in sorted(values)}
    self._metrics.append(_line({"step": step, **numbers}))
    if self._board is not None:
      self._board.write(step, numbers)
    for tracker in self._trackers:
      tracker.log(numbers, step=step)

  def write_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """Lines of samples.jsonl, keys in the order given.

    Args:
      rows: {"step", "prompt", "completion", "score", "test_score" or None,
        "kept", ...}.

    Raises:
      UserError: the disk is full.
    """
    self._samples.append(b"".join(map(_line, rows)))

  def offsets(self) -> dict[str, int]:
    """{file name: bytes}, for a checkpoint; everything so far is on disk."""
    if self._board is not None:
      self._board.flush()
    return {
      METRICS: self._metrics.offset(),
      SAMPLES: self._samples.offset(),
    }

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._board is not None:
      self._board.close()
    self._metrics.close()
    self._samples.close()
    for tracker in self._trackers:
      tracker.finish()


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a log; see `iterate_jsonl`."""
  return list(iterate_jsonl(path))


def iterate_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
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


def number(value: Any) -> float | None:
  """What a logged value stands for, "NaN" and infinities too; else None."""
  if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
    return float(value)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return float(value) if is_number else None


def open_tracker(
  name: str, project: str, folder: pathlib.Path, config: Mapping[str, Any]
) -> Any:
  """An opened W&B or trackio run: `log(values, step=)` and `finish()`.

  Both packages have the same three calls. The run's name is kept in the
  folder, so that a resumed run goes on in the same curve.

  Raises:
    UserError: the tracker is unknown or its package is not installed.
  """
  check_tracker(name)
  package = importlib.import_module(name)
  options = {"name": _run_name(folder, name), "resume": "allow"}
  if name == "wandb":  # trackio goes by the name, W&B by an id of its own
    options |= {"id": options["name"], "dir": str(folder)}
  package.init(project=project, config=dict(config), **options)
  return package


def check_tracker(name: str) -> None:
  """UserError if a tracker is unknown or its package is not installed."""
  if name not in TRACKERS:
    raise UserError(
      f"config.metrics names the tracker {name!r}, which is not one of "
      f"{', '.join(TRACKERS)}"
    )
  if importlib.util.find_spec(name) is None:
    raise UserError(
      f"config.metrics.{name} asks for {name}, which is not installed; "
      f"pip install 'jaxalign[{name}]', or set config.metrics.{name}=False"
    )


def _run_name(folder: pathlib.Path, tracker: str) -> str:
  place = folder / f"{tracker}.json"
  if not place.exists():
    name = f"{folder.absolute().name}-{os.urandom(4).hex()}"
    files.write_json(place, {"name": name})
  return json.loads(place.read_text())["name"]


def _line(row: Mapping[str, Any]) -> bytes:
  clean = {key: _plain(value) for key, value in row.items()}
  text = json.dumps(clean, ensure_ascii=False, allow_nan=False)
  # A lone surrogate, which a tokenizer may emit, has no UTF-8 form.
  return text.encode("utf-8", "backslashreplace") + b"\n"


def _number(value: Any) -> int | float:
  number = np.asarray(value).item()
  return number if isinstance(number, int) else float(number)


def _plain(value: Any) -> Any:
  """A JSON value: arrays' numbers as Python's, what is not finite as text."""
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
  return value
