"""Answers of the policy itself: drawn, scored, and what is told of them."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.core.types import Answers, Metrics, Params, TrainState
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.runtime.context import Context, Rows, due

_log = logging.getLogger(__name__)

T = TypeVar("T", bound="Tools")
Score = Callable[[list[str], list[str]], Float[np.ndarray, " B"]]


@dataclasses.dataclass(frozen=True)
class Tools:
  """What a step needs that learns from the policy's own answers.

  Attributes:
    prompts: step -> the prompts of that step.
    sample: (params, prompts, samples a prompt, key) -> Answers.
    score: (prompts, completions) -> raw logits, higher is better.
    held_out: the same by a reward model that is never trained against.
    encode: the answers of a step -> what the algorithm's update takes.
    diversity: (prompts, completions, kept completions) -> metrics.
    evaluate: params -> metrics on prompts that are kept aside.
  """

  prompts: Callable[[int], list[str]]
  sample: Callable[[Params, list[str], int, Array], Answers]
  score: Score
  held_out: Score | None
  encode: Callable[..., Any]
  diversity: Callable[[list[str], list[str], list[str]], Metrics]
  evaluate: Callable[[Params], Metrics] | None = None


def extended(tools: Tools, kind: type[T], **more: Any) -> T:
  """The same tools as another kind of them, some added or replaced."""
  fields = {f.name: getattr(tools, f.name) for f in dataclasses.fields(tools)}
  return kind(**fields | more)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A step's answers with their scores."""

  answers: Answers
  scores: Float[np.ndarray, "P S"]  # -inf = unusable: empty or not finite
  tested: Float[np.ndarray, " B"] | None  # by the held-out reward model


def draw(
  ctx: Context, tools: Tools, params: Params, step: int, key: Array
) -> Scored:
  """Answers a step's prompts and scores the answers.

  Args:
    ctx: its config has `samples_per_prompt`, `length_penalty` and
      `validation_interval`.
    tools: see the class.
    params: all of the policy's parameters.
    step: counted from 0; says which prompts, and whether the held-out reward
      model is due.
    key: consumed.
  """
  config = ctx.config
  with ctx.stage("sample"):
    prompts = tools.prompts(step)
    answers = tools.sample(params, prompts, config.samples_per_prompt, key)
  test = due(step, config.validation_interval, config.steps)
  with ctx.stage("score"):
    scores = np.array(tools.score(answers.asked, answers.texts), np.float64)
    tested = None
    if tools.held_out and test:
      tested = np.asarray(tools.held_out(answers.asked, answers.texts))
  chars = np.array([len(t) for t in answers.texts])
  # The option's help said λ · length; the code took the logarithm.
  scores -= config.length_penalty * np.log(np.maximum(chars, 1))
  scores[(chars == 0) | ~np.isfinite(scores)] = -np.inf
  return Scored(answers, scores.reshape(len(answers.prompts), -1), tested)


@contextlib.contextmanager
def tolerated(ctx: Context, step: int) -> Iterator[None]:
  """Lets a step fail up to `config.max_exception_count` times.

  Out of memory, no usable answer: tolerated up to a set number, as in
  SuperHF's released code, but never hidden. A `UserError` is a mistake in the
  input, which does not go away.
  """
  try:
    yield
  except UserError:
    raise
  except Exception:
    ctx.counters["exceptions"] = ctx.counters.get("exceptions", 0) + 1
    if ctx.counters["exceptions"] > ctx.config.max_exception_count:
      raise
    _log.exception("step %d failed and is left out", step + 1)


def tell(
  tools: Tools, step: int, scored: Scored, kept: Int[np.ndarray, " K"]
) -> tuple[Metrics, Rows]:
  """What a step reports of its answers: metrics, and rows of samples.jsonl.

  Args:
    tools: of the run.
    step: counted from 0.
    scored: the step's answers.
    kept: flat indices of the answers that are trained on.
  """
  texts = scored.answers.texts
  best = [texts[i] for i in kept]
  metrics = measure(scored, kept)
  metrics |= tools.diversity(scored.answers.asked, texts, best)
  return metrics, rows(step, scored, kept)


def end_step(
  ctx: Context,
  tools: Tools,
  step: int,
  state: TrainState,
  metrics: Metrics,
  told: Rows,
) -> None:
  """Evaluates where that is due, reports, and saves where that is due."""
  config = ctx.config
  if tools.evaluate and due(step, config.evaluation.interval, config.steps):
    with ctx.stage("evaluate"):
      policy = policy_of(lora.join(state.result, ctx.frozen))
      metrics = metrics | tools.evaluate(policy)
  metrics = metrics | {"exceptions": ctx.counters.get("exceptions", 0)}
  ctx.report(step, metrics, told)
  ctx.save(step, state)


def measure(scored: Scored, kept: Int[np.ndarray, " K"]) -> Metrics:
  """Rewards, lengths and counts; unusable answers count in no mean.

  Args:
    scored: a step's answers.
    kept: flat indices of the answers that are trained on.
  """
  answers, tested = scored.answers, scored.tested
  flat = scored.scores.reshape(-1)
  chars = np.array([len(t) for t in answers.texts])
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
    "num_kept": len(kept),
    "num_sampled_tokens": int(np.sum(answers.samples.lengths)),
  }
  if tested is not None:
    found["test_score/mean"] = tested[real].mean()
    found["test_score/kept_mean"] = tested[kept].mean()
  return found


def rows(step: int, scored: Scored, kept: Int[np.ndarray, " K"]) -> Rows:
  """Every answer as a row of samples.jsonl; arguments as for `measure`."""
  answers, tested = scored.answers, scored.tested
  flat, chosen = scored.scores.reshape(-1), set(kept.tolist())
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
