"""Who says which of two answers is better: a reward model, a function, people.

A judge is `(step, scored answers, stopping) -> choice`: of each prompt 0 or 1,
the index of its better answer, or -1 for neither. Only people may take so long
that `stopping`, whether the run was asked to stop, matters.
"""

import functools
import importlib.machinery
import json
import pathlib
import time
import types
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from jaxalign.config import OnlineDPOConfig
from jaxalign.errors import UserError, explained
from jaxalign.runtime.answers import Scored

Choice = Int[np.ndarray, " P"]
Stopping = Callable[[], bool]
Judge = Callable[[int, Scored, Stopping], Choice | None]
Ask = Callable[[list[str], list[str], list[str]], list[int]]

QUEUE, LABELS = "queue.jsonl", "labels.jsonl"
POLL_S = 1.0


def make_judge(config: OnlineDPOConfig, folder: pathlib.Path) -> Judge:
  """The judge that `config.judge` names.

  Args:
    config: of the run.
    folder: the run's, for the queue that people answer.

  Raises:
    UserError: the file has no such function.
  """
  if config.judge == "people":
    return functools.partial(by_people, folder)
  if config.judge == "reward_model":
    penalty = config.missing_eos_penalty
    return lambda step, scored, stopping: by_score(scored, penalty)
  ask = load_function(config.judge)
  return lambda step, scored, stopping: by_function(config.judge, ask, scored)


def by_score(scored: Scored, penalty: float = 0.0) -> Choice:
  """The answer with the higher score; the first one where they are equal.

  Args:
    scored: two answers a prompt; without a finite score there is no choice.
    penalty: taken off the score of an answer that was cut.
  """
  cut = ~np.array(scored.answers.ended).reshape(scored.scores.shape)
  scores = scored.scores - penalty * cut
  choice = (scores[:, 1] > scores[:, 0]).astype(np.int64)
  return np.where(comparable(scored), choice, -1)


def comparable(scored: Scored) -> np.ndarray:
  """Prompts whose two answers are usable and not the same."""
  first, second = pairs(scored)
  differ = np.array([a != b for a, b in zip(first, second, strict=True)])
  return np.isfinite(scored.scores).all(axis=1) & differ


def pairs(scored: Scored) -> tuple[list[str], list[str]]:
  """The first and the second answer to each prompt."""
  return scored.answers.texts[0::2], scored.answers.texts[1::2]


def by_function(name: str, ask: Ask, scored: Scored) -> Choice:
  """What a function of the user says.

  Raises:
    UserError: it does not give 0, 1 or -1 for every prompt.
  """
  prompts = scored.answers.prompts
  said = list(ask(list(prompts), *pairs(scored)))
  if len(said) != len(prompts) or any(x not in (0, 1, -1) for x in said):
    raise UserError(
      f"config.judge: {name} must return 0, 1 or -1 (neither) for each of "
      f"{len(prompts)} prompts, got {said!r}"
    )
  return np.where(comparable(scored), np.array(said, np.int64), -1)


def load_function(name: str) -> Ask:
  """`FILE.py:FUNCTION` -> the function.

  Raises:
    UserError: no such file or function, or the file fails.
  """
  file, _, function = name.rpartition(":")
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f"config.judge: {path} does not exist; give FILE.py:NAME")
  loader = importlib.machinery.SourceFileLoader("judge_file", str(path))
  module = types.ModuleType(loader.name)
  with explained(Exception, by=lambda why: f"config.judge: {path}: {why}"):
    loader.exec_module(module)
  if not callable(getattr(module, function, None)):
    raise UserError(
      f"config.judge: {path} has no function {function}; it takes prompts, "
      "first and second answers and returns 0, 1 or -1 for each prompt"
    )
  return getattr(module, function)


def by_people(
  folder: pathlib.Path,
  step: int,
  scored: Scored,
  stopping: Stopping,
) -> Choice | None:
  """Writes the pairs to `queue.jsonl` and waits for `labels.jsonl`.

  A line of the queue is `{"id", "prompt", "answers": [first, second]}`, one of
  the labels `{"id", "choice"}` with 0, 1 or -1; of several for one id the last
  counts. A step that is done again asks for the same ids, so no one is asked
  twice.

  Returns:
    The choices, or None where the run was asked to stop before all were there.
  """
  names = [f"{step + 1}-{i + 1}" for i in range(len(scored.answers.prompts))]
  shown = zip(names, scored.answers.prompts, *pairs(scored), strict=True)
  rows = {
    name: {"prompt": prompt, "answers": [a, b]}
    for (name, prompt, a, b), usable in zip(
      shown, comparable(scored), strict=True
    )
    if usable
  }
  asked = _read(folder / QUEUE)
  with (folder / QUEUE).open("a") as file:
    for name, row in rows.items():
      if name not in asked:
        file.write(json.dumps({"id": name} | row) + "\n")
  told = False
  while missing := rows.keys() - (labels := _labels(folder)).keys():
    if stopping():
      return None
    if not told:
      told = True
      print(
        f"waiting for {len(missing)} labels of {folder / QUEUE} in "
        f"{folder / LABELS}"
      )
    time.sleep(POLL_S)
  return np.array([labels.get(name, -1) for name in names])


def _labels(folder: pathlib.Path) -> dict[str, int]:
  path = folder / LABELS
  found = {}
  for name, row in _read(path).items():
    if row.get("choice") not in (0, 1, -1):
      raise UserError(
        f"{path}: the choice of {name} must be 0, 1 or -1, got "
        f"{row.get('choice')!r}; correct the line"
      )
    found[name] = row["choice"]
  return found


def _read(path: pathlib.Path) -> dict[str, dict]:
  """Rows by id; a last line that is still being written is left alone."""
  if not path.exists():
    return {}
  found = {}
  whole, _, _ = path.read_text().rpartition("\n")
  for number, line in enumerate(whole.splitlines(), 1):
    bad = f"{path}, line {number}: not an object with an id"
    with explained(ValueError, KeyError, TypeError, by=lambda _, b=bad: b):
      row = json.loads(line)
      found[row["id"]] = row
  return found
