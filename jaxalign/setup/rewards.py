"""The rewards that a config or a flag names: reward models and functions."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from jaxalign.config.names import is_function
from jaxalign.config.online import ScoringConfig
from jaxalign.core import memory
from jaxalign.core.types import Params
from jaxalign.data.rows import PromptRow
from jaxalign.errors import UserError
from jaxalign.scoring.function import RewardFunction, open_function
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.scoring.scorer import Scorer
from jaxalign.setup.models import (
  ModelSpec,
  choose_encoding,
  open_reward_model,
)
from jaxalign.text import templates

Rewards = tuple[ModelSpec | RewardFunction, ...]
Names = tuple[tuple[str, float], ...]  # with weights, see `parse_models`


def open_rewards(
  names: Names,
  mesh: Mesh,
  scoring: ScoringConfig,
  field: str,
  lab: str = "reward-train",
  attention: str = "auto",
) -> Rewards:
  """Opens reward models and functions; no parameter is read.

  Args:
    names: of each, with its weight.
    mesh: where parameters go.
    scoring: how they are read and called.
    field: what named them, for messages: a config field or a flag.
    lab: which of the models that ship `lab` means.
    attention: see `open_reward_model`.

  Raises:
    UserError: one that cannot be used.
  """
  found: list[ModelSpec | RewardFunction] = []
  for name, _ in names:
    if is_function(name):
      found.append(open_function(name, field, scoring.function_timeout))
      continue
    spec = open_reward_model(name, mesh, scoring.dtype, field, lab, attention)
    encoding = choose_encoding(
      scoring.encoding, spec.tokenizer, spec.model, f"{field}: {name}"
    )
    found.append(dataclasses.replace(spec, encoding=encoding))
  return tuple(found)


def check_prompts(
  rewards: Rewards, rows: Sequence[PromptRow], source: str
) -> None:
  """Refuses prompts that a reward model or function cannot read.

  Args:
    rewards: all that will read them.
    rows: the prompts.
    source: of them, for messages.

  Raises:
    UserError: a role, a content or a column.
  """
  columns = {name for row in rows for name in row.columns}
  for reward in rewards:
    if isinstance(reward, RewardFunction):
      reward.check_columns(sorted(columns), source)
    else:
      check_messages(reward, rows)


def check_messages(reward: ModelSpec, rows: Sequence[PromptRow]) -> None:
  """Refuses role lists that a reward model's format cannot write.

  Raises:
    UserError: a role or a content that it does not have.
  """
  tokenizer = reward.tokenizer
  renders = reward.encoding == "concat" and tokenizer.has_chat_template
  answer = {"role": "assistant", "content": "yes"}
  for messages in (row.messages for row in rows if row.messages):
    try:
      if renders:
        tokenizer.render_chat([*messages, answer])
      else:
        templates.from_messages(list(messages), reply=True)
    except (KeyError, TypeError) as error:
      roles = ", ".join(str(turn["role"]) for turn in messages)
      raise UserError(
        f"config.prompts: a prompt has the roles {roles}, which the reward "
        f"model {tokenizer.name} cannot be given; need text by system, user "
        "and assistant"
      ) from error


def read_rewards(
  names: Names,
  rewards: Rewards,
  scoring: ScoringConfig,
  mesh: Mesh | None = None,
  params_of: Callable[[ModelSpec], Params] = ModelSpec.read,
) -> RewardModel:
  """Reads the parameters of what `open_rewards` gave, as one reward.

  Args:
    names: as for `open_rewards`.
    rewards: from `open_rewards`.
    scoring: lengths and rows of a scorer's call.
    mesh: that a call's rows are sharded over; None = one device.
    params_of: `ModelSpec.shapes` describes the reward and reads nothing.
  """

  def params(reward: ModelSpec) -> Params:
    found = params_of(reward)
    return memory.to_host(found) if scoring.offload else found

  scorers = tuple(
    reward
    if isinstance(reward, RewardFunction)
    else Scorer(
      reward.model,
      params(reward),
      reward.tokenizer,
      reward.encoding,
      name,
      max_length=scoring.max_length,
      lengths=scoring.length_buckets,
      rows=scoring.batch_size,
      mesh=mesh,
    )
    for (name, _), reward in zip(names, rewards, strict=True)
  )
  return RewardModel(scorers, tuple(weight for _, weight in names))
