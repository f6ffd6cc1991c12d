"""What an online method samples with and scores by."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from jaxalign.config.online import OnlineConfig, SamplingConfig
from jaxalign.core.types import Params, SamplingParams
from jaxalign.data.prompts import load_prompts
from jaxalign.data.rows import PromptRow
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.evals.best_of_n import BestOfN
from jaxalign.models.model import Model
from jaxalign.sampling import settings
from jaxalign.sampling.generator import Generator
from jaxalign.sampling.sampler import Sampler
from jaxalign.scoring.function import RewardFunction
from jaxalign.setup.models import ModelSpec
from jaxalign.setup.rewards import (
  Rewards,
  check_prompts,
  open_rewards,
  read_rewards,
)
from jaxalign.training.rollout import RolloutSource
from jaxalign.training.run import Evaluator

EVALUATION_KEY = 2**31 - 1  # folded into the run's key; no step has it
_SHOWN = 60  # characters of a prompt in a message


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """Prompts and rewards of an online run; no parameter is read.

  Attributes:
    config: of the run.
    model: the policy, without its parameters.
    mesh: the devices.
    prompts: to train on, system text included.
    eval_prompts: for evaluations, never trained on.
    prompt_length: tokens of the longest of all prompts.
    reward_models: what is trained on, in the order of `config.reward_models`;
      models and functions.
    heldout_reward_models: what is never trained against; may be empty.
  """

  config: OnlineConfig
  model: Model
  mesh: Mesh
  prompts: tuple[PromptRow, ...]
  eval_prompts: tuple[PromptRow, ...]
  prompt_length: int
  reward_models: Rewards
  heldout_reward_models: Rewards

  @property
  def digest_rows(self) -> list[object]:
    """What tells the prompts from others: texts, and columns that they carry.

    Reward functions may read the columns.
    """
    return [
      [row.prompt, row.columns] if row.columns else row.prompt
      for row in self.prompts
    ]

  @property
  def files(self) -> tuple[str, ...]:
    """Digests of the files of the reward functions."""
    rewards = (*self.reward_models, *self.heldout_reward_models)
    return tuple(x.digest for x in rewards if isinstance(x, RewardFunction))

  @property
  def rows(self) -> int:
    """Completions in a step."""
    prompts = self.config.prompts_per_step or len(self.prompts)
    return prompts * self.config.samples_per_prompt

  def load(
    self,
    tokenizer: Tokenizer,
    *,
    whole_tokens: bool = False,
    params_of: Callable[[ModelSpec], Params] = ModelSpec.read,
  ) -> RolloutSource:
    """Reads the reward models.

    Args:
      tokenizer: the policy's; its parameters are handed over with each call.
      whole_tokens: see `Generator`.
      params_of: see `read_rewards`.
    """
    config, sampling = self.config, self.config.sampling
    mesh = self.mesh if self.mesh.size > 1 else None
    parts = self.mesh.shape["fsdp"] * self.mesh.shape["sequence"]
    gather = config.mesh.gather_for_generation or parts == 1
    if not gather:
      print(
        f"sampling: layers stay split over {parts} devices and are gathered at "
        "each token, during other computation as far as there is any"
      )
    # Prompts have a program for each bucket, completions have one length.
    sampler = Sampler(
      self.model,
      prompt_buckets=sampling.length_buckets,
      new_token_buckets=(sampling.max_new_tokens,),
      mesh=mesh,
      compact=sampling.compact and mesh is None,
      gather=gather,
    )
    heldout = None
    if self.heldout_reward_models:
      heldout = read_rewards(
        config.test_reward_models,
        self.heldout_reward_models,
        config.scoring,
        mesh,
        params_of,
      )
    return RolloutSource(
      self.prompts,
      Generator(
        sampler,
        tokenizer,
        sampling_params(sampling, tokenizer),
        sampling.truncation,
        sampling.batch_prompts or config.prompts_per_step,
        whole_tokens,
      ),
      read_rewards(
        config.reward_models,
        self.reward_models,
        config.scoring,
        mesh,
        params_of,
      ),
      heldout,
    )

  def evaluators(self, source: RolloutSource) -> list[Evaluator]:
    """The evaluations that the config asks for, of what `load` gave."""
    config = self.config
    if not self.eval_prompts:
      return []
    key = jax.random.key(config.seed)
    return [
      BestOfN(
        config.evaluation.interval,
        config.evaluation.best_of_n,
        source.generator,
        source.train_reward,
        source.heldout_reward,
        self.eval_prompts,
        jax.random.fold_in(key, EVALUATION_KEY),
      )
    ]


def describe_rollout(config: OnlineConfig, policy: ModelSpec) -> RolloutSpec:
  """Opens the rewards and loads the prompts.

  Raises:
    UserError: a model, a function or prompts that cannot be used.
  """
  # The train reward, then the held-out one.
  mesh, scoring = policy.mesh, config.scoring
  train_rewards = open_rewards(
    config.reward_models,
    mesh,
    scoring,
    "config.reward_model",
    attention=config.attention,
  )
  heldout = open_rewards(
    config.test_reward_models,
    mesh,
    scoring,
    "config.test_reward_model",
    "reward-test",
    config.attention,
  )
  # Prompts, which leave room for a completion in the policy's context; with
  # the columns of their rows where a function may ask for them.
  rewards = (*train_rewards, *heldout)
  functions = [x for x in rewards if isinstance(x, RewardFunction)]
  columns = [name for function in functions for name in function.columns]
  context = policy.model.config.max_positions
  train, aside, length = split_prompts(
    config, policy.tokenizer, context, columns if functions else None
  )
  check_prompts(rewards, (*train, *aside), config.prompts)
  return RolloutSpec(
    config,
    policy.model,
    mesh,
    train,
    aside,
    length,
    train_rewards,
    heldout,
  )


def sampling_params(
  sampling: SamplingConfig, tokenizer: Tokenizer
) -> SamplingParams:
  """The sampler's traced settings."""
  # Sampling may stop early where the text would be cut anyway.
  cuts, turns = sampling.truncation != "none", tokenizer.format.turns
  return settings.make(
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    top_k=sampling.top_k,
    repetition_penalty=sampling.repetition_penalty,
    no_repeat_ngram=sampling.no_repeat_ngram,
    min_new_tokens=sampling.min_new_tokens,
    max_new_tokens=sampling.max_new_tokens,
    eos_ids=tokenizer.end_ids,
    stops=settings.fitting(tokenizer.encode_batch(turns)) if cuts else (),
    pad_id=tokenizer.pad_id,
  )


def split_prompts(
  config: OnlineConfig,
  tokenizer: Tokenizer,
  context: int,
  columns: Sequence[str] | None = None,
) -> tuple[tuple[PromptRow, ...], tuple[PromptRow, ...], int]:
  """Loads the prompts and sets those for evaluations aside.

  Every prompt has to leave room for its completion: for all of
  `sampling.max_new_tokens` in the model's context, and for one token in a
  training text of `max_length`, because completions are cut there.

  Args:
    config: its sources, filters and lengths.
    tokenizer: the policy's.
    context: tokens the policy can read.
    columns: see `load_prompts`.

  Returns:
    Prompts to train on, prompts to evaluate on, and tokens of the longest.
    `config.system_prompt` is in their texts and in their messages.

  Raises:
    UserError: a bad source, none left, one that leaves no room.
  """
  new = config.sampling.max_new_tokens
  if new >= context:
    raise UserError(
      f"config.sampling.max_new_tokens must be below the policy's context of "
      f"{context} tokens, got {new}; lower it"
    )
  # Loading; a holdout of -1 leaves each set the number that is its own.
  found = load_prompts(
    config.prompts,
    max_chars=config.max_prompt_chars + len(config.system_prompt),
    unique=config.deduplicate,
    seed=config.seed,
    limit=config.num_prompts,
    limit_per_set=config.num_prompts_per_set,
    holdout=None if config.holdout < 0 else config.holdout,
    system=config.system_prompt,
    tokenizer=tokenizer,
    max_bad_share=config.max_bad_share,
    columns=columns,
  )
  rows, texts = found.rows, [row.prompt for row in found.rows]
  # The first ones are for evaluations; the seed has shuffled them all.
  aside = config.evaluation.num_prompts if config.evaluation.interval else 0
  if len(texts) <= aside:
    limited = 0 < config.num_prompts <= aside
    of = f"num_prompts={config.num_prompts}" if limited else "prompts"
    raise UserError(
      f"config.evaluation.num_prompts keeps {aside} prompts aside, but "
      f"config.{of} gives {len(texts)}; lower the one or raise the other"
    )
  # What a prompt may have at most, and which of the two limits that is.
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
  print(f"{config.prompts}: {found}")
  # Where duplicates are allowed, a prompt may occur on both sides.
  kept = set(texts[:aside])
  train = tuple(row for row in rows[aside:] if row.prompt not in kept)
  if not train:
    raise UserError(
      f"config.prompts holds no prompt but the {aside} that are kept aside; "
      "lower config.evaluation.num_prompts or give more"
    )
  return train, rows[:aside], max(lengths)
