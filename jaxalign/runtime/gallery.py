"""A readable part of samples.jsonl: kept and rejected answers over the run."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.runtime import metrics
from jaxalign.runtime.view import short

_STEPS = 8  # spread over the run, first and last among them
_PROMPTS = 3  # shown for each of those steps
_SIDE = 2  # completions shown on each side of a prompt
_TEXT = 1500  # characters of a text


def pick_samples(path: pathlib.Path) -> list[dict[str, Any]]:
  """Chooses steps, prompts and completions.

  Args:
    path: samples.jsonl; may be missing.

  Returns:
    [{"step", "prompts": [{"prompt", "kept": [...], "rejected": [...],
    "more_kept", "more_rejected"}]}], steps spread over the run. Completions
    are by falling score; of the rejected the best and the worst are shown.
  """
  steps = sorted({row["step"] for row in metrics.iterate_jsonl(path)})
  chosen = spread(steps, _STEPS)
  by_step: dict[int, dict[str, list[dict[str, Any]]]] = {s: {} for s in chosen}
  for row in metrics.iterate_jsonl(path):
    prompts = by_step.get(row["step"])
    if prompts is None:
      continue
    prompt = str(row.get("prompt", ""))
    if prompt in prompts or len(prompts) < _PROMPTS:
      prompts.setdefault(prompt, []).append(row)
  return [
    {"step": step, "prompts": [_sides(p, rows) for p, rows in prompts.items()]}
    for step, prompts in by_step.items()
  ]


def spread(items: Sequence[int], count: int) -> list[int]:
  """At most `count` items at even distances, first and last among them."""
  if len(items) <= count:
    return list(items)
  last = len(items) - 1
  return [items[round(i * last / (count - 1))] for i in range(count)]


def _sides(prompt: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  def by_score(row: Mapping[str, Any]) -> float:
    score = metrics.number(row.get("score"))
    return -math.inf if score is None or math.isnan(score) else score

  kept = sorted((r for r in rows if r.get("kept")), key=by_score, reverse=True)
  others = sorted(
    (r for r in rows if not r.get("kept")), key=by_score, reverse=True
  )
  return {
    "prompt": prompt[-_TEXT:],
    "kept": [_shown(r) for r in kept[:_SIDE]],
    "rejected": [_shown(r) for r in (*others[: _SIDE - 1], *others[1:][-1:])],
    "more_kept": max(0, len(kept) - _SIDE),
    "more_rejected": max(0, len(others) - _SIDE),
  }


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
  score, test = (
    metrics.number(row.get("score")),
    metrics.number(row.get("test_score")),
  )
  return {
    "text": str(row.get("completion", ""))[:_TEXT],
    "score": "" if score is None else short(score),
    "test_score": "" if test is None else short(test),
  }
