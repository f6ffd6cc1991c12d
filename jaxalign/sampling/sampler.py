"""The sampler as Python sees it: lists of token ids in, numpy arrays out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import PyTree

from jaxalign.core.types import Params, Samples, SamplingParams
from jaxalign.data.batches import bucket_length, pad_rows
from jaxalign.errors import UserError
from jaxalign.models.config import CausalConfig
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program
from jaxalign.sampling import compaction, decode
from jaxalign.sampling import state as state_lib

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

NumpyPrefix = tuple[np.ndarray, np.ndarray]  # a `decode.Prefix` on the host


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Draws completions; compiles once per bucket of prompts and lengths.

  Attributes:
    model: a causal language model.
    prompt_buckets: prompts are padded to the next of these lengths, and to
      the model's context where that comes first.
    new_token_buckets: the same for `max_new_tokens`.
    mesh: the parameters are sharded over it; so are the rows, over its row
      axes. None = one device.
    compact: rows that have ended leave the batch, see `compaction`: faster
      where completions differ in length, for a few more programs to compile.
      The same random numbers draw the tokens; log-probabilities may differ in
      their last bits, as the matrix products have other shapes. For one device.
    gather: on a mesh, each device holds all layers while it draws, split over
      `tensor` alone. Else they stay split and are gathered one by one at every
      token: slower, and for what does not fit otherwise.
  """

  model: Model
  prompt_buckets: tuple[int, ...] = BUCKETS
  new_token_buckets: tuple[int, ...] = BUCKETS
  mesh: Mesh | None = None
  compact: bool = False
  gather: bool = True

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: SamplingParams,
    key: jax.Array,
    *,
    samples_per_prompt: int = 1,
    prompt_numbers: Sequence[int] | None = None,
    prefix: Sequence[int] = (),
    first_sample: int = 0,
  ) -> Samples:
    """Draws `samples_per_prompt` completions of every prompt.

    Args:
      params: the model's parameters.
      prompts: token ids, at least one per prompt.
      settings: see `sampling.settings.make`.
      key: the run's key folded with the step.
      samples_per_prompt: S.
      prompt_numbers: numbers the prompts for the random keys; by default their
        places in the list.
      prefix: few-shot tokens before every prompt; read once.
      first_sample: number of the first sample.

    Returns:
      `Samples` of numpy arrays, P·S rows, row p S + s for sample s of prompt
      p; as many columns as `max_new_tokens`.

    Raises:
      UserError: a prompt is empty or does not fit into the context.
    """
    inputs = self.prepare(prompts, prompt_numbers, prefix)
    wanted = int(settings.max_new_tokens)
    # Explicit transfers: the training loop forbids implicit ones.
    settings = jax.device_put(settings)
    args = (
      params,
      *jax.device_put(inputs[:3]),
      settings,
      key,
      *jax.device_put((inputs[3], np.int32(first_sample))),
    )
    sizes = {
      "samples_per_prompt": samples_per_prompt,
      "capacity": self.capacity(wanted),
    }
    if self.compact:
      begun = self._jitted.begin(*args, **sizes)
      samples = self._drawn_by_fewer_rows(params, settings, *begun)
    else:
      samples = self._jitted.sample(*args, **sizes)
    # Cutting off filler rows, and columns beyond what was asked for.
    rows = len(prompts) * samples_per_prompt
    samples = jax.tree.map(lambda x: x[:rows], jax.device_get(samples))
    return jax.tree.map(lambda x: x[:, :wanted] if x.ndim > 1 else x, samples)

  def programs(
    self,
    params: Params,
    prompts: int,
    tokens: int,
    settings: SamplingParams,
    samples_per_prompt: int,
    calls: int | float = 1,
  ) -> list[Program]:
    """The programs that a call runs.

    With `compact`, those of the whole batch and of a move to half of it.

    Args:
      params: of the model, as shapes with shardings.
      prompts: P, in one call.
      tokens: of the longest prompt.
      settings: see `sampling.settings.make`.
      samples_per_prompt: S.
      calls: see `Program`.
    """
    *inputs, prefix = self.prepare([[0] * tokens] * prompts, None, ())
    arrays = *inputs, settings, jax.random.key(0), prefix, np.int32(0)
    # Without a sharding, as the arrays of a call have none.
    arguments = params, *_shapes(arrays)
    capacity = self.capacity(int(settings.max_new_tokens))
    static = {"samples_per_prompt": samples_per_prompt, "capacity": capacity}
    drawn = capacity - 1  # the first token is drawn before the loop
    jitted = self._jitted
    if not self.compact:
      return [Program("sample", jitted.sample, arguments, calls, drawn, static)]
    fixed, state = jax.eval_shape(
      functools.partial(jitted.begin, **static), *arguments
    )
    layers = jax.eval_shape(jitted.unstack, params)
    loop = params, layers, fixed, state, _shapes(settings)
    # As if every second prompt's rows had ended.
    rows, groups = len(state.done), compaction.prompt_groups(fixed)
    done = np.arange(rows) * groups // rows % 2 == 1
    kept = compaction.choose(done, groups, max(groups // 2, 1), rows // groups)
    # The parameters' device, which nothing else here would name.
    where = meshes.replicated(jax.tree.leaves(params)[0].sharding.mesh)
    moved = _shapes((fixed, state, *jax.device_put(kept)), where)
    return [
      Program("sample: begin", jitted.begin, arguments, calls, 0, static),
      Program("sample: unstack", jitted.unstack, (params,), calls),
      Program("sample", jitted.advance_until_few, loop, calls, drawn),
      Program("sample: fewer rows", jitted.take, moved, calls),
    ]

  def _drawn_by_fewer_rows(
    self,
    params: Params,
    settings: SamplingParams,
    fixed: state_lib.Fixed,
    state: state_lib.State,
  ) -> Samples:
    """Draws all tokens after the first, in ever smaller batches."""
    layers = self._jitted.unstack(params)
    samples, rows = None, np.arange(len(state.done))
    while True:
      # The state is given away, and what has been drawn so far comes back.
      state, *drawn = self._jitted.advance_until_few(
        params, layers, fixed, state, settings
      )
      part, (prompts, each), done = jax.device_get((*drawn, state.done))
      if samples is None:
        samples = jax.tree.map(np.array, part)
      else:
        for whole, new in zip(
          jax.tree.leaves(samples), jax.tree.leaves(part), strict=True
        ):
          whole[rows] = new
      if done.all():
        return samples
      groups = compaction.prompt_groups(fixed)
      kept = compaction.choose(done, groups, int(prompts), int(each))
      fixed, state = self._jitted.take(fixed, state, *jax.device_put(kept))
      rows = rows[kept[1]]

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
    # Reading the prompt draws the first token.
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
      # The state is given away to `advance`, so it is read before.
      if jax.device_get(state.done)[0]:
        return
      state = self._jitted.advance(params, layers, fixed, state, settings_)

  def prepare(
    self,
    prompts: Sequence[Sequence[int]],
    prompt_numbers: Sequence[int] | None,
    prefix: Sequence[int],
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, NumpyPrefix | None]:
    """Pads prompts to their bucket: tokens, mask, ids, prefix."""
    context = self.check(prompts, prefix)
    width = max(len(prompt) for prompt in prompts)
    width = min(bucket_length(width, self.prompt_buckets), context)
    # Few programs: the number of prompts is rounded up too. Filler rows have no
    # token, so they are finished before they start.
    rows = next_power_of_two(len(prompts))
    ids = np.arange(len(prompts)) if prompt_numbers is None else prompt_numbers
    filler = [()] * (rows - len(prompts))
    tokens, mask = pad_rows([*prompts, *filler], width, side="left")
    ids = np.pad(np.asarray(ids, np.int32), (0, rows - len(prompts)))
    if len(prefix) == 0:
      return tokens, mask, ids, None
    # The prefix has a bucket of its own.
    width = min(bucket_length(len(prefix), self.prompt_buckets), context)
    front, real = pad_rows([prefix], width, side="left")
    return tokens, mask, ids, (front[0], real[0])

  def check(
    self, prompts: Sequence[Sequence[int]], prefix: Sequence[int] = ()
  ) -> int:
    """Refuses prompts that cannot be completed, before anything is compiled.

    Returns:
      The context in tokens, which prompt, prefix and completion share.

    Raises:
      UserError: a prompt is empty or does not fit into the context.
    """
    config = self.model.config
    assert isinstance(config, CausalConfig), config
    context = config.max_positions
    if config.context_switch and len(prefix):
      # The prefix is read as a short text, so the whole has to be one.
      context = min(context, config.context_switch)
    for number, prompt in enumerate(prompts):
      if len(prompt) == 0:
        raise UserError(
          f"prompt {number} is empty; a prompt needs at least one token"
        )
      if len(prompt) + len(prefix) >= context:
        few_shot = f" after a prefix of {len(prefix)}" if len(prefix) else ""
        raise UserError(
          f"prompt {number} has {len(prompt)} tokens{few_shot}, but prompt and "
          f"completion must fit into the model's context of {context}; shorten "
          "it or take a model with a longer context"
        )
    return context

  def capacity(self, max_new_tokens: int) -> int:
    """The bucket of new tokens that holds `max_new_tokens`."""
    return bucket_length(max_new_tokens, self.new_token_buckets)

  @functools.cached_property
  def _jitted(self) -> "_Programs":
    return _Programs(self.model, self.mesh, self.gather)


class _Programs:
  """The compiled functions of one model; the only place that jits them."""

  def __init__(self, model: Model, mesh: Mesh | None, gather: bool):
    def sample(*args, samples_per_prompt: int, capacity: int):
      return decode.sample(
        model,
        *args,
        samples_per_prompt=samples_per_prompt,
        capacity=capacity,
        gather=gather,
      )

    def begin(*args, samples_per_prompt: int, capacity: int):
      return decode.begin(
        model,
        *args,
        samples_per_prompt=samples_per_prompt,
        capacity=capacity,
      )

    def advance_until_few(params, layers, fixed, state, settings):
      return decode.advance_until_few(
        model, params, layers, fixed, state, settings
      )

    def unstack(params):
      return decode.unstack(model, params)

    def advance(params, layers, fixed, state, settings):
      return decode.advance(model, params, layers, fixed, state, settings)

    def jit(fn: Callable, **options: Any) -> jax.stages.Wrapped:
      return meshes.jit(fn, mesh, **options)

    # These two set shapes, so a new value compiles a new program.
    static = ("samples_per_prompt", "capacity")
    # Replicated, so that every host can read all samples.
    whole = meshes.replicated(mesh) if mesh else None
    self.sample = jit(sample, static_argnames=static, out_shardings=whole)
    self.begin = jit(begin, static_argnames=static)
    self.unstack = jit(unstack)
    # The caches are updated in place: `state` is donated.
    self.advance = jit(advance, donate_argnums=3)
    self.advance_until_few = jit(advance_until_few, donate_argnums=3)
    self.take = jit(compaction.take)


def _shapes(tree: PyTree, where: Sharding | None = None) -> PyTree:
  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(shape, tree)


def next_power_of_two(count: int) -> int:
  """The rows that so many prompts are drawn in; count >= 1."""
  return 1 << (count - 1).bit_length()
