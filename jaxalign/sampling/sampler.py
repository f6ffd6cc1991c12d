"""The sampler as Python sees it: lists of token ids in, numpy arrays out."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.core.types import Params, Samples, SamplingParams
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.sampling import decode
from jaxalign.sampling import state as state_lib

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

NumpyPrefix = tuple[np.ndarray, np.ndarray]  # a `decode.Prefix` to be


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Draws completions; compiles once per bucket of prompts and lengths.

  Attributes:
    model: a causal language model.
    prompt_buckets: prompts are padded to the next of these lengths, and to
      the model's context where that comes first.
    new_token_buckets: likewise for `max_new_tokens`.
    mesh: where the parameters lie, if that is more than one device; the rows
      are split over its batch axes.
  """

  model: Model
  prompt_buckets: tuple[int, ...] = BUCKETS
  new_token_buckets: tuple[int, ...] = BUCKETS
  mesh: Mesh | None = None

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: SamplingParams,
    key: jax.Array,
    *,
    samples_per_prompt: int = 1,
    prompt_ids: Sequence[int] | None = None,
    prefix: Sequence[int] = (),
    first_sample: int = 0,
  ) -> Samples:
    """Draws `samples_per_prompt` completions of every prompt.

    Args:
      params: the model's parameters.
      prompts: token ids, at least one a prompt.
      settings: see `sampling.settings.make`.
      key: the run's key folded with the step.
      samples_per_prompt: S.
      prompt_ids: numbers that stand for the prompts in the noise; by default
        their places in the list.
      prefix: few-shot tokens in front of every prompt; read once.
      first_sample: number of the first sample.

    Returns:
      `Samples` of numpy arrays, P·S rows, row p S + s for sample s of prompt
      p; as many columns as `max_new_tokens`.

    Raises:
      UserError: a prompt is empty or does not fit into the context.
    """
    inputs = self.prepare(prompts, prompt_ids, prefix)
    wanted = int(settings.max_new_tokens)
    samples = self._jitted.sample(
      params,
      *jax.device_put((*inputs[:3], settings)),
      key,
      *jax.device_put((inputs[3], np.int32(first_sample))),
      samples_per_prompt=samples_per_prompt,
      capacity=self.capacity(wanted),
    )
    rows = len(prompts) * samples_per_prompt
    samples = jax.tree.map(lambda x: x[:rows], jax.device_get(samples))
    return jax.tree.map(lambda x: x[:, :wanted] if x.ndim > 1 else x, samples)

  def stream(
    self,
    params: Params,
    prompt: Sequence[int],
    settings: SamplingParams,
    key: jax.Array,
  ) -> Iterator[int]:
    """Yields the tokens of one sample of `prompt` as they are drawn.

    The same tokens as `__call__` returns for sample 0 of prompt 0.

    Raises:
      UserError: the prompt is empty or does not fit into the context.
    """
    inputs = self.prepare([prompt], None, ())
    settings_ = jax.device_put(settings)
    fixed, state = self._jitted.begin(
      params,
      *jax.device_put(inputs[:3]),
      settings_,
      key,
      samples_per_prompt=1,
      capacity=self.capacity(int(settings.max_new_tokens)),
    )
    layers = self._jitted.unstack(params)
    while True:
      yield int(jax.device_get(state_lib.last_tokens(state))[0])
      if jax.device_get(state.done)[0]:
        return
      state = self._jitted.advance(params, layers, fixed, state, settings_)

  def prepare(
    self,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int] | None,
    prefix: Sequence[int],
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, NumpyPrefix | None]:
    """Pads prompts to their bucket: tokens, mask, ids, prefix."""
    context = self.model.config.max_positions
    for number, prompt in enumerate(prompts):
      self._check(number, len(prompt), len(prefix), context)
    width = max(len(prompt) for prompt in prompts)
    width = min(_bucket(self.prompt_buckets, width), context)
    # Rows without a token are finished before they start.
    rows = _next_power_of_two(len(prompts))
    ids = np.arange(len(prompts)) if prompt_ids is None else prompt_ids
    tokens, mask = _pad(prompts, rows, width)
    ids = np.pad(np.asarray(ids, np.int32), (0, rows - len(prompts)))
    if len(prefix) == 0:
      return tokens, mask, ids, None
    width = min(_bucket(self.prompt_buckets, len(prefix)), context)
    front, real = _pad([prefix], 1, width)
    return tokens, mask, ids, (front[0], real[0])

  def capacity(self, max_new_tokens: int) -> int:
    """The bucket of new tokens that holds `max_new_tokens`."""
    return _bucket(self.new_token_buckets, max_new_tokens)

  def _check(self, number, length, prefix, context):
    if length == 0:
      raise UserError(
        f"prompt {number} is empty; a prompt needs at least one token"
      )
    if length + prefix >= context:
      few_shot = f" behind a prefix of {prefix}" if prefix else ""
      raise UserError(
        f"prompt {number} has {length} tokens{few_shot}, but prompt and answer"
        f" must fit into the model's context of {context}; shorten it or take"
        " a model with a longer context"
      )

  @functools.cached_property
  def _jitted(self) -> "_Programs":
    return _Programs(self.model, self.mesh)


class _Programs:
  """The compiled functions of one model; the only place that jits them."""

  def __init__(self, model: Model, mesh: Mesh | None):
    static = ("samples_per_prompt", "capacity")
    sample = functools.partial(decode.sample, model, mesh=mesh)
    begin = functools.partial(decode.begin, model, mesh=mesh)
    advance = functools.partial(decode.advance, model)
    self.sample = jax.jit(sample, static_argnames=static)
    self.begin = jax.jit(begin, static_argnames=static)
    self.unstack = jax.jit(functools.partial(decode.unstack, model))
    self.advance = jax.jit(advance, donate_argnums=3)


def _bucket(buckets: Sequence[int], size: int) -> int:
  """The smallest bucket that holds `size`; multiples of the last beyond it."""
  last = max(buckets)
  return min((b for b in buckets if b >= size), default=-(-size // last) * last)


def _next_power_of_two(count: int) -> int:
  return 1 << (count - 1).bit_length()


def _pad(
  texts: Sequence[Sequence[int]], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Left-padded ids `[rows, width]` and their mask."""
  tokens = np.zeros((rows, width), np.int32)
  mask = np.zeros((rows, width), bool)
  for row, text in enumerate(texts):
    tokens[row, width - len(text) :] = text
    mask[row, width - len(text) :] = True
  return tokens, mask
