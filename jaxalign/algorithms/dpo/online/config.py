"""Online DPO's config."""

import dataclasses
from collections.abc import Iterator

from jaxalign.algorithms.dpo.config import PairLossConfig
from jaxalign.config.names import is_function
from jaxalign.config.online import OnlineConfig
from jaxalign.config.rules import Rule, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(PairLossConfig, OnlineConfig):
  """DPO on two completions of the policy itself, compared as they come."""

  algorithm: str = field("online_dpo", "what to run", choices=("online_dpo",))
  batch_size: int = field(
    32,
    "pairs in one optimizer update: prompts in a step, completed twice each",
    ">= 1",
    alias=("pairs",),
  )
  judge: str = field(
    "reward_model",
    "what says which completion is better: reward_model; people, by a queue "
    "file in the run's folder; or FILE.py:FUNCTION of (prompts, first, second)",
  )
  missing_eos_penalty: float = field(
    0.0, "taken off the score of a cut completion (reward_model)", ">= 0"
  )
  train_eos: bool = field(True, "end of text after completions that ended")

  @property
  def prompts_per_step(self) -> int:
    """Distinct prompts in a step."""
    return self.batch_size

  @property
  def samples_per_prompt(self) -> int:
    """Completions of each of them: the two that are compared."""
    return 2

  def rules(self) -> Iterator[Rule]:
    """What the judge requires."""
    yield from super().rules()
    yield Rule(
      (self.judge in ("reward_model", "people") or is_function(self.judge)),
      "judge must be reward_model, people or FILE.py:FUNCTION",
      "write my_judge.py:prefer for the function prefer in my_judge.py",
    )


CONFIG = OnlineDPOConfig
