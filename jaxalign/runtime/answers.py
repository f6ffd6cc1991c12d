"""What is told of a batch of scored answers: its metrics and its rows."""

import numpy as np
from jaxtyping import Float, Int

from jaxalign.core.types import Answers, Metrics
from jaxalign.runtime.context import Rows


def measure(
  answers: Answers,
  scores: Float[np.ndarray, "P S"],
  tested: Float[np.ndarray, " B"] | None,
  kept: Int[np.ndarray, " K"],
) -> Metrics:
  """Rewards, lengths and counts.

  Args:
    answers: of one superbatch.
    scores: -inf where an answer is unusable; such answers count in no mean.
    tested: the held-out reward model's scores, or None.
    kept: flat indices of the answers that are trained on.
  """
  flat, chars = scores.reshape(-1), np.array([len(t) for t in answers.texts])
  real = np.isfinite(flat)
  found = {
    "score/mean": flat[real].mean(),
    "score/std": flat[real].std(),
    "score/kept_mean": flat[kept].mean(),
    "completion/chars_mean": chars.mean(),
    "completion/tokens_mean": np.mean(answers.samples.lengths),
    "completion/empty_fraction": np.mean(chars == 0),
    "completion/ended_fraction": np.mean(answers.ended),
    "num_prompts": len(answers.prompts),
    "num_sampled_tokens": int(np.sum(answers.samples.lengths)),
  }
  if tested is not None:
    found["test_score/mean"] = tested[real].mean()
    found["test_score/kept_mean"] = tested[kept].mean()
  return found


def rows(
  step: int,
  answers: Answers,
  scores: Float[np.ndarray, "P S"],
  tested: Float[np.ndarray, " B"] | None,
  kept: Int[np.ndarray, " K"],
) -> Rows:
  """Every answer as a row of samples.jsonl; arguments as for `measure`."""
  flat, chosen = scores.reshape(-1), set(kept.tolist())
  return [
    {
      "step": step + 1,
      "prompt": prompt,
      "completion": text,
      "score": float(flat[i]) if np.isfinite(flat[i]) else None,
      "test_score": None if tested is None else float(tested[i]),
      "kept": i in chosen,
    }
    for i, (prompt, text) in enumerate(
      zip(answers.asked, answers.texts, strict=True)
    )
  ]
