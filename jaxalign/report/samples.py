"""A readable part of samples.jsonl: kept and rejected completions over time."""

import math
import pathlib
from collections.abc import Sequence

from jaxalign.core.types import JsonObject
from jaxalign.runtime import metrics
from jaxalign.runtime.console import short

_STEPS = 8  # spread over the run, first and last among them
_PROMPTS = 3  # shown for each of those steps
_SIDE = 2  # completions shown on each side of a prompt
_CHARACTERS = 1500  # of a text


def pick_samples(path: pathlib.Path) -> list[JsonObject]:
  """Chooses steps, prompts and completions, as nested data for the template.

  Args:
    path: samples.jsonl; may be missing.

  Returns:
    [{"step", "prompts": [{"prompt", "kept": [...], "rejected": [...],
    "more_kept", "more_rejected"}]}], steps spread over the run. Completions
    are by falling score; of the rejected the best and the worst are shown.
  """
  steps = sorted({row["step"] for row in metrics.iterate_jsonl(path)})
  last = len(steps) - 1
  if len(steps) > _STEPS:
    steps = [steps[round(i * last / (_STEPS - 1))] for i in range(_STEPS)]
  # The file is read twice: it may not fit into memory.
  by_step: dict[int, dict[str, list[metrics.LogRow]]] = {s: {} for s in steps}
  for row in metrics.iterate_jsonl(path):
    prompts = by_step.get(row["step"])
    prompt = str(row.get("prompt", ""))
    if prompts is not None and (prompt in prompts or len(prompts) < _PROMPTS):
      prompts.setdefault(prompt, []).append(row)

  picked = []
  for step, prompts in by_step.items():
    shown = []
    for prompt, rows in prompts.items():
      rows = sorted(rows, key=_score, reverse=True)
      kept = [row for row in rows if row.get("kept")]
      rejected = [row for row in rows if not row.get("kept")]
      # The best and the worst of the rejected; a single one is shown once.
      ends = [*rejected[: _SIDE - 1], *rejected[1:][-1:]]
      shown.append(
        {
          # The end of a prompt, because the completion goes on from there.
          "prompt": prompt[-_CHARACTERS:],
          "kept": _completions(kept[:_SIDE]),
          "rejected": _completions(ends),
          "more_kept": max(0, len(kept) - _SIDE),
          "more_rejected": max(0, len(rejected) - _SIDE),
        }
      )
    picked.append({"step": step, "prompts": shown})
  return picked


def _score(row: metrics.LogRow) -> float:
  score = metrics.number(row.get("score"))
  return -math.inf if score is None or math.isnan(score) else score


def _completions(rows: Sequence[metrics.LogRow]) -> list[dict[str, str]]:
  """The texts and their scores, "" where a row has none."""
  completions = []
  for row in rows:
    shown = {"text": str(row.get("completion", ""))[:_CHARACTERS]}
    for name in ("score", "test_score"):
      score = metrics.number(row.get(name))
      shown[name] = "" if score is None else short(score)
    completions.append(shown)
  return completions
