"""Judges of two completions: a reward model, a function, people.

A judge is `(step, rollout, stopping) -> choice`: of each prompt 0 or 1, the
index of its better completion, or -1 for neither. Only people may take so long
that `stopping`, whether the run was asked to stop, matters.
"""

import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from jaxalign.cli import describe_error, load_function
from jaxalign.errors import StepError, UserError
from jaxalign.parallel import hosts
from jaxalign.training.rollout import Rollout

Choice = Int[np.ndarray, " P"]
Judge = Callable[[int, Rollout, Callable[[], bool]], Choice | None]
# (prompts, first completions, second completions) -> 0, 1 or -1 of each.
PreferenceFunction = Callable[[list[str], list[str], list[str]], list[int]]

QUEUE, LABELS = "queue.jsonl", "labels.jsonl"
POLL_S = 1.0


def open_judge(name: str) -> PreferenceFunction | None:
  """The user's function that `config.judge` names; None for other judges.

  Raises:
    UserError: no such file or function, or the file fails.
  """
  if name in ("people", "reward_model"):
    return None
  return load_function(
    name,
    "config.judge",
    "it takes prompts, first and second completions and returns 0, 1 or -1 "
    "for each prompt",
  )


def make_judge(
  name: str,
  function: PreferenceFunction | None,
  missing_eos_penalty: float,
  folder: pathlib.Path,
) -> Judge:
  """The judge that `config.judge` names, with its function if it has one.

  People answer a queue in the run's folder.
  """

  def judge(
    step: int, rollout: Rollout, stopping: Callable[[], bool]
  ) -> Choice | None:
    if name == "reward_model":
      return by_score(rollout, missing_eos_penalty)
    # All processes see the same scores; functions and people answer the lead.
    unanswered = np.full(len(rollout.completions.prompts), -2)

    def ask() -> Choice:
      if function is not None:
        return by_function(name, function, rollout)
      found = by_people(folder, step, rollout, stopping)
      return unanswered if found is None else found

    # Processes share arrays, so -2 stands for None.
    choice = hosts.from_lead(ask, unanswered)
    return None if (choice == -2).all() else choice

  return judge


def by_score(rollout: Rollout, missing_eos_penalty: float = 0.0) -> Choice:
  """The completion with the higher score; the first one where they are equal.

  The penalty is taken off the score of a completion that was cut. Without two
  finite scores there is no choice.
  """
  cut = ~np.array(rollout.completions.ended).reshape(rollout.scores.shape)
  scores = rollout.scores - missing_eos_penalty * cut
  choice = (scores[:, 1] > scores[:, 0]).astype(np.int64)
  return np.where(comparable(rollout), choice, -1)


def comparable(rollout: Rollout) -> Bool[np.ndarray, " P"]:
  """Prompts whose two completions are usable and not the same."""
  texts = rollout.completions.texts
  differ = [a != b for a, b in zip(texts[0::2], texts[1::2], strict=True)]
  return np.isfinite(rollout.scores).all(axis=1) & np.array(differ)


def by_function(
  name: str, function: PreferenceFunction, rollout: Rollout
) -> Choice:
  """What a function of the user says.

  Raises:
    UserError: it does not give 0, 1 or -1 for every prompt.
    StepError: it raised.
  """
  prompts, texts = rollout.completions.prompts, rollout.completions.texts
  try:
    choices = list(function(list(prompts), texts[0::2], texts[1::2]))
  except Exception as error:
    file = pathlib.Path(name.rpartition(":")[0])
    raise StepError(
      f"config.judge: {name} failed for {len(prompts)} pairs: "
      f"{describe_error(file, error)}; fix the function, or let some steps fail"
      " with config.max_exception_count"
    ) from error
  if len(choices) != len(prompts) or any(x not in (0, 1, -1) for x in choices):
    raise UserError(
      f"config.judge: {name} must return 0, 1 or -1 (neither) for each of "
      f"{len(prompts)} prompts, got {choices!r}"
    )
  return np.where(comparable(rollout), np.array(choices, np.int64), -1)


def by_people(
  folder: pathlib.Path,
  step: int,
  rollout: Rollout,
  stopping: Callable[[], bool],
) -> Choice | None:
  """Writes the pairs to `queue.jsonl` and waits for `labels.jsonl`.

  A line of the queue is `{"id", "prompt", "answers": [first, second]}`, one of
  the labels `{"id", "choice"}` with 0, 1 or -1; of several for one id the last
  counts. A step that is repeated has to draw the same texts, and asks no one
  twice.

  Returns:
    The choices, or None where the run was asked to stop before all were there.
  """
  # Asking, unless an earlier start of this step has asked.
  prompts, texts = rollout.completions.prompts, rollout.completions.texts
  usable = comparable(rollout)
  names = [f"{step + 1}-{i + 1}" for i in range(len(prompts))]
  rows = {
    name: {"prompt": prompt, "answers": texts[2 * i : 2 * i + 2]}
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    if usable[i]
  }
  asked = _read(folder / QUEUE)
  with (folder / QUEUE).open("a") as file:
    for name, row in rows.items():
      if name not in asked:
        file.write(json.dumps({"id": name} | row) + "\n")
      elif asked[name] != {"id": name} | row:
        raise UserError(
          f"{folder / QUEUE}: {name} is another pair than this run has drawn "
          f"now, so its label would be wrong; remove {name} from {QUEUE} and "
          f"{LABELS}"
        )
  # Waiting, with one line of output.
  waiting = False
  while missing := rows.keys() - (labels := _labels(folder)).keys():
    if stopping():
      return None
    if not waiting:
      waiting = True
      print(
        f"waiting for {len(missing)} labels of {folder / QUEUE} in "
        f"{folder / LABELS}"
      )
    time.sleep(POLL_S)
  # Pairs that were not asked about have no better completion.
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
  """Rows by id; a last line that is still being written is ignored."""
  if not path.exists():
    return {}
  found = {}
  whole, _, _ = path.read_bytes().rpartition(b"\n")
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      row = json.loads(line)
      found[row["id"]] = row
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{path}, line {number}: not an object with an id"
      ) from error
  return found
