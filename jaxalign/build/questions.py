"""The prompts of an online run, and whether each of them fits the model."""

import dataclasses

from jaxalign.config import OnlineConfig
from jaxalign.data import prompts
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError

_SHOWN = 60  # characters of a prompt in a message


@dataclasses.dataclass(frozen=True)
class Questions:
  """The prompts of a run, system text in front."""

  train: tuple[str, ...]
  aside: tuple[str, ...]  # for evaluations; never trained on


def load_questions(
  config: OnlineConfig, tokenizer: Tokenizer, context: int
) -> Questions:
  """Loads, filters, shuffles and checks the prompts.

  Args:
    config: its sources, filters and lengths.
    tokenizer: the policy's.
    context: tokens the policy can read.

  Raises:
    UserError: a bad source, none left, one that leaves no room for an answer.
  """
  found = prompts.load_prompts(
    config.prompts,
    max_chars=config.max_prompt_chars,
    unique=config.deduplicate,
    seed=config.seed,
    limit=config.num_prompts,
    limit_per_set=config.num_prompts_per_set,
    holdout=None if config.holdout < 0 else config.holdout,
    tokenizer=tokenizer,
    max_bad_share=config.max_bad_share,
  )
  texts = tuple(config.system_prompt + row.prompt for row in found.rows)
  aside = config.evaluation.num_prompts if config.evaluation.interval else 0
  if len(texts) <= aside:
    raise UserError(
      f"config.evaluation.num_prompts keeps {aside} prompts aside, but "
      f"config.prompts gives {len(texts)}; lower it or give more prompts"
    )
  check_lengths(config, texts, tokenizer, context)
  print(f"{config.prompts}: {found}")
  # A prompt may stand there twice where duplicates are allowed.
  kept = set(texts[:aside])
  train = tuple(text for text in texts[aside:] if text not in kept)
  if not train:
    raise UserError(
      f"config.prompts gives the {aside} prompts that are kept aside again and "
      "again and no other; lower config.evaluation.num_prompts or give more"
    )
  return Questions(train, texts[:aside])


def check_lengths(
  config: OnlineConfig,
  texts: tuple[str, ...],
  tokenizer: Tokenizer,
  context: int,
) -> None:
  """Makes sure that every prompt leaves room for its answer.

  In the model's context for all of `sampling.max_new_tokens`, in a training
  text of `max_length` for one token, since answers are cut there.

  Raises:
    UserError: how many do not, the first of them, and what to change.
  """
  new = config.sampling.max_new_tokens
  if new >= context:
    raise UserError(
      f"config.sampling.max_new_tokens must be below the policy's context of "
      f"{context} tokens, got {new}; lower it"
    )
  limit = min(context - new, config.max_length - 1)
  why = f"the policy's context of {context} less max_new_tokens={new}"
  if limit < context - new:
    why = f"config.max_length={config.max_length} less one"
  lengths = [len(ids) for ids in tokenizer.encode_prompts(texts)]
  long = [i for i, length in enumerate(lengths) if length > limit]
  if long:
    raise UserError(
      f"config.prompts: {len(long)} of {len(texts)} prompts from "
      f"{config.prompts} have more than {limit} tokens ({why}), the first "
      f"{lengths[long[0]]}: {texts[long[0]][:_SHOWN]!r}; lower "
      f"config.max_prompt_chars, which is {config.max_prompt_chars}, so that "
      "they are left out"
    )
