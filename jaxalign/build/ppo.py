"""What a PPO run is made of: its value model, its answers as rollouts."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.ppo import Rollout
from jaxalign.build import models
from jaxalign.build.session import put_rows
from jaxalign.build.supervised import text_batch
from jaxalign.config import PPOConfig
from jaxalign.core.types import Answers, Params
from jaxalign.data import batches
from jaxalign.data.encode import Encoded
from jaxalign.errors import UserError
from jaxalign.models import heads, lora
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime.answers import Scored

Decode = Callable[[Sequence[int]], str]

PROBE = (
  "\n\nHuman: Is 7 a prime number?\n\nAssistant: Yes, it is; so are 2 and 5."
)


@dataclasses.dataclass(frozen=True)
class Critic:
  """A value model: a head on the policy, or a model of its own."""

  model: Model | None  # None = a head on the policy's states
  params: Params  # empty where advantages need no values

  def beside(self, policy: Params) -> Params:
    """One tree of both; see `heads.VALUE`."""
    return policy | ({heads.VALUE: self.params} if self.params else {})


def open_critic(
  config: PPOConfig, opened: models.Opened, mesh: Mesh
) -> Callable[[models.Loaded], Critic]:
  """What makes the value model once the policy is read.

  Raises:
    UserError: `config.value_model` cannot be loaded, has no score head, is no
      causal model or has other tokens than the policy.
  """
  if config.advantage != "gae":
    return lambda policy: Critic(None, {})
  width = opened.model.config.hidden_size
  head = {"kernel": np.zeros((width, 1), np.float32)}
  if config.value_model == "shared":
    values = {"value_head": head | {"bias": np.zeros(1, np.float32)}}
    return lambda policy: Critic(None, meshes.put(values, mesh))
  if config.value_model == "separate":
    model = opened.model.without_lora().replace(head="score_last")

    def copy(policy: models.Loaded) -> Critic:
      base = lora.strip(policy.params)
      trunk = {k: base[k] for k in model.shapes if k != "score_head"}
      # The policy's own arrays are given away with the first update.
      trunk = jax.tree.map(lambda x: x.copy(), trunk)
      return Critic(model, trunk | meshes.put({"score_head": head}, mesh))

    return copy
  found = models.open_scorer(
    config.value_model, mesh, config.precision.params, "value_model"
  )
  _check_critic(config.value_model, found, opened)
  compute = models.compute_dtype(config.precision.compute)
  model = found.model.replace(dtype=compute, remat=config.remat)
  return lambda policy: Critic(model, found.read())


def _check_critic(
  name: str, found: models.Opened, policy: models.Opened
) -> None:
  if not found.model.config.head.startswith("score_") or not hasattr(
    found.model.config, "tied"
  ):
    raise UserError(
      f"config.value_model: {name} does not read from left to right, so it has "
      "no value for half an answer; give a causal reward model, shared or "
      "separate"
    )
  ours, theirs = (loaded.tokenizer.encode(PROBE) for loaded in (policy, found))
  if ours != theirs:
    raise UserError(
      f"config.value_model: {name} has other tokens than the policy; give a "
      "reward model trained from the policy, or separate for a copy of it"
    )


def exact(
  sample: Callable[..., Answers], decode: Decode
) -> Callable[..., Answers]:
  """A sampler whose texts are those of whole tokens.

  A text that is cut may end inside a token. What is rewarded has to be what is
  trained on, so such a token goes too.
  """

  def run(*args) -> Answers:
    answers = sample(*args)
    drawn = answers.samples
    rows = [
      ids[:length].tolist()
      for ids, length in zip(drawn.tokens, drawn.lengths, strict=True)
    ]
    cut = [
      cut_tokens(decode, ids, text)
      for ids, text in zip(rows, answers.texts, strict=True)
    ]
    return dataclasses.replace(
      answers,
      texts=[text for _, text in cut],
      trained=[count for count, _ in cut],
    )

  return run


def cut_tokens(
  decode: Decode, ids: Sequence[int], text: str
) -> tuple[int, str]:
  """How many ids make up `text`, the start of what they say, and what they say.

  Returns:
    The number of ids, and their text without surrounding blanks: `text`, or
    a little less of it where the cut falls inside a token.
  """
  if decode(ids).strip() == text:
    return len(ids), text
  low, high = 0, len(ids)
  while low < high:
    middle = (low + high) // 2
    if len(decode(ids[:middle]).strip()) < len(text):
      low = middle + 1
    else:
      high = middle
  said = decode(ids[:low]).strip()
  if said == text or low == 0:
    return low, said
  return low - 1, decode(ids[: low - 1]).strip()


def encode_rollout(
  config: PPOConfig, policy: models.Loaded, mesh: Mesh, scored: Scored
) -> tuple[np.ndarray, Rollout]:
  """The answers that are learned from, by index, and the step's rollout.

  Raises:
    ValueError: none of them is usable.
  """
  answers, drawn = scored.answers, scored.answers.samples
  assert answers.trained is not None
  flat = scored.scores.reshape(-1)
  usable = np.isfinite(flat) & (np.array(answers.trained) > 0)
  if not usable.any():
    raise ValueError("every completion was empty or had no finite score")
  asked = policy.tokenizer.encode_prompts(answers.prompts)
  each, rows = len(flat) // len(asked), []
  for i, count in enumerate(answers.trained):
    start, count = asked[i // each], count if usable[i] else 0
    ids = (*start, *drawn.tokens[i][:count].tolist())
    mask = (False,) * len(start) + (True,) * count
    rows.append(Encoded(ids, len(start), mask, True))
  width = batches.bucket_length(max(len(row) for row in rows))
  logps = np.zeros((2, len(rows), width), np.float32)
  for i, row in enumerate(rows):
    here = slice(row.prompt_length, len(row))
    count = len(row) - row.prompt_length
    logps[0, i, here] = drawn.model_logps[i][:count]
    logps[1, i, here] = drawn.sampling_logps[i][:count]
  micro = config.micro_rows
  cut: Callable = lambda x: x.reshape(-1, micro, *x.shape[1:])
  members = [[row] for row in rows]
  pad = policy.tokenizer.pad_id
  rollout = Rollout(
    text=text_batch(members, width, pad, len(rows) // micro),
    score=cut(np.where(usable, flat, 0).astype(np.float32)),
    ended=cut(np.array(answers.ended)),
    model_logps=cut(logps[0]),
    sampling_logps=cut(logps[1]),
  )
  return np.flatnonzero(usable), put_rows(mesh, rollout, 1)
