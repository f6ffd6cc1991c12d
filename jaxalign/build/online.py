"""The tools of the runs that learn from the policy's own answers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.build import models
from jaxalign.build.questions import Questions
from jaxalign.config import OnlineConfig
from jaxalign.core import best_of
from jaxalign.core.types import Answers, Metrics, Params
from jaxalign.data import batches
from jaxalign.runtime.answers import Score, Tools
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler
from jaxalign.scoring.scorer import Scorer, weighted
from jaxalign.text import similarity, templates, truncate

EVALUATION_KEY = 2**31 - 1  # folded into the run's key; no step has it


@dataclasses.dataclass(frozen=True)
class Scorers:
  """The reward models of a run, none of them read yet."""

  chooses: tuple[models.Opened, ...]
  watches: tuple[models.Opened, ...]  # may be empty


def open_scorers(config: OnlineConfig, mesh: Mesh) -> Scorers:
  """Opens every reward model that the config names.

  Raises:
    UserError: what keeps one of them from being loaded.
  """
  opened = lambda names, field: tuple(
    models.open_scorer(name, mesh, config.scoring.dtype, field)
    for name, _ in names
  )
  return Scorers(
    opened(config.reward_models, "reward_model"),
    opened(config.test_reward_models, "test_reward_model"),
  )


def make_tools(
  config: OnlineConfig,
  policy: models.Loaded,
  mesh: Mesh,
  questions: Questions,
  scorers: Scorers,
  encode: Callable[..., Any],
) -> Tools:
  """Everything that an algorithm asks for; `encode` is its own."""
  several = mesh if mesh.size > 1 else None
  sampler = _sampler(config, policy, several)
  sample = functools.partial(_sample, config, policy, sampler)
  score = _scorers(config, config.reward_models, scorers.chooses, several)
  held_out = None
  if scorers.watches:
    held_out = _scorers(
      config, config.test_reward_models, scorers.watches, several
    )
  train = questions.train
  size = config.prompts_per_step or len(train)

  def of_step(step: int) -> list[str]:
    rows = batches.rows_of_step(config.seed, step, size, len(train))
    return [train[i] for i in rows]

  evaluate = None
  if questions.aside:
    evaluate = functools.partial(
      _evaluate,
      config.evaluation.best_of_n,
      jax.random.fold_in(jax.random.key(config.seed), EVALUATION_KEY),
      sample,
      score,
      held_out,
      list(questions.aside),
    )
  return Tools(
    prompts=of_step,
    sample=sample,
    score=score,
    held_out=held_out,
    encode=encode,
    diversity=_diversity,
    evaluate=evaluate,
  )


def _sampler(
  config: OnlineConfig, policy: models.Loaded, mesh: Mesh | None
) -> Sampler:
  new = config.sampling.max_new_tokens
  return Sampler(
    policy.model,
    prompt_buckets=config.sampling.length_buckets,
    new_token_buckets=(new,),
    mesh=mesh,
  )


def _sample(
  config: OnlineConfig,
  policy: models.Loaded,
  sampler: Sampler,
  params: Params,
  questions: list[str],
  each: int,
  key: jax.Array,
) -> Answers:
  """Draws `each` answers of every question and cuts them as text."""
  tokenizer, s = policy.tokenizer, config.sampling
  marks = (templates.HUMAN, templates.ASSISTANT)
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  wanted = settings.make(
    temperature=s.temperature,
    top_p=s.top_p,
    top_k=s.top_k,
    repetition_penalty=s.repetition_penalty,
    no_repeat_ngram=s.no_repeat_ngram,
    min_new_tokens=s.min_new_tokens,
    max_new_tokens=s.max_new_tokens,
    eos_ids=eos,
    # Sampling may stop early where the text would be cut anyway.
    stops=[] if s.truncation == "none" else tokenizer.encode_batch(marks),
    pad_id=tokenizer.pad_id,
  )
  # At an evaluation there may be many more prompts than in a superbatch.
  group = s.batch_prompts or config.prompts_per_step or len(questions)
  ids = tokenizer.encode_prompts(questions)
  parts = [
    sampler(
      params,
      ids[i : i + group],
      wanted,
      key,
      samples_per_prompt=each,
      prompt_ids=range(i, min(i + group, len(ids))),
    )
    for i in range(0, len(ids), group)
  ]
  samples = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  raw = tokenizer.decode_batch(
    [t[:n] for t, n in zip(samples.tokens, samples.lengths, strict=True)]
  )
  texts = [truncate.truncate(text, s.truncation) for text in raw]
  ended = [
    bool(finish) or text != whole.strip()
    for finish, text, whole in zip(samples.finish, texts, raw, strict=True)
  ]
  return Answers(questions, texts, samples, ended)


def _scorers(
  config: OnlineConfig,
  names: Sequence[tuple[str, float]],
  opened: Sequence[models.Opened],
  mesh: Mesh | None,
) -> Score:
  scoring, found = config.scoring, []
  for (name, _), unread in zip(names, opened, strict=True):
    loaded = unread.load()
    encoder = functools.partial(
      loaded.tokenizer.encode_rewards,
      encoding=scoring.encoding,
      max_length=scoring.max_length,
      eos=loaded.model.config.head == "score_eos",
    )
    found.append(
      Scorer(
        loaded.model,
        loaded.params,
        encoder,
        name=name,
        max_length=scoring.max_length,
        lengths=scoring.length_buckets,
        rows=scoring.batch_size,
        mesh=mesh,
      )
    )
  return weighted(found, [weight for _, weight in names])


def _diversity(asked: list[str], texts: list[str], kept: list[str]) -> Metrics:
  """How alike answers to different prompts are, and how repetitive each."""
  found = {
    "diversity/overlap": similarity.mean_overlap(asked, texts),
    "diversity/repetition": float(
      np.mean([similarity.repetition(text) for text in texts])
    ),
    "diversity/meteor": similarity.mean_meteor(kept, max_pairs=200),
  }
  return {name: x for name, x in found.items() if x is not None}


def _evaluate(
  n: int,
  key: jax.Array,
  sample: Callable[..., Answers],
  score: Score,
  held_out: Score | None,
  questions: list[str],
  params: Params,
) -> Metrics:
  """Best of 1, 2, 4 … N on prompts kept aside, the same noise every time."""
  answers = sample(params, questions, n, key)
  scores = np.reshape(score(answers.asked, answers.texts), (-1, n))
  values = {"eval_score": scores}
  if held_out is not None:
    tested = held_out(answers.asked, answers.texts)
    values["eval_test_score"] = np.reshape(tested, (-1, n))
  found = {}
  for name, worth in values.items():
    found[f"{name}/mean"] = float(worth.mean())
    for size in best_of.sizes(n):
      mean = best_of.expected(scores, worth, size)
      found[f"{name}/best_of_{size}"] = mean
  overlap = similarity.mean_overlap(answers.asked, answers.texts)
  if overlap is not None:  # None where one prompt is all there is
    found["eval_diversity/overlap"] = overlap
  return found
