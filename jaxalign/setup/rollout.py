"""What an online method samples with and scores by."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from jaxalign.config.online import OnlineConfig, SamplingConfig
from jaxalign.core.types import SamplingParams
from jaxalign.data.prompts import load_prompts
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.evals.best_of_n import BestOfN
from jaxalign.models.model import Model
from jaxalign.sampling import settings
from jaxalign.sampling.generator import Generator
from jaxalign.sampling.sampler import Sampler
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.scoring.scorer import Scorer
from jaxalign.setup.models import (
  Loaded,
  ModelSpec,
  choose_encoding,
  open_reward_model,
)
from jaxalign.text import templates
from jaxalign.text.templates import Message
from jaxalign.training.rollout import RolloutSource
from jaxalign.training.run import Evaluator

EVALUATION_KEY = 2**31 - 1  # folded into the run's key; no step has it
_SHOWN = 60  # characters of a prompt in a message


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """Prompts and reward models of an online run; no parameter is read.

  Attributes:
    config: of the run.
    model: the policy, without its parameters.
    mesh: the devices.
    prompts: to train on, system text included.
    eval_prompts: for evaluations, never trained on.
    prompt_length: tokens of the longest of all prompts.
    dialogues: the role lists that prompts were rendered from, by their text.
    reward_models: what is trained on, in the order of `config.reward_models`.
    heldout_reward_models: what is never trained against; may be empty.
  """

  config: OnlineConfig
  model: Model
  mesh: Mesh
  prompts: tuple[str, ...]
  eval_prompts: tuple[str, ...]
  prompt_length: int
  reward_models: tuple[ModelSpec, ...]
  heldout_reward_models: tuple[ModelSpec, ...]
  dialogues: Mapping[str, Sequence[Message]]

  @property
  def rows(self) -> int:
    """Completions in a step."""
    prompts = self.config.prompts_per_step or len(self.prompts)
    return prompts * self.config.samples_per_prompt

  def load(
    self, policy: Loaded, *, whole_tokens: bool = False
  ) -> RolloutSource:
    """Reads the reward models.

    Args:
      policy: its parameters are handed over with each call later.
      whole_tokens: see `Generator`.
    """
    config, tokenizer = self.config, policy.tokenizer
    assert tokenizer is not None
    sampling = config.sampling
    mesh = self.mesh if self.mesh.size > 1 else None
    # Prompts have a program for each bucket, completions have one length.
    sampler = Sampler(
      self.model,
      prompt_buckets=sampling.length_buckets,
      new_token_buckets=(sampling.max_new_tokens,),
      mesh=mesh,
    )
    heldout = None
    if self.heldout_reward_models:
      heldout = self._read_rewards(
        config.test_reward_models, self.heldout_reward_models, mesh
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
      self._read_rewards(config.reward_models, self.reward_models, mesh),
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

  def _read_rewards(
    self,
    names: tuple[tuple[str, float], ...],
    models: tuple[ModelSpec, ...],
    mesh: Mesh | None,
  ) -> RewardModel:
    scoring = self.config.scoring
    scorers = tuple(
      Scorer(
        spec.model,
        spec.read(),
        spec.tokenizer,
        spec.encoding,
        name,
        max_length=scoring.max_length,
        lengths=scoring.length_buckets,
        rows=scoring.batch_size,
        mesh=mesh,
        dialogues=self.dialogues,
      )
      for (name, _), spec in zip(names, models, strict=True)
    )
    return RewardModel(scorers, tuple(weight for _, weight in names))


def describe_rollout(config: OnlineConfig, policy: ModelSpec) -> RolloutSpec:
  """Opens the reward models and loads the prompts.

  Raises:
    UserError: a model or prompts that cannot be used.
  """

  def open_all(
    names: tuple[tuple[str, float], ...], field: str, lab: str
  ) -> tuple[ModelSpec, ...]:
    dtype = config.scoring.dtype
    found = []
    for name, _ in names:
      spec = open_reward_model(name, policy.mesh, dtype, f"config.{field}", lab)
      encoding = choose_encoding(
        config.scoring.encoding,
        spec.tokenizer,
        spec.model,
        f"config.{field}: {name}",
      )
      found.append(dataclasses.replace(spec, encoding=encoding))
    return tuple(found)

  # Reward models: the train reward, then the held-out one.
  reward_models = open_all(config.reward_models, "reward_model", "reward-train")
  heldout = open_all(
    config.test_reward_models, "test_reward_model", "reward-test"
  )
  # Prompts, which leave room for a completion in the policy's context.
  context = policy.model.config.max_positions
  train, aside, length, dialogues = split_prompts(
    config, policy.tokenizer, context
  )
  for spec in (*reward_models, *heldout):
    check_dialogues(spec.tokenizer, dialogues)
  return RolloutSpec(
    config,
    policy.model,
    policy.mesh,
    train,
    aside,
    length,
    reward_models,
    heldout,
    dialogues,
  )


def check_dialogues(
  tokenizer: Tokenizer, dialogues: Mapping[str, Sequence[Message]]
) -> None:
  """Refuses role lists that a reward model's format cannot write.

  Raises:
    UserError: a role or a content that it does not have.
  """
  answer = {"role": "assistant", "content": "yes"}
  for messages in dialogues.values():
    try:
      tokenizer.render_chat([*messages, answer])
      # What models that read two segments are given.
      templates.from_messages(list(messages), reply=True)
    except (KeyError, TypeError) as error:
      roles = ", ".join(str(turn["role"]) for turn in messages)
      raise UserError(
        f"config.prompts: a prompt has the roles {roles}, which the reward "
        f"model {tokenizer.name} cannot be given; need text by system, user "
        "and assistant"
      ) from error


def sampling_params(
  sampling: SamplingConfig, tokenizer: Tokenizer
) -> SamplingParams:
  """The sampler's traced settings."""
  # Sampling may stop early where the text would be cut anyway.
  cuts = sampling.truncation != "none"
  return settings.make(
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    top_k=sampling.top_k,
    repetition_penalty=sampling.repetition_penalty,
    no_repeat_ngram=sampling.no_repeat_ngram,
    min_new_tokens=sampling.min_new_tokens,
    max_new_tokens=sampling.max_new_tokens,
    eos_ids=tokenizer.end_ids,
    stops=tokenizer.encode_batch(tokenizer.format.turns) if cuts else (),
    pad_id=tokenizer.pad_id,
  )


def split_prompts(
  config: OnlineConfig, tokenizer: Tokenizer, context: int
) -> tuple[
  tuple[str, ...], tuple[str, ...], int, Mapping[str, Sequence[Message]]
]:
  """Loads the prompts and sets those for evaluations aside.

  Every prompt has to leave room for its completion: for all of
  `sampling.max_new_tokens` in the model's context, and for one token in a
  training text of `max_length`, because completions are cut there.

  Args:
    config: its sources, filters and lengths.
    tokenizer: the policy's.
    context: tokens the policy can read.

  Returns:
    Prompts to train on, prompts to evaluate on, tokens of the longest, and the
    role lists that some were rendered from.

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
  )
  texts = tuple(row.prompt for row in found.rows)
  # The first ones are for evaluations; the seed has shuffled them all.
  aside = config.evaluation.num_prompts if config.evaluation.interval else 0
  if len(texts) <= aside:
    raise UserError(
      f"config.evaluation.num_prompts keeps {aside} prompts aside, but "
      f"config.prompts gives {len(texts)}; lower it or give more prompts"
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
  train = tuple(text for text in texts[aside:] if text not in kept)
  if not train:
    raise UserError(
      f"config.prompts holds no prompt but the {aside} that are kept aside; "
      "lower config.evaluation.num_prompts or give more"
    )
  dialogues = {row.prompt: row.messages for row in found.rows if row.messages}
  return train, texts[:aside], max(lengths), dialogues
