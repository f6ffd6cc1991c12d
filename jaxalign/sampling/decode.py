"""The decoding loop: prefill each distinct prompt once, then token by token.

A prompt's keys and values are stored once and read by all its samples; a
few-shot prefix that all prompts share is stored once for all of them. Each row
owns only the keys of its new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxalign.core.types import Params, Samples, SamplingParams
from jaxalign.models.config import CausalConfig
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.sampling import compaction
from jaxalign.sampling.draw import draw_tokens
from jaxalign.sampling.state import (
  EOS,
  LENGTH,
  STOP,
  Fixed,
  State,
  column_of,
  ends_with_stop,
  first_state,
  last_tokens,
  row_keys,
)

Prefix = tuple[Int[Array, " F"], Bool[Array, " F"]]  # tokens, True = real


def begin(
  model: Model,
  params: Params,
  tokens: Int[Array, "P T"],
  mask: Bool[Array, "P T"],
  prompt_numbers: Int[Array, " P"],
  settings: SamplingParams,
  key: Array,
  prefix: Prefix | None = None,
  first_sample: Int[Array, ""] | int = 0,
  *,
  samples_per_prompt: int,
  capacity: int,
  gather: bool = True,
) -> tuple[Fixed, State]:
  """Reads the prompts and draws each row's first token; see `sample`."""
  # Prefill: the prefix, then each prompt once, whatever S is.
  module = model.bind(_cast(params, model.config.dtype, gather))
  tokens, mask = _align_right(tokens, mask)
  past, offset, context = _read_prefix(module, tokens, mask, prefix)
  # Positions count real tokens; those of padding are masked.
  positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + offset
  hidden, kept = module(
    tokens, positions, mask.astype(jnp.int32), past=past, keep=True
  )

  # One row per sample from here on.
  def repeat(x):
    return jnp.repeat(x, samples_per_prompt, axis=0)

  start = positions[:, -1] + 1
  assert isinstance(model.config, CausalConfig), model.config
  room = model.config.max_positions - start  # the context may end earlier
  if switch := model.config.context_switch:
    # The cached keys of a short text would be wrong once it is a long one.
    room = jnp.where(start <= switch, switch - start, room)
  limit = jnp.minimum(jnp.minimum(settings.max_new_tokens, capacity), room)
  sample_ids = jnp.arange(samples_per_prompt) + first_sample
  fixed = Fixed(
    past=tuple(kv.unstack() if gather else kv for kv in (*past, kept)),
    start=repeat(start),
    limit=repeat(limit),
    keys=row_keys(key, prompt_numbers, sample_ids),
  )
  state = first_state(
    model.config,
    repeat(context),
    repeat(~mask.any(axis=1)),
    settings,
    capacity,
    stacked=not gather,
  )
  fixed, state = _split_rows((fixed, state), len(fixed.start))
  return fixed, _emit(module, fixed, state, repeat(hidden[:, -1]), settings)


def unstack(model: Model, params: Params) -> list[Params] | Params:
  """The layers' parameters as `advance` takes them."""
  return model.bind(_cast(params, model.config.dtype)).unstack()


def advance(
  model: Model,
  params: Params,
  layers: list[Params] | Params,
  fixed: Fixed,
  state: State,
  settings: SamplingParams,
) -> State:
  """Feeds each row's last token to the model and draws the next one."""
  module = model.bind(_cast(params, model.config.dtype))
  return _advance(module, layers, fixed, state, settings)


def advance_until_few(
  model: Model,
  params: Params,
  layers: list[Params] | Params,
  fixed: Fixed,
  state: State,
  settings: SamplingParams,
) -> tuple[State, Samples, tuple[Int[Array, ""], Int[Array, ""]]]:
  """Draws until all rows have ended, or few are left: see `compaction`.

  Returns:
    The state, the samples so far, and what `compaction.needed` says.
  """
  module = model.bind(_cast(params, model.config.dtype))
  groups = compaction.prompt_groups(fixed)
  state = jax.lax.while_loop(
    lambda s: ~s.done.all() & ~compaction.pays(s.done, groups),
    lambda s: _advance(module, layers, fixed, s, settings),
    state,
  )
  size = compaction.needed(state.done, groups)
  return state, _samples(state, settings), size


def sample(
  model: Model,
  params: Params,
  tokens: Int[Array, "P T"],
  mask: Bool[Array, "P T"],
  prompt_numbers: Int[Array, " P"],
  settings: SamplingParams,
  key: Array,
  prefix: Prefix | None = None,
  first_sample: Int[Array, ""] | int = 0,
  *,
  samples_per_prompt: int,
  capacity: int,
  gather: bool = True,
) -> Samples:
  """Draws S completions of each prompt.

  Random keys are derived from (key, prompt id, sample number, token number),
  so a sample does not depend on the batch that it is drawn in.

  Args:
    model: a causal language model.
    params: its parameters, in any float dtype.
    tokens: prompts, padded on either side.
    mask: True = a real token; a row without any gives empty samples.
    prompt_numbers: numbers the prompts for the random keys.
    settings: see `sampling.settings.make`.
    key: the run's key folded with the step.
    prefix: tokens read before every prompt, and which of them are real.
    first_sample: number of the first sample; a second call with
      `first_sample=S` draws S more.
    samples_per_prompt: S.
    capacity: N, new tokens at most; `settings.max_new_tokens` may be lower.
    gather: see `Sampler`.

  Returns:
    P·S rows; row p S + s is sample s of prompt p.
  """
  # The first token of every row, then a loop until all rows have ended.
  module = model.bind(_cast(params, model.config.dtype, gather))
  fixed, state = begin(
    model,
    params,
    tokens,
    mask,
    prompt_numbers,
    settings,
    key,
    prefix,
    first_sample,
    samples_per_prompt=samples_per_prompt,
    capacity=capacity,
    gather=gather,
  )
  # Taking the stacked layers apart once, not at every token. Layers that are
  # gathered one by one stay stacked: a scan's are not gathered before the loop.
  layers = module.unstack(stacked=not gather)
  state = jax.lax.while_loop(
    lambda s: ~s.done.all() & (s.drawn < capacity),
    lambda s: _advance(module, layers, fixed, s, settings),
    state,
  )
  return _samples(state, settings)


def _samples(state, settings):
  """What has been drawn, with the pad id after each row's end."""
  capacity = state.model_logps.shape[1]
  new = state.history[:, -capacity:]
  inside = jnp.arange(capacity) < state.lengths[:, None]
  return Samples(
    tokens=jnp.where(inside, new, settings.pad_id),
    lengths=state.lengths,
    finish=state.finish,
    model_logps=state.model_logps,
    sampling_logps=state.sampling_logps,
  )


def _advance(module, layers, fixed, state, settings):
  # The last token is number drawn - 1, which gives position and column.
  hidden, own = module.step(
    last_tokens(state),
    fixed.start + state.drawn - 1,
    fixed.past,
    state.own,
    state.drawn - 1,
    layers,
  )
  state = dataclasses.replace(state, own=own)
  return _emit(module, fixed, state, hidden, settings)


def _emit(module, fixed, state, hidden, settings):
  """Draws a token from each row's hidden state and records it."""
  # Drawing. The key is folded with the token's number: no key to carry along.
  drawn, column = state.drawn, column_of(state)
  uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, drawn)))
  token, model_logp, sampling_logp = draw_tokens(
    module.unembed(hidden),
    uniform(fixed.keys),
    settings,
    state.seen,
    state.history,
    column,
    drawn,
  )
  # Finished rows draw too, as the batch has one shape; it is not recorded.
  alive = ~state.done
  token = jnp.where(alive, token, settings.pad_id)
  history = state.history.at[:, column].set(token)

  # Deciding which rows end here, and why.
  ended = (token[:, None] == settings.eos_ids).any(axis=1)
  stopped = ends_with_stop(history, column, drawn, settings.stops)
  finish = jnp.where(ended, EOS, jnp.where(stopped, STOP, LENGTH))
  full = drawn + 1 >= fixed.limit

  def write(logps, new):
    return logps.at[:, drawn].set(jnp.where(alive, new, 0))

  seen = state.seen
  if seen is not None:
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
  return dataclasses.replace(
    state,
    drawn=drawn + 1,
    history=history,
    seen=seen,
    done=state.done | ended | stopped | full,
    lengths=state.lengths + alive,
    finish=jnp.where(alive, finish, state.finish),
    model_logps=write(state.model_logps, model_logp),
    sampling_logps=write(state.sampling_logps, sampling_logp),
  )


def _align_right(tokens, mask):
  """Moves padding to the left, so that all rows end in the last column."""
  # False sorts before True; stable keeps the tokens in order.
  order = jnp.argsort(mask, axis=1, stable=True)
  return tuple(jnp.take_along_axis(x, order, axis=1) for x in (tokens, mask))


def _read_prefix(module, tokens, mask, prefix):
  """The prefix's keys, its length, and each row's tokens so far."""
  history = jnp.where(mask, tokens, -1)
  if prefix is None:
    return (), 0, history
  # Read as one row: a single group of keys for all prompts.
  shared, real = _align_right(prefix[0][None], prefix[1][None])
  positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
  _, kept = module(shared, positions, real.astype(jnp.int32), keep=True)
  front = jnp.where(real, shared, -1)
  front = jnp.broadcast_to(front, (len(tokens), front.shape[1]))
  history = jnp.concatenate([front, history], axis=1)
  # Padding between prefix and prompt moves to the front.
  return (kept,), real.sum(), _align_right(history, history >= 0)[0]


def _split_rows(tree, rows: int):
  """Shards every array that has a row axis over the mesh in force."""

  def place(x):
    if x.ndim == 5:  # the caches of all layers, stacked
      return meshes.constrain(x, None, meshes.SHORT_ROWS, "tensor")
    if x.ndim == 0 or x.shape[0] != rows:
      return x
    # Of a layer's cache the second axis are heads.
    heads = "tensor" if x.ndim == 4 else None
    return meshes.constrain(x, meshes.SHORT_ROWS, heads)

  return jax.tree.map(place, tree)


def _cast(params: Params, dtype: str, gather: bool = True) -> Params:
  """Casts once what the loop would cast at every step; norms stay exact.

  On a mesh the parameters are also gathered here, and not at every token; with
  `gather` off, all but the layers'.
  """
  cast = {
    name: part
    if name == "final_norm"
    else jax.tree.map(lambda x: x.astype(dtype), part)
    for name, part in params.items()
  }
  layers = {} if gather else {"blocks": cast.pop("blocks")}
  return meshes.gathered(cast) | layers
