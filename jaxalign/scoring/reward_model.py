"""Prompts and completions in, rewards out: the one way to score text."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxalign.data.rows import PromptRow
from jaxalign.errors import UserError
from jaxalign.parallel.program import Program
from jaxalign.scoring.function import RewardFunction, ask_functions
from jaxalign.scoring.scorer import Scorer, Started


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """One or several reward models and functions as one: Σ weight · score.

  Attributes:
    scorers: at least one; each model reads texts by its own tokenizer.
    weights: one per scorer, of any sign and sum.
  """

  scorers: tuple[Scorer | RewardFunction, ...]
  weights: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    assert 0 < len(self.scorers) == len(self.weights), self.weights

  def __call__(
    self,
    prompts: Sequence[PromptRow],
    completions: Sequence[str],
    started: Sequence[Started | None] | None = None,
  ) -> Float[np.ndarray, " B"]:
    """The reward of each completion: a float32 logit, higher is better.

    NaN or infinite where a scorer's is; see `Scorer`.

    Args:
      prompts: of each completion.
      completions: as many.
      started: from `start` with the same texts, where that was called before.

    Raises:
      UserError: a reward function failed, or none says anything of a
        completion.
    """
    return self.total(self.scores(prompts, completions, started), prompts)

  def start(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> list[Started | None]:
    """Starts scoring on the devices without waiting; None for a function."""
    return [
      None if isinstance(s, RewardFunction) else s.start(prompts, completions)
      for s in self.scorers
    ]

  def scores(
    self,
    prompts: Sequence[PromptRow],
    completions: Sequence[str],
    started: Sequence[Started | None] | None = None,
  ) -> Float[np.ndarray, "F B"]:
    """What each of F scorers says of B completions, unweighted."""
    # Functions are asked while the devices are at the models' scores.
    if started is None:
      started = self.start(prompts, completions)
    functions = [s for s in self.scorers if isinstance(s, RewardFunction)]
    answers = iter(())
    if functions:
      answers = iter(ask_functions(functions, prompts, completions))
    return np.array(
      [
        begun.read() if begun is not None else next(answers)
        for begun in started
      ],
      np.float64,  # large weights of opposite sign may cancel
    )

  def total(
    self, scores: Float[np.ndarray, "F B"], prompts: Sequence[PromptRow]
  ) -> Float[np.ndarray, " B"]:
    """The weighted sum of what `scores` gave.

    Raises:
      UserError: a completion that all scorers leave out.
    """
    # A function's NaN is its None: it does not count for that completion.
    is_function = [isinstance(s, RewardFunction) for s in self.scorers]
    silent = np.isnan(scores) & np.array(is_function)[:, None]
    unscored = np.flatnonzero(silent.all(axis=0))
    if len(unscored):
      names = ", ".join(scorer.name for scorer in self.scorers)
      raise UserError(
        f"{names}: None for {len(unscored)} of {len(prompts)} completions, so "
        f"they have no reward; the first is of the prompt "
        f"{prompts[unscored[0]].prompt[:60]!r}: return a number, or leave such "
        "prompts out"
      )
    weights = np.asarray(self.weights, np.float64)[:, None]
    with np.errstate(invalid="ignore"):  # infinities of opposite sign
      total = np.where(silent, 0, weights * scores).sum(axis=0)
    return total.astype(np.float32)

  def programs(self, name: str, texts: int, tokens: int) -> list[Program]:
    """What a call runs on the devices; functions run nothing there.

    Args:
      name: of the reward; several models are numbered.
      texts: in the call.
      tokens: of each.
    """
    several = len(self.scorers) > 1
    return [
      program
      for i, scorer in enumerate(self.scorers)
      if not isinstance(scorer, RewardFunction)
      for program in scorer.programs(
        f"{name} {i + 1}" if several else name, texts, tokens
      )
    ]

  @property
  def names(self) -> tuple[str, ...]:
    """A short name of each scorer, for metrics; equal ones are numbered."""
    short = [
      scorer.name.rpartition(":")[2]
      if isinstance(scorer, RewardFunction)
      else scorer.name.partition("[")[0].rstrip("/").rpartition("/")[2]
      for scorer in self.scorers
    ]
    often, count = collections.Counter(short), collections.Counter[str]()
    names = []
    for name in short:
      count[name] += 1
      names.append(f"{name}_{count[name]}" if often[name] > 1 else name)
    return tuple(names)
